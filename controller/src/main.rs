//! `portolan`: the controller's command line.

mod commands;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "portolan",
    version,
    about = "Decides where outbound traffic goes, from Istio's own resources",
    after_help = "Each command explains itself: `portolan serve --help` tells how to serve a fleet, `portolan bootstrap envoy \
                  --help` how to start an Envoy for it, `portolan validate --help` what is checked before, `portolan crds \
                  --help` what a cluster without Istio needs."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    // Its help stands with its arguments.
    Serve(Box<commands::serve::Serve>),
    Bootstrap(commands::bootstrap::Bootstrap),
    Validate(commands::validate::Validate),
    Crds(commands::crds::Crds),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve(command) => command.run(),
        Command::Bootstrap(command) => command.run(),
        Command::Validate(command) => command.run(),
        Command::Crds(command) => command.run(),
    }
}
