//! The process's own log, on standard error: text or JSON, with a level that can be changed while it runs.

use std::{
    io::IsTerminal as _,
    sync::{Mutex, OnceLock, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Layer as _, Registry, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _,
};

/// How lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

struct Logging {
    level: Mutex<String>,
    handle: reload::Handle<EnvFilter, Registry>,
    format: Format,
}

static LOGGING: OnceLock<Logging> = OnceLock::new();

/// Why a level cannot be set.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LevelError {
    /// It is none.
    #[error("level {0:?} is not known: write error, warn, info, debug or trace, or a tracing filter ({1})")]
    Unknown(String, String),
    /// Somebody else decides what is logged in this process.
    #[error("the log of this process is not ours to change")]
    NotOurs,
}

/// A bare level is for our own parts; a tracing filter can name any.
fn filter(level: &str) -> Result<EnvFilter, LevelError> {
    let directives = match level.parse::<tracing::Level>() {
        // h2 warns of what clients do, who could fill a disk with it.
        Ok(level) => format!("warn,h2=error,portolan_proxy_host={level},portolan_controller={level},filter={level}"),
        Err(_) => level.to_owned(),
    };
    let unknown = |why: String| LevelError::Unknown(level.to_owned(), why);
    // A word that is no level would be taken for the name of a module, and silence everything else.
    if !level.contains(['=', ',']) && level != "off" && level.parse::<tracing::Level>().is_err() {
        return Err(unknown("no such level".into()));
    }
    EnvFilter::try_new(directives).map_err(|error| unknown(error.to_string()))
}

/// Starts the log of this process.
///
/// # Errors
/// A level that is none, or another log was started before.
pub fn start(level: &str, format: Format) -> Result<(), LevelError> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        Format::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        Format::Json => lines.json().flatten_event(true).with_ansi(false).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(|_| LevelError::NotOurs)?;
    let ours = LOGGING.set(Logging { level: Mutex::new(level.to_owned()), handle, format });
    ours.map_err(|_| LevelError::NotOurs)
}

/// The level as it was last set.
#[must_use]
pub fn level() -> Option<String> {
    LOGGING.get().map(|logging| logging.level.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

/// Changes the level.
///
/// # Errors
/// A level that is none.
pub fn set_level(level: &str) -> Result<(), LevelError> {
    let filter = filter(level)?;
    let logging = LOGGING.get().ok_or(LevelError::NotOurs)?;
    logging.handle.reload(filter).map_err(|_| LevelError::NotOurs)?;
    level.clone_into(&mut logging.level.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(())
}

/// Tells whoever started the process, whatever the level is.
pub fn announce(message: &str) {
    match LOGGING.get() {
        Some(Logging { format: Format::Json, .. }) => {
            let line = serde_json::json!({
                "timestamp": humantime::format_rfc3339_micros(std::time::SystemTime::now()).to_string(),
                "level": "INFO",
                "target": "proxy-host",
                "message": message,
            });
            eprintln!("{line}");
        }
        _ => eprintln!("proxy-host: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_filters_are_known_and_words_are_not() {
        for level in ["info", "WARN", "off", "info,h2=debug"] {
            assert!(filter(level).is_ok(), "{level}");
        }
        for level in ["loud", "", "a=b=c"] {
            assert!(matches!(filter(level), Err(LevelError::Unknown(..))), "{level}");
        }
    }
}
