//! `portolan`: the controller's command line.

mod commands;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "portolan",
    version,
    about = "Decides where outbound traffic goes, from Istio's own resources",
    after_help = "Try `portolan validate --help` for what is checked and how to read the findings."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    // Its help stands with its arguments.
    Validate(commands::validate::Validate),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Validate(command) => command.run(),
    }
}
