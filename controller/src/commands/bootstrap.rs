//! `portolan bootstrap envoy`

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use portolan_controller::envoy::bootstrap::{Bootstrap as Contents, CONTROLLER, ControllerTls, Limits};
use portolan_controller::envoy::settings::{NoSnapshot, Settings};

/// Print the configuration with which a proxy starts
#[derive(Args)]
pub struct Bootstrap {
    #[command(subcommand)]
    proxy: Proxy,
}

#[derive(Subcommand)]
enum Proxy {
    // Its help stands with its arguments.
    Envoy(Box<Envoy>),
}

const LONG: &str = "\
Prints a complete bootstrap for a stock Envoy (1.40 or later) beside a workload. It says who the workload is, where the \
controller is, and how connections reach Envoy; listeners and clusters come from the controller, so ports may come and \
go while Envoy runs, and a cluster takes memory only after its first request.

Choose at least one way in; they can be combined:
  --transparent PORT    connections that iptables redirects to PORT, with Istio's own rules
  --bind-ports IP       every port of the registry, bound at IP: for names that resolve to IP, without iptables
  --http-proxy IP:PORT  an HTTP proxy, absolute form and CONNECT; the mesh's proxyHttpPort is served as well
  --role gateway        the ports of the Gateway resources that select --labels

Each request is decided by filter.wasm, in one VM on each thread of Envoy. Until the first snapshot has come, and if the \
filter should ever fail, requests are answered with 503 and connections are closed.";

const EXAMPLES: &str = "\
Examples:
  portolan bootstrap envoy --plaintext --controller 127.0.0.1:15010 --filter filter.wasm \\
      --namespace shop --http-proxy 127.0.0.1:15080 > envoy.yaml
  envoy -c envoy.yaml --concurrency 2

  portolan bootstrap envoy --controller portolan.portolan-system:15012 --filter /etc/portolan/filter.wasm \\
      --ca root.pem --cert cert.pem --key key.pem --secrets /run/envoy --namespace shop --name cart-7 \\
      --labels app=cart --ip 10.4.0.7 --transparent 15001

  portolan bootstrap envoy --controller portolan.portolan-system:15012 --filter /etc/portolan/filter.wasm \\
      --ca root.pem --cert cert.pem --key key.pem --namespace istio-system --labels istio=egressgateway \\
      --ip 10.4.0.9 --role gateway";

/// For a stock Envoy with Portolan's filter
#[derive(Args)]
#[command(long_about = LONG, after_long_help = EXAMPLES, after_help = "See --help for the ways in, and examples.")]
struct Envoy {
    /// The controller, as Envoy reaches it
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port, default_value = "127.0.0.1:15010")]
    controller: (String, u16),
    /// Speak to the controller without TLS
    #[arg(long, required_unless_present = "ca", conflicts_with_all = ["ca", "cert", "key"])]
    plaintext: bool,
    /// Authorities of the controller's certificate (PEM file, where Envoy runs)
    #[arg(long, value_name = "FILE")]
    ca: Option<String>,
    /// Envoy's own certificate, for mutual TLS (PEM)
    #[arg(long, value_name = "FILE", requires_all = ["key", "ca"])]
    cert: Option<String>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<String>,
    /// Write to this folder which files hold the certificates, for Envoy to read them again when they are replaced
    /// [without it: only when Envoy starts]
    #[arg(long, value_name = "DIR", requires = "ca")]
    secrets: Option<PathBuf>,
    /// DNS name or SPIFFE URI that the controller's certificate must have [default: the host in --controller]
    #[arg(long, value_name = "NAME", requires = "ca")]
    controller_name: Option<String>,

    /// Where filter.wasm lies when Envoy runs
    #[arg(long, value_name = "FILE")]
    filter: String,
    /// Take connections that iptables redirects to this port
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    transparent: Option<u16>,
    /// Bind every port of the registry at this address
    #[arg(long, value_name = "IP")]
    bind_ports: Option<IpAddr>,
    /// Folder, where Envoy runs, of the secrets that Gateways name (credentialName): NAME/tls.crt, NAME/tls.key and for
    /// clients NAME/ca.crt
    #[arg(long, value_name = "DIR")]
    credentials: Option<String>,
    /// Folder, where Envoy runs, of the mesh's certificates for ISTIO_MUTUAL: cert-chain.pem, key.pem and root-cert.pem.
    /// Without it such traffic is plain text, and a Gateway's clients are refused
    #[arg(long, value_name = "DIR")]
    mesh_certificates: Option<String>,
    /// Be an HTTP proxy at this address; may be given several times
    #[arg(long, value_name = "IP:PORT")]
    http_proxy: Vec<SocketAddr>,

    /// Namespace of the workload: decides what it may see
    #[arg(long, default_value = "default")]
    namespace: String,
    /// Name of the workload, for logs
    #[arg(long, default_value = "envoy")]
    name: String,
    /// Labels of the workload
    #[arg(long, value_name = "K=V,...", value_delimiter = ',', value_parser = label)]
    labels: Vec<(String, String)>,
    /// Address of the workload; several with commas
    #[arg(long, value_name = "IP,...", value_delimiter = ',', default_values_t = [IpAddr::from(Ipv4Addr::LOCALHOST)])]
    ip: Vec<IpAddr>,
    /// Locality of the workload
    #[arg(long, value_name = "REGION/ZONE/SUBZONE", default_value = "")]
    locality: String,
    /// What the proxy stands for
    #[arg(long, value_enum, default_value_t = Role::Sidecar)]
    role: Role,

    /// What to do before the first snapshot has come
    #[arg(long, value_enum, default_value_t = NoSnapshot::Closed)]
    no_snapshot: NoSnapshot,
    /// Write a line for each request and connection to this file
    #[arg(long, value_name = "FILE")]
    access_log: Option<String>,
    /// Envoy's own admin port
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15000")]
    admin: SocketAddr,
    /// Heap that Envoy may use, in MiB; near it connections and then requests are refused
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..))]
    max_heap: u64,
    /// Connections from clients at a time
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    max_connections: u64,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Output::Yaml)]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    /// A workload's own proxy
    Sidecar,
    /// A gateway
    Gateway,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    /// For people
    Yaml,
    /// For programs
    Json,
}

fn host_port(text: &str) -> Result<(String, u16), String> {
    let wrong = || "write HOST:PORT, with an IPv6 address in brackets".to_owned();
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host = match bare {
        Some(host) => host,
        None if host.is_empty() || host.contains(':') => return Err(wrong()),
        None => host,
    };
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("{port:?} is not a port"))?;
    Ok((host.to_owned(), port))
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a label is written key=value".to_owned()),
    }
}

impl Bootstrap {
    /// Prints it.
    pub fn run(self) -> ExitCode {
        let Proxy::Envoy(envoy) = self.proxy;
        let output = envoy.output;
        let secrets = envoy.secrets.clone();
        let contents = envoy.contents();
        let written = contents.and_then(|contents| {
            if let (Some(folder), Some(tls)) = (&secrets, &contents.tls) {
                write_secrets(folder, tls)?;
            }
            Ok(contents.to_json())
        });
        let contents = match written {
            Ok(contents) => contents,
            Err(error) => {
                eprintln!("portolan: {error}");
                return ExitCode::from(2);
            }
        };
        let text = match output {
            Output::Json => format!("{contents:#}\n"),
            Output::Yaml => match serde_yaml_ng::to_string(&contents) {
                Ok(text) => text,
                Err(error) => {
                    eprintln!("portolan: {error}");
                    return ExitCode::FAILURE;
                }
            },
        };
        print!("{text}");
        ExitCode::SUCCESS
    }
}

/// Writes the files that name the certificates, each whole or not at all.
fn write_secrets(folder: &Path, tls: &ControllerTls) -> Result<(), String> {
    let failed = |at: &Path, error: std::io::Error| format!("--secrets: {}: {error}", at.display());
    std::fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
    for (name, secrets) in tls.secret_files() {
        let (path, new) = (folder.join(&name), folder.join(format!(".{name}.new")));
        std::fs::write(&new, format!("{secrets:#}\n")).map_err(|error| failed(&new, error))?;
        std::fs::rename(&new, &path).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}

impl Envoy {
    fn contents(self) -> Result<Contents, String> {
        let ways = self.transparent.is_some() || self.bind_ports.is_some() || !self.http_proxy.is_empty();
        if !ways && self.role == Role::Sidecar {
            eprintln!(
                "portolan: warning: no way in was chosen (--transparent, --bind-ports, --http-proxy): Envoy will listen \
                 only on the mesh's proxyHttpPort, if that is set"
            );
        }
        if self.namespace.is_empty() || self.namespace.contains(['~', '.', '/']) {
            return Err(format!("--namespace {:?} is not the name of a namespace", self.namespace));
        }
        // Envoy may be started elsewhere than this command.
        let absolute = |folder: PathBuf| std::path::absolute(&folder).map_err(|error| format!("--secrets: {error}"));
        let secrets = self.secrets.map(absolute).transpose()?.map(|folder| folder.to_string_lossy().into_owned());
        let tls = self.ca.map(|ca| ControllerTls {
            ca,
            name: self.controller_name.unwrap_or_else(|| self.controller.0.clone()),
            own: self.cert.zip(self.key),
            secrets,
        });
        Ok(Contents {
            kind: if self.role == Role::Gateway { "router" } else { "sidecar" },
            name: self.name,
            namespace: self.namespace,
            labels: self.labels.into_iter().collect(),
            ips: self.ip,
            locality: self.locality,
            controller: self.controller,
            tls,
            mesh_certificates: self.mesh_certificates,
            settings: Settings {
                filter: self.filter,
                controller: CONTROLLER.to_owned(),
                transparent: self.transparent,
                http_proxy: self.http_proxy,
                bind_ports: self.bind_ports,
                credentials: self.credentials,
                no_snapshot: self.no_snapshot,
                access_log: self.access_log,
            },
            admin: self.admin,
            limits: Limits { heap: self.max_heap << 20, connections: self.max_connections },
        })
    }
}
