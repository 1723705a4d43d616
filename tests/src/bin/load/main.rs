//! `load`: an origin and clients for measuring a proxy. Each client checks every answer, prints one line of JSON, and
//! counts the CPU time of the process it measures (`--pid`), not its own.

mod bytes;
mod measure;
mod origin;
mod requests;

use std::net::SocketAddr;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answers HTTP/1.1, HTTP/2 and bytes until it is killed; prints its three addresses
    Origin,
    /// Requests over keep-alive connections
    Http1(requests::Options),
    /// Requests over HTTP/2 connections
    Http2(requests::Options),
    /// Connections with one request each
    Connections(requests::Options),
    /// Connections that have made one request and wait, then the process's memory
    Idle(requests::Options),
    /// Bytes to the origin and back
    Tcp(bytes::Options),
}

/// Who is measured, and how it is reached.
#[derive(clap::Args, Clone)]
struct Target {
    /// The proxy
    #[arg(long)]
    proxy: SocketAddr,
    /// Process whose CPU time counts
    #[arg(long)]
    pid: u32,
}

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = tokio::task::LocalSet::new();
    let said = tasks.block_on(&runtime, async {
        match Args::parse().command {
            Command::Origin => origin::run().await,
            Command::Http1(options) => requests::http1(options).await,
            Command::Http2(options) => requests::http2(options).await,
            Command::Connections(options) => requests::connections(options).await,
            Command::Idle(options) => requests::idle(options).await,
            Command::Tcp(options) => bytes::tcp(options).await,
        }
    })?;
    println!("{said}");
    Ok(())
}
