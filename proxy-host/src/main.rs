//! `proxy-host`: see `proxy-host --help`.

use std::process::ExitCode;

use clap::Parser as _;
use portolan_proxy_host::{config::Args, logging, run};

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = logging::start(&args.log_level, args.log_format) {
        eprintln!("proxy-host: --log-level: {error}");
        return ExitCode::from(2);
    }
    match run::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::announce(&error.to_string());
            ExitCode::from(error.exit_code())
        }
    }
}
