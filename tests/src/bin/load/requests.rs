//! Healthy clients: requests one after the other on each connection or stream.

use std::{
    cell::RefCell,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, body::Bytes, client::conn::http2};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use crate::{
    Target, measure,
    origin::{BODY, Local},
};

#[derive(clap::Args, Clone)]
pub struct Options {
    #[command(flatten)]
    pub target: Target,
    /// Host that is asked for
    #[arg(long, default_value = "bench.example.com")]
    pub host: String,
    /// Connections (HTTP/2: streams of one connection) at a time
    #[arg(long, default_value_t = 32)]
    pub concurrency: usize,
    /// Seconds before it counts
    #[arg(long, default_value_t = 1.0)]
    pub warm: f64,
    /// Seconds that count
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
}

/// Latencies of requests that have begun since the warming up.
pub type Latencies = Rc<RefCell<Vec<Duration>>>;

/// A keep-alive connection.
pub struct Client {
    stream: TcpStream,
    request: Vec<u8>,
    buffer: Vec<u8>,
}

impl Client {
    pub async fn connect(options: &Options) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(options.target.proxy).await?;
        stream.set_nodelay(true)?;
        let request = format!(
            "GET http://{0}/path?query=1 HTTP/1.1\r\nhost: {0}\r\nuser-agent: load/1\r\naccept: */*\r\n\
             accept-encoding: gzip, br\r\naccept-language: en\r\ncookie: session=0123456789abcdef\r\n\r\n",
            options.host
        );
        Ok(Self { stream, request: request.into_bytes(), buffer: Vec::with_capacity(4096) })
    }

    /// One request and its whole answer.
    pub async fn ask(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(&self.request).await?;
        self.buffer.clear();
        loop {
            ensure!(self.stream.read_buf(&mut self.buffer).await? > 0, "the connection ended");
            if self.buffer.ends_with(BODY) {
                break;
            }
            ensure!(self.buffer.len() < 4096, "{}", String::from_utf8_lossy(&self.buffer));
        }
        ensure!(self.buffer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&self.buffer));
        Ok(())
    }
}

/// Runs these clients, each on its own, until the time is over, and says what they came to.
async fn run<F>(options: &Options, clients: Vec<F>, latencies: Latencies) -> anyhow::Result<Value>
where
    F: Future<Output = anyhow::Result<()>> + 'static,
{
    let mut tasks = JoinSet::new();
    for client in clients {
        tasks.spawn_local(client);
    }
    tokio::time::sleep(Duration::from_secs_f64(options.warm)).await;
    latencies.borrow_mut().clear();
    let (cpu, start) = (measure::cpu(options.target.pid)?, Instant::now());
    tokio::select! {
        ended = tasks.join_next() => ended.context("no clients")???,
        () = tokio::time::sleep(Duration::from_secs_f64(options.seconds)) => {}
    }
    let (spent, seconds) = (measure::cpu(options.target.pid)? - cpu, start.elapsed().as_secs_f64());
    let mut latencies = latencies.take();
    ensure!(!latencies.is_empty(), "no answers");
    #[expect(clippy::cast_precision_loss)]
    let (spent, count) = (spent as f64, latencies.len() as f64);
    Ok(json!({
        "cpu_us_per_request": spent / 1e3 / count,
        "requests_per_second": count / seconds,
        "p50_ms": measure::quantile(&mut latencies, 0.5).as_secs_f64() * 1e3,
        "p99_ms": measure::quantile(&mut latencies, 0.99).as_secs_f64() * 1e3,
        "memory_mb": measure::memory(options.target.pid)? / 1_000_000,
    }))
}

pub async fn http1(options: Options) -> anyhow::Result<Value> {
    let latencies = Latencies::default();
    let clients = (0..options.concurrency).map(|_| {
        let (options, latencies) = (options.clone(), latencies.clone());
        async move {
            let mut client = Client::connect(&options).await?;
            loop {
                let start = Instant::now();
                client.ask().await?;
                latencies.borrow_mut().push(start.elapsed());
            }
        }
    });
    run(&options, clients.collect(), latencies.clone()).await
}

pub async fn http2(options: Options) -> anyhow::Result<Value> {
    let latencies = Latencies::default();
    let stream = TcpStream::connect(options.target.proxy).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http2::handshake(Local, TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    let clients = (0..options.concurrency).map(|_| {
        let (options, latencies, mut sender) = (options.clone(), latencies.clone(), sender.clone());
        async move {
            loop {
                let request = Request::get(format!("http://{}/path?query=1", options.host))
                    .header("user-agent", "load/1")
                    .header("accept", "*/*")
                    .header("accept-encoding", "gzip, br")
                    .header("accept-language", "en")
                    .header("cookie", "session=0123456789abcdef")
                    .body(Empty::<Bytes>::new())?;
                let start = Instant::now();
                let response = sender.send_request(request).await?;
                ensure!(response.status() == 200, "{}", response.status());
                ensure!(response.into_body().collect().await?.to_bytes() == BODY);
                latencies.borrow_mut().push(start.elapsed());
            }
        }
    });
    run(&options, clients.collect(), latencies.clone()).await
}

pub async fn connections(options: Options) -> anyhow::Result<Value> {
    let latencies = Latencies::default();
    let clients = (0..options.concurrency).map(|_| {
        let (options, latencies) = (options.clone(), latencies.clone());
        async move {
            loop {
                let start = Instant::now();
                let mut client = Client::connect(&options).await?;
                client.ask().await?;
                latencies.borrow_mut().push(start.elapsed());
                // Closed by a reset, so that no port stays occupied.
                client.stream.set_zero_linger()?;
            }
        }
    });
    run(&options, clients.collect(), latencies.clone()).await
}

pub async fn idle(options: Options) -> anyhow::Result<Value> {
    let before = measure::memory(options.target.pid)?;
    let mut clients = Vec::new();
    for number in 0..options.concurrency {
        let mut client =
            Client::connect(&options).await.with_context(|| format!("connection {number} of the idle ones"))?;
        client.ask().await?;
        clients.push(client);
    }
    let after = measure::memory(options.target.pid)?;
    for client in &mut clients {
        client.ask().await?;
    }
    Ok(json!({"connections": clients.len(), "memory_mb": after / 1_000_000, "before_mb": before / 1_000_000}))
}
