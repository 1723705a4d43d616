//! `proxy-host`: see `proxy-host --help`.

use std::process::ExitCode;

use clap::Parser as _;
use portolan_proxy_host::{
    access_log::AccessLog,
    app,
    config::{Args, Config},
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = match EnvFilter::try_new(&args.log_level) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("proxy-host: --log-level {:?}: {error}; write error, warn, info, debug or trace", args.log_level);
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
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
