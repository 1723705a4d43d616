//! `proxy-host`: see `proxy-host --help`.

use std::process::ExitCode;

use clap::Parser as _;
use portolan_proxy_host::{commands, config::Args, logging, run};

/// A request takes some forty allocations, which cost this one a third of what they cost the system's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    if let Some(code) = commands::run(&std::env::args_os().collect::<Vec<_>>()) {
        return code;
    }
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
