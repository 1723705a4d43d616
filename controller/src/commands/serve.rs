//! `portolan serve`

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;
use portolan_controller::embed::{Controller, ControllerConfig};
use portolan_controller::serve::admin::Admin;
use portolan_controller::serve::tcp::{self, TlsFiles};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

const LONG: &str = "\
Reads Istio resources from files and directories (*.yaml, *.yml and *.json, in depth), follows their changes, and serves \
what follows from them to proxies: the registry to filter.wasm, listeners and (when a request first needs them) clusters \
to Envoy and proxy-host. All of it on one port.

A subscriber says which namespace it is in, and sees what that namespace may see. With --tls-client-ca it has to prove it, \
by a certificate with a SPIFFE identity of that namespace; without, it is taken on trust, and the log says so.

A file that cannot be used leaves the last good state in force. Certificates are read again when their files change.";

const EXAMPLES: &str = "\
Examples:
  portolan serve --config mesh-config/ --mesh mesh.yaml
      For proxies on this machine: plain text on 127.0.0.1:15010.

  portolan serve --config mesh-config/ --listen 0.0.0.0:15012 \\
      --tls-cert cert.pem --tls-key key.pem --tls-client-ca root.pem
      For a fleet, each proxy with a certificate.

  curl http://127.0.0.1:15014/            # what the admin port has
  portolan bootstrap envoy --help         # an Envoy to go with it
  proxy-host --controller http://127.0.0.1:15010 --http-proxy 127.0.0.1:15080

Exit status: 0 after SIGTERM or SIGINT, 1 after a failure, 2 for arguments or files that cannot be used.";

/// Serve proxies: the registry to filters, listeners and clusters to Envoy and proxy-host
#[derive(Args)]
#[command(long_about = LONG, after_long_help = EXAMPLES, after_help = "See --help for examples and the exit status.")]
pub struct Serve {
    /// File or directory of Istio resources; may be given several times
    #[arg(long, required = true, value_name = "DIR|FILE")]
    config: Vec<PathBuf>,
    /// Istio's MeshConfig [default: a mesh.yaml among the resources, or Istio's defaults]
    #[arg(long, value_name = "FILE")]
    mesh: Option<PathBuf>,
    /// Where proxies connect to; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15010")]
    listen: SocketAddr,
    /// The controller's certificate chain (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Ask subscribers for a certificate of these authorities (PEM): mutual TLS
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Serve plain text although --listen can be reached from elsewhere: everybody there can read the registry
    #[arg(long, conflicts_with = "tls_cert")]
    insecure_plaintext: bool,
    /// Where /ready, /healthz, /metrics and /config_dump are; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15014")]
    admin: SocketAddr,
    /// Least level of what is logged to standard error: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, default_value = "info")]
    log_level: String,
    /// Log JSON
    #[arg(long)]
    log_json: bool,
}

/// Arguments or files that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unusable(String);

impl Serve {
    /// Serves until a signal comes.
    pub fn run(self) -> ExitCode {
        match self.log().and_then(|()| self.serve()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("portolan: {error:#}");
                ExitCode::from(if error.is::<Unusable>() { 2 } else { 1 })
            }
        }
    }

    fn log(&self) -> anyhow::Result<()> {
        // A bare level is for our own parts; a tracing filter can name any.
        let directives = match self.log_level.parse::<tracing::Level>() {
            Ok(level) => format!("warn,portolan_controller={level},portolan={level}"),
            Err(_) => self.log_level.clone(),
        };
        let filter = EnvFilter::try_new(&directives).map_err(|error| {
            Unusable(format!("--log-level {:?}: {error}; write error, warn, info, debug or trace", self.log_level))
        })?;
        let colours = std::io::stderr().is_terminal();
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
        if self.log_json {
            log.json().init()
        } else {
            log.init()
        }
        Ok(())
    }

    fn tls(&self) -> anyhow::Result<Option<TlsFiles>> {
        let Some((certificate, key)) = self.tls_cert.clone().zip(self.tls_key.clone()) else {
            if !self.listen.ip().is_loopback() && !self.insecure_plaintext {
                let listen = self.listen;
                bail!(Unusable(format!(
                    "--listen {listen} can be reached from elsewhere: give --tls-cert and --tls-key, or say --insecure-plaintext"
                )));
            }
            return Ok(None);
        };
        let files = TlsFiles { certificate, key, client_ca: self.tls_client_ca.clone() };
        // Better now, by name, than when the first proxy connects.
        files.load().map_err(|error| Unusable(error.to_string()))?;
        Ok(Some(files))
    }

    fn serve(self) -> anyhow::Result<()> {
        let tls = self.tls()?;
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async {
            let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            let listener = bind(self.listen, "--listen").await?;
            let pages = bind(self.admin, "--admin").await?;
            if self.tls_client_ca.is_none() {
                tracing::warn!(
                    "subscribers' namespaces are taken on trust: without --tls-client-ca nobody proves who it is"
                );
            }
            let config = ControllerConfig { paths: self.config, mesh: self.mesh };
            let controller = Controller::start(&config).await.map_err(|error| Unusable(error.to_string()))?;
            let admin = Admin::new(controller.clone());
            let (at, admin_at) = (listener.local_addr()?, pages.local_addr()?);
            let routes = admin.router();
            let admin_pages = tokio::spawn(async move { axum::serve(pages, routes).await });
            let stopping = admin.clone();
            let stop = async move {
                tokio::select! {
                    _ = term.recv() => {}
                    _ = int.recv() => {}
                }
                stopping.set_ready(false);
                tracing::info!("stopping");
            };
            let kind = match (&tls, self.tls_client_ca.is_some()) {
                (None, _) => "plain text",
                (Some(_), false) => "TLS",
                (Some(_), true) => "mutual TLS",
            };
            admin.set_ready(true);
            eprintln!("portolan: serving on {at} ({kind}), admin on http://{admin_at}/");
            let served = tcp::serve(&controller, listener, tls, stop).await;
            admin_pages.abort();
            Ok(served?)
        })
    }
}

async fn bind(address: SocketAddr, argument: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{argument} {address}: cannot listen there"))
}
