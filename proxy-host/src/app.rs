//! The threads of a proxy, their start and their end.
//!
//! | thread | does |
//! |---|---|
//! | main | waits for signals |
//! | `admin` | answers on the admin port |
//! | `control` | controller (embedded or remote), discovery, DNS of clusters |
//! | `worker-N` | accepts, asks the filter, carries traffic; owns all that it touches |
//! | `access-log` | writes lines |

use std::{
    cell::RefCell,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use socket2::Socket;
use tokio::{
    runtime::{Builder, LocalOptions, Runtime},
    sync::{mpsc, watch},
    task::LocalSet,
};
use tonic::transport::Channel;

use crate::{
    access_log::{AccessLog, WorkerLog},
    admin, ads,
    config::{Config, Identity, Role, Source},
    control,
    dns::Resolver,
    dns_proxy::{self, names::Names},
    exec,
    filter::{Filter, HTTP_ROOT, TCP_ROOT},
    filter_env::Calls,
    inherited::{Inherited, InheritedError},
    listener::{self, Kind},
    stats::Stats,
    vm::{self, EngineError, PluginConfig, PluginKind, StartError, VmConfig},
    worker::Worker,
};

/// How long workers wait for their first snapshot before they listen without one (the filter then answers 503).
const FIRST_SNAPSHOT: Duration = Duration::from_secs(3);

/// Why a proxy does not start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// Nothing to listen on.
    #[error(
        "nothing to listen on: give --transparent, --http-proxy, --role gateway, or a mesh file with proxyHttpPort"
    )]
    NoListener,
    /// A file that cannot be read.
    #[error("{path}: {error}; check the path and its permissions", path = .path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// The configuration as a whole cannot be used.
    #[error("configuration: {0}")]
    Config(String),
    /// An address that cannot be listened on.
    #[error("cannot listen on {address}: {error}; is another process using it, or is the port below 1024?")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        error: io::Error,
    },
    /// The address of the controller is none.
    #[error("--controller {0:?} is not an address; write http://HOST:PORT or https://HOST:PORT")]
    Controller(String),
    /// The filter does not load.
    #[error("filter: {0}")]
    Engine(#[from] EngineError),
    /// The filter does not start.
    #[error("filter: {0}")]
    Filter(#[from] StartError),
    /// No threads, no runtime, no signals.
    #[error("{0}")]
    System(#[from] io::Error),
    /// A socket that systemd passed cannot be used.
    #[error(transparent)]
    Inherited(#[from] InheritedError),
    /// A thread ended before it should.
    #[error("thread {0} ended; its log says why")]
    Thread(String),
}

impl AppError {
    /// Exit status: 2 where arguments or files are at fault, 1 otherwise.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoListener | Self::Inherited(_) | Self::File { .. } | Self::Config(_) | Self::Controller(_) => 2,
            _ => 1,
        }
    }
}

enum Report {
    Listening,
    Ready,
    Ended,
    Failed(AppError),
}

/// A proxy that runs in this process.
pub struct App {
    /// Where the transparent listener is.
    pub transparent: Option<SocketAddr>,
    /// Where the HTTP proxy listeners are.
    pub http_proxies: Vec<SocketAddr>,
    /// Where the admin listener is.
    pub admin: Option<SocketAddr>,
    gateway: bool,
    /// Where DNS is answered.
    pub dns: Option<SocketAddr>,
    stop: watch::Sender<bool>,
    end: watch::Sender<bool>,
    reload: mpsc::UnboundedSender<()>,
    reports: mpsc::UnboundedReceiver<Report>,
    workers: Vec<JoinHandle<()>>,
    waiting: usize,
    running: usize,
}

impl App {
    /// Starts the threads; returns when all workers listen.
    ///
    /// # Errors
    /// Something of the settings cannot be used.
    pub fn start(config: Config, log: AccessLog) -> Result<Self, AppError> {
        Self::start_with(config, log, Inherited::default())
    }

    /// The same with sockets that are open already.
    ///
    /// # Errors
    /// Something of the settings cannot be used.
    pub fn start_with(config: Config, log: AccessLog, inherited: Inherited) -> Result<Self, AppError> {
        if let Source::Files { paths, mesh } = &config.source {
            for path in paths.iter().chain(mesh) {
                readable(path).map_err(|error| AppError::File { path: path.clone(), error })?;
            }
        }
        let mut sockets = Sockets::default();
        for listener in inherited.transparent {
            sockets.inherit(Kind::Transparent, &listener, config.threads)?;
        }
        for listener in inherited.http_proxy {
            sockets.inherit(Kind::HttpProxy, &listener, config.threads)?;
        }
        if let Some(address) = config.transparent {
            sockets.add(Kind::Transparent, address, config.threads)?;
        }
        for address in &config.http_proxies {
            sockets.add(Kind::HttpProxy, *address, config.threads)?;
        }
        let admin = match (inherited.admin.into_iter().next(), config.admin) {
            (Some(listener), _) => Some(listener),
            (None, Some(address)) => {
                Some(std::net::TcpListener::bind(address).map_err(|error| AppError::Bind { address, error })?)
            }
            (None, None) => None,
        };
        let (needs, needed) = mpsc::unbounded_channel();
        let (reload, reloads) = mpsc::unbounded_channel();
        let (questions, asked) = mpsc::unbounded_channel();
        let (to_workers, from_control): (Vec<_>, Vec<_>) =
            (0..config.threads).map(|_| mpsc::unbounded_channel()).unzip();
        let (stop, stopped) = watch::channel(false);
        let (end, ended) = watch::channel(false);
        let inputs = ControlInputs { needs: needed, reloads, questions: asked, workers: to_workers };
        let Started { channel, proxy_http_port, controller, dns } = start_control(config.clone(), inputs)?;
        if let Some(port) = proxy_http_port
            && !sockets.addresses(Kind::HttpProxy).iter().any(|a| a.port() == port)
        {
            sockets.add(Kind::HttpProxy, SocketAddr::from((Ipv4Addr::LOCALHOST, port)), config.threads)?;
        }
        if sockets.bound.is_empty() && config.identity.role != Role::Gateway {
            return Err(AppError::NoListener);
        }
        let (transparent, http_proxies) =
            (sockets.addresses(Kind::Transparent).first().copied(), sockets.addresses(Kind::HttpProxy));
        let engine = vm::embedded::filter()?;
        let (report, reports) = mpsc::unbounded_channel();
        let mut workers = Vec::new();
        let plugins = plugins(&config.identity, log.is_on());
        let stats = Arc::new(Stats::new(config.threads));
        let shared = Arc::<vm::Shared>::default();
        let admin = match admin {
            Some(listener) => Some(admin::start(
                listener,
                admin::Admin {
                    config: config.clone(),
                    listeners: (transparent, http_proxies.clone()),
                    stats: stats.clone(),
                    filter: shared.clone(),
                    controller,
                    questions,
                    stop: stopped.clone(),
                },
            )?),
            None => None,
        };
        for (index, (messages, sockets)) in from_control.into_iter().zip(sockets.by_worker(config.threads)).enumerate()
        {
            let start = Start {
                index,
                config: config.clone(),
                engine: engine.clone(),
                vm: VmConfig {
                    vm_id: "portolan".into(),
                    plugins: plugins.clone(),
                    shared: shared.clone(),
                    ..VmConfig::default()
                },
                channel: channel.clone(),
                log: log.clone(),
                needs: needs.clone(),
                stats: stats.clone(),
                stop: stopped.clone(),
                end: ended.clone(),
                report: report.clone(),
            };
            let name = format!("worker-{index}");
            workers.push(thread::Builder::new().name(name).spawn(move || work(start, messages, sockets))?);
        }
        let waiting = workers.len();
        let running = waiting;
        let gateway = config.identity.role == Role::Gateway;
        let mut app = Self {
            transparent,
            http_proxies,
            admin,
            dns,
            gateway,
            stop,
            end,
            reload,
            reports,
            workers,
            waiting,
            running,
        };
        let mut listening = 0;
        while listening < app.workers.len() {
            match app.reports.blocking_recv() {
                Some(Report::Listening) => listening += 1,
                Some(Report::Ready) => app.waiting -= 1,
                Some(Report::Ended) => app.running -= 1,
                Some(Report::Failed(error)) => return Err(error),
                None => return Err(AppError::Thread("worker".into())),
            }
        }
        Ok(app)
    }

    /// Waits until the filter of each worker has its snapshot.
    ///
    /// # Errors
    /// A worker ended.
    pub async fn ready(&mut self) -> Result<(), AppError> {
        while self.waiting > 0 {
            match self.reports.recv().await {
                Some(Report::Ready) => self.waiting -= 1,
                Some(Report::Listening) => {}
                Some(Report::Ended) => self.running -= 1,
                Some(Report::Failed(error)) => return Err(error),
                None => return Err(AppError::Thread("worker".into())),
            }
        }
        Ok(())
    }

    /// Waits until a worker fails.
    pub async fn failed(&mut self) -> AppError {
        loop {
            match self.reports.recv().await {
                Some(Report::Failed(error)) => return error,
                Some(_) => {}
                None => return AppError::Thread("worker".into()),
            }
        }
    }

    /// Has the configuration read again.
    pub fn reload(&self) {
        // Where the control thread has ended, a worker has failed too.
        let _ = self.reload.send(());
    }

    /// Stops accepting, and tells clients that no more requests are taken.
    pub fn drain(&self) {
        if !*self.stop.borrow() {
            self.stop.send_replace(true);
        }
    }

    /// Waits until all connections have ended, or the time for that is over.
    pub async fn drained(&mut self) {
        while self.running > 0 {
            match self.reports.recv().await {
                Some(Report::Ended | Report::Failed(_)) => self.running -= 1,
                Some(_) => {}
                None => return,
            }
        }
    }

    /// Where it listens, and how many workers it has.
    #[must_use]
    pub fn describe(&self) -> String {
        let transparent = self.transparent.map(|a| format!("transparent on {a}"));
        let proxies = self.http_proxies.iter().map(|a| format!("HTTP proxy on {a}"));
        let admin = self.admin.map(|a| format!("admin on {a}"));
        let gateway = self.gateway.then(|| "the ports of its Gateways".to_owned());
        let dns = self.dns.map(|a| format!("DNS on {a}"));
        let listeners: Vec<_> = gateway.into_iter().chain(transparent).chain(proxies).chain(dns).chain(admin).collect();
        format!("{}, {} worker threads", listeners.join(", "), self.workers.len())
    }

    /// Stops accepting, lets connections end for as long as they may, and ends the threads.
    pub fn stop(mut self) {
        self.drain();
        self.join();
    }

    fn join(&mut self) {
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so.
            let _ = worker.join();
        }
    }
}

impl Drop for App {
    /// Ends the threads at once.
    fn drop(&mut self) {
        self.end.send_replace(true);
        self.drain();
        self.join();
    }
}

fn readable(path: &PathBuf) -> io::Result<()> {
    if fs::metadata(path)?.is_dir() { fs::read_dir(path).map(|_| ()) } else { fs::File::open(path).map(|_| ()) }
}

/// Sockets bound to the same addresses, one of each for each worker.
#[derive(Default)]
struct Sockets {
    bound: Vec<(Kind, SocketAddr, Vec<Socket>)>,
}

impl Sockets {
    fn add(&mut self, kind: Kind, address: SocketAddr, workers: usize) -> Result<(), AppError> {
        let failed = |error| AppError::Bind { address, error };
        let first = listener::bind(address).map_err(failed)?;
        // Port 0 becomes a real one with the first socket.
        let own = first.local_addr().map_err(failed)?.as_socket().unwrap_or(address);
        let mut sockets = vec![first];
        for _ in 1..workers {
            sockets.push(listener::bind(own).map_err(failed)?);
        }
        self.bound.push((kind, own, sockets));
        Ok(())
    }

    /// A socket that is open already; workers share it.
    fn inherit(&mut self, kind: Kind, listener: &std::net::TcpListener, workers: usize) -> Result<(), AppError> {
        let address = listener.local_addr()?;
        let failed = |error| AppError::Bind { address, error };
        listener.set_nonblocking(true).map_err(failed)?;
        let socket = || listener.try_clone().map(Socket::from);
        let sockets = (0..workers).map(|_| socket()).collect::<Result<_, _>>().map_err(failed)?;
        self.bound.push((kind, address, sockets));
        Ok(())
    }

    fn addresses(&self, kind: Kind) -> Vec<SocketAddr> {
        self.bound.iter().filter(|bound| bound.0 == kind).map(|bound| bound.1).collect()
    }

    fn by_worker(self, workers: usize) -> Vec<Vec<(Kind, Socket)>> {
        let mut out: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
        for (kind, _, sockets) in self.bound {
            for (worker, socket) in out.iter_mut().zip(sockets) {
                worker.push((kind, socket));
            }
        }
        out
    }
}

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// What the control thread hears.
struct ControlInputs {
    needs: mpsc::UnboundedReceiver<control::Need>,
    reloads: mpsc::UnboundedReceiver<()>,
    questions: mpsc::UnboundedReceiver<control::Question>,
    workers: Vec<mpsc::UnboundedSender<control::ToWorker>>,
}

/// What the control thread has made.
struct Started {
    channel: Channel,
    proxy_http_port: Option<u16>,
    controller: Option<admin::ControllerState>,
    dns: Option<SocketAddr>,
}

/// Starts the control thread.
fn start_control(config: Config, inputs: ControlInputs) -> Result<Started, AppError> {
    let ControlInputs { needs, mut reloads, questions, workers } = inputs;
    let (started, start) = std::sync::mpsc::sync_channel(1);
    thread::Builder::new().name("control".into()).spawn(move || {
        let runtime = match runtime() {
            Ok(runtime) => runtime,
            Err(error) => {
                // The receiver waits for exactly this.
                let _ = started.send(Err(AppError::System(error)));
                return;
            }
        };
        LocalSet::new().block_on(&runtime, async move {
            let controller = match crate::controller::connect(&config.source, config.controller_tls.as_ref()).await {
                Ok(controller) => controller,
                Err(error) => {
                    let _ = started.send(Err(error));
                    return;
                }
            };
            let dns = match config.dns {
                Some(address) => match dns_proxy::Sockets::bind(address).await.and_then(|s| Ok((s.address()?, s))) {
                    Ok(bound) => Some(bound),
                    Err(error) => {
                        let _ = started.send(Err(AppError::Bind { address, error }));
                        return;
                    }
                },
                None => None,
            };
            let channel = controller.channel.clone();
            let state = controller.embedded().map(|embedded| admin::ControllerState {
                counters: embedded.counters().clone(),
                sources: embedded.status().clone(),
            });
            let _ = started.send(Ok(Started {
                channel: channel.clone(),
                proxy_http_port: controller.proxy_http_port,
                controller: state,
                dns: dns.as_ref().map(|(address, _)| *address),
            }));
            exec::spawn(async move {
                while reloads.recv().await.is_some() {
                    controller.reload();
                }
                // It lives until the process ends: requests that are under way may still need it.
                std::future::pending::<()>().await;
            });
            let (wanted, names) = mpsc::unbounded_channel();
            let (update, updates) = mpsc::unbounded_channel();
            exec::spawn(ads::run(channel, config.identity, names, update));
            let resolver = Resolver::new(&config.name_servers);
            let names = match dns {
                Some((_, sockets)) => {
                    let others = dns_proxy::Others::new(&config.name_servers);
                    let names = Rc::new(RefCell::new(Names::new(others.search.as_deref())));
                    exec::spawn(dns_proxy::serve(sockets, names.clone(), others));
                    names
                }
                None => Rc::default(),
            };
            control::run(needs, updates, wanted, workers, questions, resolver, names).await;
        });
    })?;
    start.recv().map_err(|_| AppError::Thread("control".into()))?
}

/// The filter's two plugins; their configuration says who the workload is.
fn plugins(identity: &Identity, report_decisions: bool) -> Vec<PluginConfig> {
    let role = match identity.role {
        Role::Sidecar => "sidecar",
        Role::Gateway => "gateway",
    };
    let mut configuration = serde_json::json!({
        "namespace": identity.namespace,
        "labels": identity.labels,
        "role": role,
        "ips": identity.ips,
        "dns_capture": identity.dns_capture,
        "report_decisions": report_decisions,
        "subscriber": ads::node(identity).id,
    });
    if !identity.locality.is_empty() {
        configuration["locality"] = identity.locality.clone().into();
    }
    let configuration = Bytes::from(configuration.to_string());
    let plugin = |root_id: &str, kind| PluginConfig {
        name: root_id.into(),
        root_id: root_id.into(),
        configuration: configuration.clone(),
        kind,
    };
    vec![plugin(HTTP_ROOT, PluginKind::Http), plugin(TCP_ROOT, PluginKind::Network)]
}

/// What a worker's thread is given.
struct Start {
    index: usize,
    config: Config,
    engine: vm::Engine,
    vm: VmConfig,
    channel: Channel,
    log: AccessLog,
    needs: mpsc::UnboundedSender<control::Need>,
    stats: Arc<Stats>,
    stop: watch::Receiver<bool>,
    end: watch::Receiver<bool>,
    report: mpsc::UnboundedSender<Report>,
}

fn work(start: Start, messages: mpsc::UnboundedReceiver<control::ToWorker>, sockets: Vec<(Kind, Socket)>) {
    let report = start.report.clone();
    let say = |what| {
        // Where nobody listens any more, the process is about to end.
        let _ = report.send(what);
    };
    // Its tasks are the runtime's own, where a `LocalSet` would be a second scheduler within it.
    let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => runtime,
        Err(error) => return say(Report::Failed(error.into())),
    };
    start.stats.worker(start.index).install();
    // Tasks that have not ended by then are dropped with the runtime, and write their lines of the access log.
    let ended = {
        let runtime = runtime;
        runtime.block_on(serve(start, messages, sockets))
    };
    say(ended.map_or_else(Report::Failed, |()| Report::Ended));
}

async fn serve(
    start: Start,
    messages: mpsc::UnboundedReceiver<control::ToWorker>,
    sockets: Vec<(Kind, Socket)>,
) -> Result<(), AppError> {
    let Start { index, config, engine, vm, channel, log, needs, stats, mut stop, mut end, report } = start;
    let say = |what| {
        // As in `work`.
        let _ = report.send(what);
    };
    let (acknowledged, mut snapshot) = mpsc::unbounded_channel();
    let filter = Filter::start(engine, vm, Rc::new(Calls::new(channel, index, acknowledged)))?;
    let log = WorkerLog::new(log, stats.worker(index));
    exec::spawn(log.clone().run());
    let worker = Rc::new(Worker::new(index, filter, log, Rc::new(config), needs, stop.clone(), stats));
    let mut plans = worker.plans_changed();
    exec::spawn(worker.clone().listen(messages));
    let first = async {
        let _ = snapshot.recv().await;
        let _ = plans.changed().await;
    };
    let mut first = std::pin::pin!(first);
    let early = tokio::time::timeout(FIRST_SNAPSHOT, first.as_mut()).await.is_ok();
    for (kind, socket) in sockets {
        let address = socket.local_addr().ok().and_then(|a| a.as_socket());
        let address = address.unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
        let listener = listener::listen(socket).map_err(|error| AppError::Bind { address, error })?;
        exec::spawn(listener::accept(worker.clone(), listener, kind));
    }
    let mut ports = listener::gateway::Ports::default();
    ports.follow(&worker);
    exec::spawn(ports.run(worker.clone()));
    say(Report::Listening);
    if !early {
        tracing::warn!(worker = index, "no configuration from the controller yet; requests are refused until it comes");
        tokio::select! {
            () = first => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }
    worker.log.stats().ready.add(1);
    say(Report::Ready);
    // The sender lives as long as the application.
    let _ = stop.wait_for(|stop| *stop).await;
    tokio::select! {
        () = worker.idle() => {}
        () = tokio::time::sleep(worker.config.drain) => {}
        _ = end.wait_for(|end| *end) => {}
    }
    Ok(())
}
