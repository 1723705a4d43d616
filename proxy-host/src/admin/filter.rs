//! The admin port of `proxy-host filter`.

use std::{net::TcpListener, sync::Arc};

use http::StatusCode;
use tokio::sync::watch;

use super::{Answer, Pages, metrics, openmetrics, start_pages, text};
use crate::{
    logging::{self, LevelError},
    stats::Stats,
    vm::{LogLevel, Shared},
};

/// What the admin port tells of.
pub struct FilterAdmin {
    /// What the filter counts.
    pub filter: Arc<Shared>,
    /// What its host counts.
    pub stats: Arc<Stats>,
    /// Least level of the filter's log.
    pub log_level: watch::Sender<LogLevel>,
    /// Turns true when the process is to end.
    pub stop: watch::Receiver<bool>,
}

/// Starts the thread that answers; gives the address.
///
/// # Errors
/// No thread, no runtime, or a socket that cannot be used.
pub fn start(listener: TcpListener, admin: FilterAdmin) -> std::io::Result<std::net::SocketAddr> {
    start_pages(listener, admin)
}

/// What the filter is told of a level, and the log's own name for it.
fn known(level: &str) -> Option<(LogLevel, &'static str)> {
    let level = level.to_ascii_lowercase();
    Some(match level.as_str() {
        "trace" => (LogLevel::Trace, "trace"),
        "debug" => (LogLevel::Debug, "debug"),
        "info" => (LogLevel::Info, "info"),
        "warn" => (LogLevel::Warn, "warn"),
        "error" => (LogLevel::Error, "error"),
        "critical" => (LogLevel::Critical, "error"),
        _ => return None,
    })
}

impl Pages for FilterAdmin {
    const INDEX: &str = "proxy-host filter. GET, if nothing else is said:
  /ready    200 while the filter is offered, 503 while the process ends
  /healthz  200 for as long as the process answers
  /metrics  for Prometheus: connections and requests, how often the filter crashed, and what it defines itself
  /logging  level of the filter's log; POST /logging?level=debug changes it
";
    const PATHS: &[&str] = &["/ready", "/metrics"];

    async fn page(&self, path: &str) -> Answer {
        match path {
            "/metrics" => openmetrics(metrics::of_filter(&self.filter, &self.stats)),
            _ if *self.stop.borrow() => text(StatusCode::SERVICE_UNAVAILABLE, "DRAINING\n"),
            _ => text(StatusCode::OK, "LIVE\n"),
        }
    }

    fn set_level(&self, level: &str) -> Result<(), LevelError> {
        let Some((level, name)) = known(level) else { return logging::set_level(level) };
        logging::set_level(name)?;
        self.log_level.send_replace(level);
        Ok(())
    }

    async fn ended(&self) {
        let mut stop = self.stop.clone();
        // Dropped with what it tells of.
        while stop.changed().await.is_ok() {}
    }
}
