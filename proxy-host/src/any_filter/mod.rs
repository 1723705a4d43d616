//! Runs any proxy-wasm filter, HTTP or network, in front of one upstream, as Envoy 1.40 would run it.
//!
//! | part | does |
//! |---|---|
//! | [`host`] | keeps a thread's VM, and wakes streams that wait for their filter |
//! | [`outside`] | what the VM asks for: log, timers, calls |
//! | [`http`], [`pump`], [`tcp`] | carry requests, their bodies, and connections past the filter's callbacks |
//! | [`client`], [`calls`] | the upstream, and the clusters that a filter calls |
//! | [`attributes`] | properties by Envoy's names |
//!
//! Nothing of it is on the path of Portolan's own filter, which has neither bodies nor calls of this kind.

pub mod attributes;
pub mod body;
pub mod calls;
pub mod client;
pub mod host;
pub mod http;
pub mod outside;
pub mod pump;
pub mod tcp;

use std::{
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use socket2::Socket;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::LocalSet,
};

use crate::{
    admin::filter::FilterAdmin,
    exec,
    listener::{self, Kind, server::HttpLimits},
    stats::{self, DownstreamOpen, Recorder, Stats, WorkerStats},
    vm::{Engine, EngineError, Limits, LogLevel, PluginConfig, PluginKind, Shared, StartError, VmConfig},
};
use attributes::{Connection, UPSTREAM_CLUSTER};
use client::{Address, Cluster, Clusters};
use host::Host;
use outside::Outside;

/// A callback may run this long. Envoy sets no limit; this one only ends what would never end.
const DEADLINE: Duration = Duration::from_secs(10);
/// Connections have this long to end when the process is to end.
const DRAIN: Duration = Duration::from_secs(5);
/// Of which kind the one listener is counted; the admin port tells the sum of all kinds.
const KIND: Kind = Kind::Gateway;
/// Pause after the system refused to accept, as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// What to run, and where.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The module's bytes.
    pub wasm: Vec<u8>,
    /// Name for `plugin_name` and `plugin_vm_id`.
    pub name: String,
    /// `root_id` of the plugin.
    pub root_id: String,
    /// For `proxy_on_configure`.
    pub configuration: Bytes,
    /// For `proxy_on_vm_start`.
    pub vm_configuration: Bytes,
    /// A network filter, and not an HTTP filter.
    pub network: bool,
    /// Where clients connect to.
    pub listen: SocketAddr,
    /// Where they are led.
    pub upstream: Address,
    /// What the filter may call, by name.
    pub clusters: Vec<(String, Address)>,
    /// What clients may ask over HTTP.
    pub http: HttpLimits,
    /// Silence that ends a connection of a network filter; zero for no limit.
    pub tcp_idle: Duration,
    /// Least level of the filter's log.
    pub log_level: LogLevel,
    /// Threads, each with a VM of its own.
    pub threads: usize,
}

/// Why a filter does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The file is no module of this ABI.
    #[error("{0}; build it for wasm32-wasip1 with a proxy-wasm SDK")]
    Engine(#[from] EngineError),
    /// The module does not start.
    #[error("the filter does not start: {0}; its own log above may say more")]
    Start(#[from] StartError),
    /// The address is taken, or not ours.
    #[error("cannot listen on {address}: {error}; is another process using it, or is the port below 1024?")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        error: io::Error,
    },
    /// No threads, no runtime.
    #[error("{0}")]
    System(#[from] io::Error),
    /// A thread is gone.
    #[error("a worker thread ended; the log above says why")]
    Thread,
}

/// One thread's state.
pub struct Proxy {
    /// The filter.
    pub host: Rc<Host>,
    /// Where clients are led.
    pub upstream: Rc<Cluster>,
    /// All clusters by name, the upstream among them.
    pub clusters: Rc<Clusters>,
    /// What clients may ask over HTTP.
    pub limits: HttpLimits,
    /// Silence that ends a connection of a network filter; zero for no limit.
    pub tcp_idle: Duration,
    /// Counts what clients do.
    pub recorder: Rc<Recorder>,
    /// Turns true when the process is to end.
    pub stop: watch::Receiver<bool>,
}

/// A filter that runs in this process. It ends when this is dropped.
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    stats: Arc<Stats>,
    log_level: watch::Sender<LogLevel>,
    stop: watch::Sender<bool>,
    workers: Vec<JoinHandle<()>>,
}

impl Running {
    /// Starts the filter; returns when it is configured and listens.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(settings: Settings) -> Result<Self, RunError> {
        let engine = Engine::compile(&settings.wasm)?;
        let failed = |error| RunError::Bind { address: settings.listen, error };
        let first = listener::bind(settings.listen).map_err(failed)?;
        // Port 0 becomes a real one with the first socket.
        let address = first.local_addr().map_err(failed)?.as_socket().unwrap_or(settings.listen);
        let mut sockets = vec![first];
        for _ in 1..settings.threads {
            sockets.push(listener::bind(address).map_err(failed)?);
        }
        let (stop, stopped) = watch::channel(false);
        let (report, reports) = std::sync::mpsc::channel();
        let shared = Arc::new(Shared::default());
        let stats = Arc::new(Stats::new(settings.threads));
        let log_level = watch::Sender::new(settings.log_level);
        let mut running =
            Self { address, shared: shared.clone(), stats: stats.clone(), log_level, stop, workers: Vec::new() };
        let settings = Arc::new(settings);
        let threads = sockets.len();
        for (index, socket) in sockets.into_iter().enumerate() {
            let work = Work {
                index,
                engine: engine.clone(),
                settings: settings.clone(),
                shared: shared.clone(),
                stats: stats.worker(index),
                log_level: running.log_level.subscribe(),
                socket,
                stop: stopped.clone(),
                report: report.clone(),
            };
            let name = format!("filter-{index}");
            running.workers.push(thread::Builder::new().name(name).spawn(move || work.run())?);
        }
        drop(report);
        for _ in 0..threads {
            reports.recv().map_err(|_| RunError::Thread)??;
        }
        Ok(running)
    }

    /// What an admin port tells of it.
    #[must_use]
    pub fn admin(&self) -> FilterAdmin {
        let (filter, stats) = (self.shared.clone(), self.stats.clone());
        FilterAdmin { filter, stats, log_level: self.log_level.clone(), stop: self.stop.subscribe() }
    }

    /// Whether all threads still run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.workers.iter().all(|worker| !worker.is_finished())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so.
            let _ = worker.join();
        }
    }
}

struct Work {
    index: usize,
    engine: Engine,
    settings: Arc<Settings>,
    shared: Arc<Shared>,
    stats: Arc<WorkerStats>,
    log_level: watch::Receiver<LogLevel>,
    socket: Socket,
    stop: watch::Receiver<bool>,
    report: std::sync::mpsc::Sender<Result<(), RunError>>,
}

impl Work {
    fn run(self) {
        let report = self.report.clone();
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                // Whoever started us waits for exactly this.
                let _ = report.send(Err(error.into()));
                return;
            }
        };
        if let Err(error) = LocalSet::new().block_on(&runtime, self.serve()) {
            let _ = report.send(Err(error));
        }
    }

    async fn serve(self) -> Result<(), RunError> {
        let Self { index, engine, settings, shared, stats, log_level, socket, mut stop, report } = self;
        let named: Vec<_> = (settings.clusters.iter().cloned())
            .chain([(UPSTREAM_CLUSTER.to_owned(), settings.upstream.clone())])
            .collect();
        let clusters = Rc::new(Clusters::new(&named));
        let upstream = clusters.get(UPSTREAM_CLUSTER).ok_or(RunError::Thread)?;
        let kind = if settings.network { PluginKind::Network } else { PluginKind::Http };
        let plugin = PluginConfig {
            name: settings.name.clone(),
            root_id: settings.root_id.clone(),
            configuration: settings.configuration.clone(),
            kind,
        };
        let config = VmConfig {
            vm_id: String::new(),
            vm_configuration: settings.vm_configuration.clone(),
            plugins: vec![plugin],
            limits: Limits { deadline: DEADLINE, ..Limits::default() },
            shared,
            queue_waker: None,
        };
        let host = Host::start(engine, config, Rc::new(Outside::new(clusters.clone(), log_level)))?;
        let address = settings.listen;
        let listener = listener::listen(socket).map_err(|error| RunError::Bind { address, error })?;
        let (limits, tcp_idle) = (settings.http, settings.tcp_idle);
        let recorder = Rc::new(Recorder::new(stats));
        let proxy = Rc::new(Proxy { host, upstream, clusters, limits, tcp_idle, recorder, stop: stop.clone() });
        // Whoever started us may have given up.
        let _ = report.send(Ok(()));
        accept(proxy.clone(), listener, settings.network, index).await;
        let _ = stop.wait_for(|stop| *stop).await;
        let end = tokio::time::Instant::now() + DRAIN;
        // Whatever still goes on holds the proxy.
        while Rc::strong_count(&proxy) > 1 && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        proxy.host.shutdown();
        Ok(())
    }
}

async fn accept(proxy: Rc<Proxy>, listener: TcpListener, network: bool, index: usize) {
    let mut stop = proxy.stop.clone();
    let mut number = 0;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, source)) => {
                // Only costs latency where it cannot be set.
                let _ = stream.set_nodelay(true);
                let Ok(destination) = stream.local_addr() else { continue };
                proxy.recorder.stats.accepted[stats::of(KIND)].add(1);
                let id = (index as u64) << 48 | number;
                number += 1;
                exec::spawn(connection(proxy.clone(), Connection { id, source, destination }, stream, network));
            }
            Err(error) => {
                proxy.recorder.stats.accept_failures.add(1);
                tracing::warn!("accept: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(proxy: Rc<Proxy>, connection: Connection, stream: TcpStream, network: bool) {
    let _open = DownstreamOpen::new(&proxy.recorder.stats, KIND);
    if network {
        tcp::serve(proxy, connection, stream).await;
        return;
    }
    let time = proxy.limits.header_time;
    let Some((http2, client)) = listener::version(proxy.stop.clone(), stream, time).await else { return };
    http::serve(proxy, connection, client, http2).await;
}
