//! Bytes through a proxied connection, from the origin or to it.

use std::time::Instant;

use anyhow::ensure;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{Target, measure};

/// Bytes that a client or the origin moves at once.
pub const CHUNK: usize = 256 * 1024;

#[derive(clap::Args, Clone)]
pub struct Options {
    #[command(flatten)]
    target: Target,
    /// Bytes in all
    #[arg(long, default_value_t = 2_000_000_000)]
    bytes: usize,
    /// Send them instead of receiving them
    #[arg(long)]
    up: bool,
}

pub async fn tcp(options: Options) -> anyhow::Result<Value> {
    let mut stream = TcpStream::connect(options.target.proxy).await?;
    let mut buffer = vec![0; CHUNK];
    let (cpu, start) = (measure::cpu(options.target.pid)?, Instant::now());
    let mut moved = 0;
    if options.up {
        stream.write_all(b">").await?;
        while moved < options.bytes {
            stream.write_all(&buffer).await?;
            moved += buffer.len();
        }
        stream.shutdown().await?;
        let mut end = Vec::new();
        stream.read_to_end(&mut end).await?;
        ensure!(end == b"end", "the origin did not see the end: {end:?}");
    } else {
        stream.write_all(b"<").await?;
        while moved < options.bytes {
            let n = stream.read(&mut buffer).await?;
            ensure!(n > 0, "ended after {moved} bytes");
            moved += n;
        }
    }
    let (spent, seconds) = (measure::cpu(options.target.pid)? - cpu, start.elapsed().as_secs_f64());
    #[expect(clippy::cast_precision_loss)]
    let (spent, moved) = (spent as f64, moved as f64);
    Ok(json!({"cpu_seconds_per_gigabyte": spent / moved, "gigabytes_per_second": moved / 1e9 / seconds}))
}
