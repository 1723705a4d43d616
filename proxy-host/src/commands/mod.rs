//! What `proxy-host` does when its first argument is a command's name. Without one it is the proxy itself.

pub mod filter;

use std::process::ExitCode;

use clap::Parser as _;

use crate::capture::Capture;

/// Runs the command that the arguments (the program's name first) name; `None` where they name none, and are the
/// proxy's own.
#[must_use]
pub fn run(args: &[std::ffi::OsString]) -> Option<ExitCode> {
    let name = args.get(1)?.to_str()?;
    // Each command sees itself as `proxy-host NAME`.
    let own = || args.iter().skip(1).cloned();
    match name {
        "capture" => Some(Capture::parse_from(own()).run()),
        "filter" => Some(filter::run(filter::Args::parse_from(own()))),
        _ => None,
    }
}
