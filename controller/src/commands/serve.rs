//! `portolan serve`

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use portolan_controller::embed::{Controller, ControllerConfig, MeshSource};
use portolan_controller::serve::admin::Admin;
use portolan_controller::serve::tcp::{self, TlsFiles};
use portolan_controller::serve::webhook::{self, Webhook};
use portolan_controller::source::kubernetes::{self, mesh::MeshMap};
use portolan_controller::status::{self, lease};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tracing_subscriber::EnvFilter;

const LONG: &str = "\
Reads Istio resources from files and directories (*.yaml, *.yml and *.json, in depth) or, with --kubernetes, from the API \
server of a cluster, follows their changes, and serves what follows from them to proxies: the registry to filter.wasm, listeners and (when a request first needs them) clusters \
to Envoy and proxy-host. All of it on one port.

A subscriber says which namespace it is in, and sees what that namespace may see. With --tls-client-ca it has to prove it, \
by a certificate with a SPIFFE identity of that namespace; without, it is taken on trust, and the log says so.

A file or resource that cannot be used leaves the last good state in force; so does an API server that goes away. A \
cluster is served once every kind was listed: /ready says when. Certificates are read again when their files change.";

const EXAMPLES: &str = "\
Examples:
  portolan serve --config mesh-config/ --mesh mesh.yaml
      For proxies on this machine: plain text on 127.0.0.1:15010.

  portolan serve --config mesh-config/ --listen 0.0.0.0:15012 \\
      --tls-cert cert.pem --tls-key key.pem --tls-client-ca root.pem
      For a fleet, each proxy with a certificate.

  portolan serve --kubernetes --kubeconfig ~/.kube/config --context prod
      For the ServiceEntries and the rest that this cluster holds.

  curl http://127.0.0.1:15014/            # what the admin port has
  portolan bootstrap envoy --help         # an Envoy to go with it
  proxy-host --controller http://127.0.0.1:15010 --http-proxy 127.0.0.1:15080

Exit status: 0 after SIGTERM or SIGINT, 1 after a failure, 2 for arguments or files that cannot be used.";

/// Serve proxies: the registry to filters, listeners and clusters to Envoy and proxy-host
#[derive(Args)]
#[command(long_about = LONG, after_long_help = EXAMPLES, after_help = "See --help for examples and the exit status.")]
pub struct Serve {
    /// File or directory of Istio resources; may be given several times
    #[arg(long, required_unless_present = "kubernetes", value_name = "DIR|FILE")]
    config: Vec<PathBuf>,
    /// Watch the resources of a Kubernetes cluster instead: the one this runs in, or that of a kubeconfig
    #[arg(long, conflicts_with = "config")]
    kubernetes: bool,
    /// The cluster's kubeconfig [default: KUBECONFIG, ~/.kube/config, then the pod's service account]
    #[arg(long, value_name = "FILE", requires = "kubernetes")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME", requires = "kubernetes")]
    context: Option<String>,
    /// Istio's MeshConfig [default: a mesh.yaml among the resources, or Istio's defaults]
    #[arg(long, value_name = "FILE")]
    mesh: Option<PathBuf>,
    /// The ConfigMap of the cluster with istiod's MeshConfig under the key `mesh`, instead of --mesh; without a value
    /// istio-system/istio
    #[arg(long, value_name = "NAMESPACE/NAME", num_args = 0..=1, require_equals = true,
          default_missing_value = "istio-system/istio", requires = "kubernetes", conflicts_with = "mesh")]
    mesh_config_map: Option<MeshMap>,
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
    /// Answer an API server's validating admission webhook here, at /validate, over TLS; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", requires = "kubernetes")]
    webhook: Option<SocketAddr>,
    /// Write into `status` what is wrong with resources, which others are in their way, and the addresses allocated to
    /// ServiceEntries without any; of several controllers one does, who holds the Lease
    #[arg(long, requires = "kubernetes")]
    write_status: bool,
    /// The Lease by which one controller is chosen
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "portolan-system/portolan", value_parser = lease_name, requires = "kubernetes")]
    lease: (String, String),
    /// The webhook's own certificate chain (PEM) [default: --tls-cert]
    #[arg(long, value_name = "FILE", requires = "webhook", requires = "webhook_key")]
    webhook_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", requires = "webhook_cert")]
    webhook_key: Option<PathBuf>,
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

/// How long giving up the Lease may take.
const GIVE_UP: Duration = Duration::from_secs(2);

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
            // What fails in watching a cluster is told once by us, and by the client library over and over.
            Ok(level) => {
                format!("warn,kube_client=off,kube_runtime=error,portolan_controller={level},portolan={level}")
            }
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

    /// Where the webhook is, and its certificates.
    fn webhook(&self, tls: Option<&TlsFiles>) -> anyhow::Result<Option<(SocketAddr, TlsFiles)>> {
        let Some(address) = self.webhook else { return Ok(None) };
        let own = self.webhook_cert.clone().zip(self.webhook_key.clone());
        let files = own.or_else(|| tls.map(|files| (files.certificate.clone(), files.key.clone())));
        let Some((certificate, key)) = files else {
            bail!(Unusable("--webhook: API servers speak TLS only: give --webhook-cert and --webhook-key".into()));
        };
        let files = TlsFiles { certificate, key, client_ca: None };
        files.load().map_err(|error| Unusable(error.to_string()))?;
        Ok(Some((address, files)))
    }

    fn serve(self) -> anyhow::Result<()> {
        let tls = self.tls()?;
        let webhook = self.webhook(tls.as_ref())?;
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async {
            let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            let pages = bind(self.admin, "--admin").await?;
            if self.tls_client_ca.is_none() {
                tracing::warn!(
                    "subscribers' namespaces are taken on trust: without --tls-client-ca nobody proves who it is"
                );
            }
            let unusable = |error: &dyn std::fmt::Display| Unusable(error.to_string());
            let mut writing = None;
            let (controller, listed) = if self.kubernetes {
                let client = kubernetes::connect(self.kubeconfig.as_deref(), self.context.as_deref()).await;
                let client = client.map_err(|error| unusable(&error))?;
                let mesh = match (self.mesh, self.mesh_config_map) {
                    (Some(file), _) => MeshSource::File(file),
                    (None, Some(map)) => MeshSource::Map(map),
                    (None, None) => MeshSource::Defaults,
                };
                let (controller, listed) = Controller::of_cluster(&client, &mesh).map_err(|error| unusable(&error))?;
                if self.write_status {
                    writing = write_status(&client, &controller, self.lease.clone());
                }
                (controller, Some(listed))
            } else {
                let config = ControllerConfig { paths: self.config, mesh: self.mesh };
                (Controller::start(&config).await.map_err(|error| unusable(&error))?, None)
            };
            let admin = Admin::new(controller.clone());
            let admin_at = pages.local_addr()?;
            let routes = admin.router();
            let admin_pages = tokio::spawn(async move { axum::serve(pages, routes).await });
            if let Some((address, files)) = webhook {
                let listener = bind(address, "--webhook").await?;
                eprintln!("portolan: webhook on https://{}/validate", listener.local_addr()?);
                let known = controller.cluster().map(|cluster| cluster.resources.clone());
                let webhook = Webhook::new(known, controller.counters().clone());
                tokio::spawn(async move {
                    if let Err(error) = webhook::serve(webhook, listener, files).await {
                        tracing::error!(%error, "the webhook has ended");
                    }
                });
            }
            if let Some(listed) = listed {
                eprintln!("portolan: listing the cluster, admin on http://{admin_at}/");
                tokio::select! {
                    listed = listed.wait() => listed?,
                    _ = term.recv() => return Ok(()),
                    _ = int.recv() => return Ok(()),
                }
            }
            // Not before there is something to serve: a proxy that is refused asks another controller.
            let listener = bind(self.listen, "--listen").await?;
            let at = listener.local_addr()?;
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
            if let Some(writing) = writing {
                writing.stop().await;
            }
            Ok(served?)
        })
    }
}

fn lease_name(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("write NAMESPACE/NAME".into()),
    }
}

/// The tasks that write status.
struct Writing {
    writer: JoinHandle<()>,
    election: JoinHandle<()>,
}

impl Writing {
    /// Ends, and leaves the Lease to another controller.
    async fn stop(self) {
        self.writer.abort();
        // With the writer goes the last one who asks who leads.
        let _ = self.writer.await;
        let _ = tokio::time::timeout(GIVE_UP, self.election).await;
    }
}

/// Stands for the Lease, and writes while it is held.
fn write_status(
    client: &kube::Client,
    controller: &Controller,
    (namespace, name): (String, String),
) -> Option<Writing> {
    let cluster = controller.cluster()?;
    // A pod's host name is its name; the number tells two processes of one host apart.
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let identity = format!("{}_{}", host.trim(), std::process::id());
    let (leads, election) = lease::follow(client.clone(), lease::Candidate { namespace, name, identity });
    let (resources, findings) = (cluster.resources.clone(), cluster.findings.clone());
    let writer = status::write(client.clone(), controller.publisher().clone(), resources, findings, leads);
    Some(Writing { writer: tokio::spawn(writer), election })
}

async fn bind(address: SocketAddr, argument: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{argument} {address}: cannot listen there"))
}
