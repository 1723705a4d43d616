//! `proxy-host`: see `proxy-host --help`.

use std::{io::IsTerminal as _, process::ExitCode};

use clap::Parser as _;
use portolan_proxy_host::{
    access_log::AccessLog,
    app,
    config::{Args, Config},
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::parse();
    // A bare level is for our own parts; a tracing filter can name any.
    let directives = match args.log_level.parse::<tracing::Level>() {
        Ok(level) => format!("warn,portolan_proxy_host={level},portolan_controller={level},filter={level}"),
        Err(_) => args.log_level.clone(),
    };
    let filter = match EnvFilter::try_new(&directives) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("proxy-host: --log-level {:?}: {error}; write error, warn, info, debug or trace", args.log_level);
            return ExitCode::from(2);
        }
    };
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    let log = if args.access_log { AccessLog::stdout().map(Some) } else { Ok(None) };
    let log = match log {
        Ok(log) => log.unwrap_or_default(),
        Err(error) => {
            eprintln!("proxy-host: {error}");
            return ExitCode::FAILURE;
        }
    };
    match app::run(Config::from(args), log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy-host: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
