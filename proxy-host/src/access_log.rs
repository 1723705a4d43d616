//! One line for each request and connection, in Envoy's default text format, then the cluster and the reason of the
//! decision.

use std::{
    fmt::Write as _,
    io::Write as _,
    sync::mpsc,
    time::{Duration, Instant, SystemTime},
};

/// Lines that wait to be written; more are dropped, so that a slow reader of the log never slows traffic.
const WAITING: usize = 16 * 1024;

/// Where threads put their lines.
#[derive(Debug, Clone, Default)]
pub struct AccessLog(Option<mpsc::SyncSender<String>>);

impl AccessLog {
    /// Starts the thread that writes lines to standard output.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn stdout() -> std::io::Result<Self> {
        let (sender, lines) = mpsc::sync_channel::<String>(WAITING);
        std::thread::Builder::new().name("access-log".into()).spawn(move || {
            let mut out = std::io::stdout().lock();
            while let Ok(line) = lines.recv() {
                // Where nobody reads, there is nothing left to do with a line.
                let _ = out.write_all(line.as_bytes());
                for line in lines.try_iter().take(WAITING) {
                    let _ = out.write_all(line.as_bytes());
                }
                let _ = out.flush();
            }
        })?;
        Ok(Self(Some(sender)))
    }

    /// A log that hands its lines to the caller.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<String>) {
        let (sender, lines) = mpsc::sync_channel(WAITING);
        (Self(Some(sender)), lines)
    }

    /// Whether lines go anywhere.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    fn write(&self, line: String) {
        if let Some(sender) = &self.0 {
            let _ = sender.try_send(line);
        }
    }
}

/// What is known of a request or connection; written when it is dropped.
#[derive(Debug)]
pub struct Entry {
    log: AccessLog,
    start: SystemTime,
    begun: Instant,
    /// Method, path and protocol of a request; `None` for TCP.
    pub request: Option<(String, String, &'static str)>,
    /// Status sent to the client; 0 for none.
    pub status: u16,
    /// Envoy's response flags, comma separated; empty for none.
    pub flags: &'static str,
    /// Body bytes from the client.
    pub received: u64,
    /// Body bytes to the client.
    pub sent: u64,
    /// Time until the upstream's response began.
    pub service_time: Option<Duration>,
    /// `x-forwarded-for`, `user-agent`, `x-request-id`.
    pub headers: [Option<String>; 3],
    /// The host that was asked for, or the server name.
    pub authority: Option<String>,
    /// The address that was connected to.
    pub upstream: Option<String>,
    /// The cluster that was chosen.
    pub cluster: Option<String>,
    /// Why: what the filter said, or what went wrong.
    pub reason: Option<String>,
}

impl Entry {
    /// An entry that begins now.
    #[must_use]
    pub fn new(log: &AccessLog) -> Self {
        Self {
            log: log.clone(),
            start: SystemTime::now(),
            begun: Instant::now(),
            request: None,
            status: 0,
            flags: "",
            received: 0,
            sent: 0,
            service_time: None,
            headers: [None, None, None],
            authority: None,
            upstream: None,
            cluster: None,
            reason: None,
        }
    }

    /// Time since it began.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    fn line(&self) -> String {
        let mut line = format!("[{}] \"", humantime::format_rfc3339_millis(self.start));
        match &self.request {
            Some((method, path, protocol)) => {
                push(&mut line, Some(method));
                line.push(' ');
                push(&mut line, Some(path));
                line.push(' ');
                line.push_str(protocol);
            }
            None => line.push_str("- - -"),
        }
        let flags = if self.flags.is_empty() { "-" } else { self.flags };
        let _ = write!(
            line,
            "\" {} {flags} {} {} {} ",
            self.status,
            self.received,
            self.sent,
            self.begun.elapsed().as_millis()
        );
        match self.service_time {
            Some(time) => {
                let _ = write!(line, "{}", time.as_millis());
            }
            None => line.push('-'),
        }
        let [forwarded, agent, id] = &self.headers;
        for value in [forwarded, agent, id, &self.authority, &self.upstream, &self.cluster, &self.reason] {
            line.push_str(" \"");
            push(&mut line, value.as_deref());
            line.push('"');
        }
        line.push('\n');
        line
    }
}

/// Writes a value that a client chose so that it can end neither its quotes nor the line.
fn push(line: &mut String, value: Option<&str>) {
    match value {
        None | Some("") => line.push('-'),
        Some(value) => {
            for c in value.chars() {
                match c {
                    '"' | '\\' => line.extend(['\\', c]),
                    c if c.is_control() => line.extend(c.escape_default()),
                    c => line.push(c),
                }
            }
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.log.is_on() {
            self.log.write(self.line());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_envoys_default_and_the_decision() {
        let (log, lines) = AccessLog::channel();
        let mut entry = Entry::new(&log);
        entry.start = SystemTime::UNIX_EPOCH;
        entry.request = Some(("GET".into(), "/a".into(), "HTTP/1.1"));
        entry.status = 502;
        entry.headers[1] = Some("say \"hi\"\r\nforged".into());
        entry.authority = Some("a.com".into());
        entry.reason = Some("unknown_host".into());
        drop(entry);
        let line = lines.recv().unwrap();
        let (before, after) = line.split_once("0 0 0").unwrap();
        assert_eq!(before, "[1970-01-01T00:00:00.000Z] \"GET /a HTTP/1.1\" 502 - ");
        let expected = " - \"-\" \"say \\\"hi\\\"\\r\\nforged\" \"-\" \"a.com\" \"-\" \"-\" \"unknown_host\"\n";
        assert_eq!(after, expected);
    }
}
