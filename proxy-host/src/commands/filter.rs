//! `proxy-host filter`: any proxy-wasm filter in front of one upstream.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use bytes::Bytes;
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    admin,
    any_filter::{RunError, Running, Settings, client::Address},
    config::HttpArgs,
    logging, vm,
};

/// Runs a proxy-wasm filter (ABI 0.2.0 or 0.2.1) in front of one upstream, as Envoy 1.40 would
#[derive(Debug, Clone, Parser)]
#[command(
    name = "proxy-host filter",
    bin_name = "proxy-host filter",
    version,
    after_help = "Examples:
  proxy-host filter --wasm auth.wasm --listen 127.0.0.1:8080 --upstream 127.0.0.1:9000 \\
      --configuration '{\"realm\": \"a\"}' --cluster auth=127.0.0.1:9001
      Requests to port 8080 pass the filter and go on to port 9000. What the filter calls as cluster \"auth\"
      is at port 9001. Try it with: curl http://127.0.0.1:8080/

  proxy-host filter --wasm redis.wasm --network --listen 127.0.0.1:6380 --upstream 127.0.0.1:6379
      Connections instead of requests: the filter sees their bytes in both directions.

The filter's log and what it prints go to standard error. Clients may speak HTTP/1.1 or HTTP/2 without TLS; the
upstream is spoken to in the same version. gRPC calls and streams of the filter go to clusters over HTTP/2, HTTP calls
over HTTP/1.1. A network filter may choose a cluster by the filter state envoy.tcp_proxy.cluster.

A body that the filter holds back may have 1 MiB: a larger one is answered with 413 (a request's), or its stream is
reset (a response's). A filter that crashes answers the streams it has with 503 and is started again, as in Envoy with
failure_policy FAIL_RELOAD. Exit status: 0 after SIGTERM or SIGINT, 1 where the filter does not start, 2 for arguments
or files that cannot be used."
)]
pub struct Args {
    /// The filter: a WebAssembly module, built for wasm32-wasip1 by any proxy-wasm SDK
    #[arg(long, value_name = "FILE")]
    pub wasm: PathBuf,
    /// Which of the module's root contexts to use; most modules have only one, without a name
    #[arg(long, value_name = "ID", default_value = "")]
    pub root_id: String,
    /// Configuration of the plugin, given to proxy_on_configure; @FILE reads it from a file
    #[arg(long, value_name = "TEXT|@FILE", default_value = "")]
    pub configuration: String,
    /// Configuration of the VM, given to proxy_on_vm_start; @FILE reads it from a file
    #[arg(long, value_name = "TEXT|@FILE", default_value = "")]
    pub vm_configuration: String,
    /// The filter works on connections (a network filter) and not on requests
    #[arg(long)]
    pub network: bool,
    /// Listen here for clients; port 0 takes any free one
    #[arg(long, value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// Where what passes the filter goes
    #[arg(long, value_name = "HOST:PORT")]
    pub upstream: Address,
    /// A cluster that the filter calls by HTTP or gRPC; may be given several times
    #[arg(long = "cluster", value_name = "NAME=HOST:PORT", value_parser = cluster)]
    pub clusters: Vec<(String, Address)>,
    /// Answer here about the filter: /ready, /healthz, /metrics (also those that the filter defines), /logging. Whoever
    /// can reach it can change the log's level: keep it on loopback
    #[arg(long, value_name = "IP:PORT")]
    pub admin: Option<SocketAddr>,
    /// Least level of the filter's log that is shown
    #[arg(long, value_enum, default_value_t = Level::Info)]
    pub log_level: Level,
    /// Threads, each with an instance of the filter; they share data and queues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: u16,
    /// How long a connection through a network filter may go without a byte either way. 0s: as long as it likes
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    pub tcp_idle_timeout: Duration,
    /// Limits of HTTP
    #[command(flatten)]
    pub http: HttpArgs,
}

/// Envoy's `stream_idle_timeout` where nothing else is said.
const STREAM_IDLE: Duration = Duration::from_secs(300);

/// Levels of proxy-wasm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Everything.
    Trace,
    /// For developers.
    Debug,
    /// Normal operation.
    Info,
    /// Something looks wrong.
    Warn,
    /// Something failed.
    Error,
    /// The filter cannot go on.
    Critical,
}

impl Level {
    fn of_vm(self) -> vm::LogLevel {
        match self {
            Self::Trace => vm::LogLevel::Trace,
            Self::Debug => vm::LogLevel::Debug,
            Self::Info => vm::LogLevel::Info,
            Self::Warn => vm::LogLevel::Warn,
            Self::Error => vm::LogLevel::Error,
            Self::Critical => vm::LogLevel::Critical,
        }
    }

    fn directive(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error | Self::Critical => "error",
        }
    }
}

fn cluster(text: &str) -> Result<(String, Address), String> {
    let (name, address) = text.split_once('=').ok_or("write NAME=HOST:PORT, for example auth=127.0.0.1:9001")?;
    if name.is_empty() {
        return Err("the cluster's name before = is empty".into());
    }
    Ok((name.to_owned(), address.parse()?))
}

/// Arguments or files that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{option} {path}: {error}; check the path and its permissions", path = .path.display())]
pub struct FileError {
    option: &'static str,
    path: PathBuf,
    error: std::io::Error,
}

fn text_or_file(option: &'static str, value: &str) -> Result<Bytes, FileError> {
    match value.strip_prefix('@') {
        None => Ok(Bytes::copy_from_slice(value.as_bytes())),
        Some(path) => file(option, Path::new(path)).map(Bytes::from),
    }
}

fn file(option: &'static str, path: &Path) -> Result<Vec<u8>, FileError> {
    fs::read(path).map_err(|error| FileError { option, path: path.to_owned(), error })
}

impl Args {
    /// Reads the files that the arguments name.
    ///
    /// # Errors
    /// One cannot be read.
    pub fn settings(self) -> Result<Settings, FileError> {
        Ok(Settings {
            wasm: file("--wasm", &self.wasm)?,
            name: self.wasm.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(),
            root_id: self.root_id,
            configuration: text_or_file("--configuration", &self.configuration)?,
            vm_configuration: text_or_file("--vm-configuration", &self.vm_configuration)?,
            network: self.network,
            listen: self.listen,
            upstream: self.upstream,
            http: self.http.limits(STREAM_IDLE),
            tcp_idle: self.tcp_idle_timeout,
            clusters: self.clusters,
            log_level: self.log_level.of_vm(),
            threads: self.threads.into(),
        })
    }
}

/// Runs the command until SIGTERM or SIGINT.
#[must_use]
pub fn run(args: Args) -> ExitCode {
    let directives = format!("warn,h2=error,portolan_proxy_host=info,filter={}", args.log_level.directive());
    if let Err(error) = logging::start(&directives, logging::Format::Text) {
        eprintln!("proxy-host filter: {error}");
        return ExitCode::FAILURE;
    }
    let admin = args.admin;
    let settings = match args.settings() {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("proxy-host filter: {error}");
            return ExitCode::from(2);
        }
    };
    match serve(settings, admin) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy-host filter: {error}");
            ExitCode::from(if matches!(error, RunError::Engine(_)) { 2 } else { 1 })
        }
    }
}

fn serve(settings: Settings, admin: Option<SocketAddr>) -> Result<(), RunError> {
    // An address that is taken is told before anything starts.
    let admin =
        admin.map(|address| std::net::TcpListener::bind(address).map_err(|error| RunError::Bind { address, error }));
    let admin = admin.transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut term, mut int) = {
        let _in = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let upstream = settings.upstream.clone();
    let running = Running::start(settings)?;
    let told = match admin {
        Some(listener) => format!(", admin {}", admin::filter::start(listener, running.admin())?),
        None => String::new(),
    };
    eprintln!("proxy-host filter: listening on {}, upstream {upstream}{told}", running.address);
    runtime.block_on(async {
        let mut watch = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                _ = term.recv() => return Ok(()),
                _ = int.recv() => return Ok(()),
                _ = watch.tick() => if !running.is_running() { return Err(RunError::Thread) },
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Args, clap::Error> {
        let needed = ["filter", "--wasm", "a.wasm", "--listen", "127.0.0.1:0", "--upstream", "localhost:80"];
        Args::try_parse_from([&needed, args].concat())
    }

    #[test]
    fn clusters_have_names_and_addresses() {
        let args = parse(&["--cluster", "a=127.0.0.1:1", "--cluster", "outbound|80||b=[::1]:2"]).unwrap();
        let names: Vec<_> = args.clusters.iter().map(|(name, address)| format!("{name} {address}")).collect();
        assert_eq!(names, ["a 127.0.0.1:1", "outbound|80||b [::1]:2"]);
        for wrong in ["a", "=127.0.0.1:1", "a=b", "a=b:c"] {
            assert_eq!(parse(&["--cluster", wrong]).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }

    #[test]
    fn a_configuration_is_text_or_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        fs::write(&path, "from the file").unwrap();
        assert_eq!(text_or_file("--configuration", "text").unwrap(), "text");
        assert_eq!(text_or_file("--configuration", &format!("@{}", path.display())).unwrap(), "from the file");
        let error = text_or_file("--configuration", "@/none/such").unwrap_err().to_string();
        assert!(error.starts_with("--configuration /none/such: "), "{error}");
    }
}
