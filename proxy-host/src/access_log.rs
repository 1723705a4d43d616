//! One line for each request and connection: Envoy's default text format followed by cluster, response code details and
//! the decision, or JSON with the names that Istio's access log has.
//!
//! A worker gathers lines in a buffer of its own; a thread writes them. At the end of the process all that were gathered
//! are written ([`AccessLog::finish`]).

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    fmt::Write as _,
    io,
    rc::Rc,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant, SystemTime},
};

use serde::Serialize;
use tokio::sync::Notify;

use crate::{
    flags,
    listener::guard::{Control, End},
    stats::{Ending, Recorder, WorkerStats},
    upstream::cluster::Address,
};

/// A buffer of this many bytes is handed over at once.
const FULL: usize = 64 * 1024;
/// Otherwise a line waits at most this long.
const WAIT: Duration = Duration::from_millis(50);
/// Bytes that wait to be written; more are dropped and counted, so that a slow reader never slows traffic.
const WAITING: usize = 16 << 20;

/// How lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Envoy's default text format, then cluster, response code details and decision
    #[default]
    #[value(alias = "true")]
    Text,
    /// One JSON object a line, with Istio's names
    Json,
    /// No access log
    #[value(alias = "false")]
    Off,
}

/// Where threads put their lines.
#[derive(Debug, Clone, Default)]
pub struct AccessLog(Option<(Format, Sink)>);

#[derive(Debug, Clone)]
enum Sink {
    Writer(Arc<Queue>),
    Lines(mpsc::Sender<String>),
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<String>,
    bytes: usize,
    writing: bool,
    ended: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock only means that another thread panicked between two whole updates.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, lines: String) -> bool {
        let mut state = self.lock();
        if state.bytes + lines.len() > WAITING {
            return false;
        }
        state.bytes += lines.len();
        state.waiting.push(lines);
        self.changed.notify_all();
        true
    }

    fn write(&self, mut out: impl io::Write) {
        let mut state = self.lock();
        loop {
            while state.waiting.is_empty() {
                if state.ended {
                    return;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let lines = std::mem::take(&mut state.waiting);
            state.writing = true;
            drop(state);
            for chunk in &lines {
                // Where nobody reads, there is nothing left to do with a line.
                let _ = out.write_all(chunk.as_bytes());
            }
            let _ = out.flush();
            state = self.lock();
            state.bytes -= lines.iter().map(String::len).sum::<usize>();
            state.writing = false;
            self.changed.notify_all();
        }
    }
}

impl AccessLog {
    /// Starts the thread that writes lines to standard output.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn stdout(format: Format) -> io::Result<Self> {
        Self::to(format, io::stdout())
    }

    /// Starts the thread that writes lines to `out`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn to(format: Format, out: impl io::Write + Send + 'static) -> io::Result<Self> {
        if format == Format::Off {
            return Ok(Self::default());
        }
        let queue = Arc::new(Queue::default());
        let own = queue.clone();
        std::thread::Builder::new().name("access-log".into()).spawn(move || own.write(out))?;
        Ok(Self(Some((format, Sink::Writer(queue)))))
    }

    /// A log that hands each line to the caller at once.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<String>) {
        Self::channel_of(Format::Text)
    }

    /// The same in another format.
    #[must_use]
    pub fn channel_of(format: Format) -> (Self, mpsc::Receiver<String>) {
        let (sender, lines) = mpsc::channel();
        (Self(Some((format, Sink::Lines(sender)))), lines)
    }

    /// Whether lines go anywhere.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Waits until all lines that workers handed over are written; false if that takes longer than `patience`.
    #[must_use]
    pub fn finish(&self, patience: Duration) -> bool {
        let Some((_, Sink::Writer(queue))) = &self.0 else { return true };
        let mut state = queue.lock();
        state.ended = true;
        queue.changed.notify_all();
        let busy = |state: &mut State| state.writing || !state.waiting.is_empty();
        let waited = queue.changed.wait_timeout_while(state, patience, busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// One worker's part of the log, and its counts.
#[derive(Debug, Clone)]
pub struct WorkerLog(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    log: AccessLog,
    recorder: Recorder,
    buffer: RefCell<String>,
    lines: Cell<u64>,
    begun: Notify,
}

impl WorkerLog {
    /// Lines go to `log`, counts to `stats`.
    #[must_use]
    pub fn new(log: AccessLog, stats: Arc<WorkerStats>) -> Self {
        Self(Rc::new(Inner {
            log,
            recorder: Recorder::new(stats),
            buffer: RefCell::default(),
            lines: Cell::new(0),
            begun: Notify::new(),
        }))
    }

    /// Whether lines go anywhere.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.log.is_on()
    }

    /// The worker's counts.
    #[must_use]
    pub fn stats(&self) -> &Arc<WorkerStats> {
        &self.0.recorder.stats
    }

    /// Hands over what was gathered, a moment after it began; runs until it is dropped.
    pub async fn run(self) {
        loop {
            self.0.begun.notified().await;
            tokio::time::sleep(WAIT).await;
            self.0.flush();
        }
    }

    /// Hands over what was gathered.
    pub fn flush(&self) {
        self.0.flush();
    }
}

impl Inner {
    fn ended(&self, entry: &Entry) {
        let took = entry.begun.elapsed();
        let ending = Ending { http: entry.request.is_some(), code: entry.status, flags: entry.flags };
        self.recorder.ended(ending, took, entry.received, entry.sent);
        let Some((format, sink)) = &self.log.0 else { return };
        let mut buffer = self.buffer.borrow_mut();
        let empty = buffer.is_empty();
        match format {
            Format::Json => entry.json(took, &mut buffer),
            Format::Text | Format::Off => entry.text(took, &mut buffer),
        }
        match sink {
            Sink::Lines(sender) => {
                // Whoever listened may have gone.
                let _ = sender.send(std::mem::take(&mut *buffer));
            }
            Sink::Writer(_) => {
                self.lines.set(self.lines.get() + 1);
                let full = buffer.len() >= FULL;
                drop(buffer);
                if full {
                    self.flush();
                } else if empty {
                    self.begun.notify_one();
                }
            }
        }
    }

    fn flush(&self) {
        let lines = self.buffer.take();
        let count = self.lines.take();
        if let Some((_, Sink::Writer(queue))) = &self.log.0
            && !lines.is_empty()
            && !queue.push(lines)
        {
            self.recorder.stats.lost_lines.add(count);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.flush();
    }
}

/// What is known of a request or connection; counted and written when it is dropped.
#[derive(Debug)]
pub struct Entry {
    log: Option<WorkerLog>,
    /// When it began, where that is written.
    start: Option<SystemTime>,
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
    pub upstream: Option<Address>,
    /// The cluster that was chosen.
    pub cluster: Option<String>,
    /// Envoy's response code details, where they are not `via_upstream`; why a TCP connection ended.
    pub reason: Option<String>,
    /// The rule and the entry that decided, by the filter's own account.
    pub decision: Option<String>,
    /// The connection of a request; over HTTP/2?
    pub client: Option<(Arc<Control>, bool)>,
}

/// An entry in JSON: Istio's names, in alphabetical order.
#[derive(Serialize)]
struct Json<'e> {
    authority: Option<&'e str>,
    bytes_received: u64,
    bytes_sent: u64,
    decision: Option<&'e str>,
    duration: u64,
    method: Option<&'e str>,
    path: Option<&'e str>,
    protocol: Option<&'e str>,
    request_id: Option<&'e str>,
    response_code: u16,
    response_code_details: Option<&'e str>,
    response_flags: &'e str,
    start_time: String,
    upstream_cluster: Option<&'e str>,
    upstream_host: Option<String>,
    upstream_service_time: Option<u64>,
    user_agent: Option<&'e str>,
    x_forwarded_for: Option<&'e str>,
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Entry {
    /// An entry that begins now.
    #[must_use]
    pub fn new(log: &WorkerLog) -> Self {
        let mut entry = Self::silent();
        entry.start = log.is_on().then(SystemTime::now);
        entry.log = Some(log.clone());
        entry
    }

    /// An entry that is neither counted nor written: another one is.
    #[must_use]
    pub fn silent() -> Self {
        Self {
            log: None,
            start: None,
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
            decision: None,
            client: None,
        }
    }

    /// Time since it began.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Flag and response code details of a request whose client is at fault that its answer is cut.
    #[must_use]
    pub fn fault(&self) -> Option<(&'static str, String)> {
        let (control, _) = self.client.as_ref()?;
        match control.broken() {
            Some(refusal) => Some(("DPE", refusal.details.into())),
            None => (control.end() == End::Gone).then(|| ("DC", "downstream_remote_disconnect".into())),
        }
    }

    /// The request is over before its answer was through: says why in Envoy's words, where nothing does so yet.
    pub fn broke_off(&mut self) {
        let Some((control, http2)) = self.client.take().filter(|_| self.reason.is_none()) else { return };
        let (flag, details) = match control.end() {
            _ if let Some(refusal) = control.broken() => ("DPE", refusal.details),
            End::Gone => ("DC", "downstream_remote_disconnect"),
            End::Broken => ("DPE", "codec_error"),
            End::Open if http2 => ("DR", "http2.remote_reset"),
            End::Open | End::Stopped => ("DC", "downstream_local_disconnect"),
        };
        self.flags = flags::join(self.flags, flag);
        self.reason = Some(details.into());
    }

    fn start(&self) -> SystemTime {
        self.start.unwrap_or(SystemTime::UNIX_EPOCH)
    }

    fn flags(&self) -> &str {
        if self.flags.is_empty() { "-" } else { self.flags }
    }

    fn details(&self) -> Option<Cow<'_, str>> {
        match &self.reason {
            Some(reason) => Some(Cow::Borrowed(reason)),
            None if self.request.is_some() && self.upstream.is_some() => Some(Cow::Borrowed("via_upstream")),
            None => None,
        }
    }

    fn text(&self, took: Duration, line: &mut String) {
        let _ = write!(line, "[{}] \"", humantime::format_rfc3339_millis(self.start()));
        match &self.request {
            Some((method, path, protocol)) => {
                push(line, Some(method));
                line.push(' ');
                push(line, Some(path));
                line.push(' ');
                line.push_str(protocol);
            }
            None => line.push_str("- - -"),
        }
        let (status, flags, received, sent) = (self.status, self.flags(), self.received, self.sent);
        let _ = write!(line, "\" {status} {flags} {received} {sent} {} ", millis(took));
        match self.service_time {
            Some(time) => {
                let _ = write!(line, "{}", millis(time));
            }
            None => line.push('-'),
        }
        let [forwarded, agent, id] = self.headers.each_ref().map(Option::as_deref);
        let upstream = self.upstream.as_ref().map(ToString::to_string);
        let (authority, upstream) = (self.authority.as_deref(), upstream.as_deref());
        let details = self.details();
        for value in
            [forwarded, agent, id, authority, upstream, self.cluster.as_deref(), details.as_deref(), self.decision()]
        {
            line.push_str(" \"");
            push(line, value);
            line.push('"');
        }
        line.push('\n');
    }

    fn decision(&self) -> Option<&str> {
        self.decision.as_deref()
    }

    fn json(&self, took: Duration, line: &mut String) {
        let [forwarded, agent, id] = self.headers.each_ref().map(Option::as_deref);
        let details = self.details();
        let request = self.request.as_ref();
        let json = Json {
            authority: self.authority.as_deref(),
            bytes_received: self.received,
            bytes_sent: self.sent,
            decision: self.decision(),
            duration: millis(took),
            method: request.map(|r| r.0.as_str()),
            path: request.map(|r| r.1.as_str()),
            protocol: request.map(|r| r.2),
            request_id: id,
            response_code: self.status,
            response_code_details: details.as_deref(),
            response_flags: self.flags(),
            start_time: humantime::format_rfc3339_millis(self.start()).to_string(),
            upstream_cluster: self.cluster.as_deref(),
            upstream_host: self.upstream.as_ref().map(ToString::to_string),
            upstream_service_time: self.service_time.map(millis),
            user_agent: agent,
            x_forwarded_for: forwarded,
        };
        // Strings and numbers always have a form in JSON.
        line.push_str(&serde_json::to_string(&json).unwrap_or_default());
        line.push('\n');
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
        if let Some(log) = self.log.take() {
            if self.status == 0 {
                self.broke_off();
            }
            log.0.ended(self);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(log: &WorkerLog) -> Entry {
        let mut entry = Entry::new(log);
        entry.start = Some(SystemTime::UNIX_EPOCH);
        entry.request = Some(("GET".into(), "/a".into(), "HTTP/1.1"));
        entry.status = 502;
        entry.headers[1] = Some("say \"hi\"\r\nforged".into());
        entry.authority = Some("a.com".into());
        entry.reason = Some("portolan_denied{blocked}".into());
        entry.decision = Some("blocked".into());
        entry
    }

    #[test]
    fn a_line_is_envoys_default_and_the_decision() {
        let (log, lines) = AccessLog::channel();
        drop(entry(&WorkerLog::new(log, Arc::default())));
        let line = lines.recv().unwrap();
        let (before, after) = line.split_once("0 0 0").unwrap();
        assert_eq!(before, "[1970-01-01T00:00:00.000Z] \"GET /a HTTP/1.1\" 502 - ");
        let expected = " - \"-\" \"say \\\"hi\\\"\\r\\nforged\" \"-\" \"a.com\" \"-\" \"-\" \
                        \"portolan_denied{blocked}\" \"blocked\"\n";
        assert_eq!(after, expected);
    }

    #[test]
    fn a_line_in_json_has_istios_names() {
        let (log, lines) = AccessLog::channel_of(Format::Json);
        drop(entry(&WorkerLog::new(log, Arc::default())));
        let line = lines.recv().unwrap();
        assert!(line.ends_with("}\n") && line.matches('\n').count() == 1, "{line}");
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(json["user_agent"], "say \"hi\"\r\nforged");
        assert_eq!((&json["response_code"], &json["response_flags"]), (&502.into(), &"-".into()));
        assert_eq!((&json["decision"], &json["upstream_host"]), (&"blocked".into(), &serde_json::Value::Null));
    }

    #[test]
    fn an_answer_of_the_upstream_is_via_upstream() {
        let (log, lines) = AccessLog::channel_of(Format::Json);
        let mut entry = entry(&WorkerLog::new(log, Arc::default()));
        (entry.reason, entry.upstream) = (None, Some(Address::Ip(([1, 2, 3, 4], 80).into())));
        drop(entry);
        assert!(lines.recv().unwrap().contains("\"response_code_details\":\"via_upstream\""));
    }

    /// Takes bytes into memory that the test can see.
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_line_is_lost_at_the_end() {
        let out = Shared::default();
        let log = AccessLog::to(Format::Text, out.clone()).unwrap();
        let stats = Arc::<WorkerStats>::default();
        let worker = WorkerLog::new(log.clone(), stats.clone());
        for _ in 0..5000 {
            drop(entry(&worker));
        }
        drop(worker);
        assert!(log.finish(Duration::from_secs(10)));
        let lines = out.0.lock().unwrap().iter().filter(|byte| **byte == b'\n').count();
        assert_eq!((lines, stats.lost_lines.get()), (5000, 0));
    }

    /// A reader that never reads.
    struct Stuck;

    impl io::Write for Stuck {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            loop {
                std::thread::park();
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_is_stuck_costs_lines_and_no_memory() {
        let log = AccessLog::to(Format::Text, Stuck).unwrap();
        let stats = Arc::<WorkerStats>::default();
        let worker = WorkerLog::new(log.clone(), stats.clone());
        for _ in 0..50 {
            let mut entry = entry(&worker);
            entry.authority = Some("a".repeat(1 << 20));
        }
        drop(worker);
        assert!(stats.lost_lines.get() >= 30, "{}", stats.lost_lines.get());
        assert!(!log.finish(Duration::from_millis(1)));
    }
}
