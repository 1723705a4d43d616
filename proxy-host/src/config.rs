//! The command line, and the settings it becomes.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Parser, ValueEnum};
use tokio::net::TcpStream;

use crate::controller_tls::ControllerTls;

use crate::{access_log, listener::server::HttpLimits, logging};

/// A small proxy that sends each connection and request where Istio's ServiceEntry resources say.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "proxy-host",
    version,
    about,
    after_help = "Examples:
  proxy-host --config examples/quickstart --http-proxy 127.0.0.1:15080
      Reads the Istio resources in examples/ and offers an HTTP proxy. Try it with
      curl -x http://127.0.0.1:15080 http://hello.example.com/

  proxy-host --config mesh/ --mesh mesh.yaml --transparent 0.0.0.0:15001 --admin 127.0.0.1:15000
      Takes connections that iptables redirects (`proxy-host capture apply` makes the rules), and
      answers questions about itself: curl http://127.0.0.1:15000/

  proxy-host --controller http://portolan.istio-system:15010 --namespace shop --transparent 0.0.0.0:15001
      The same with a controller that runs elsewhere.

  proxy-host --config mesh/ --role gateway --namespace istio-system --labels istio=egressgateway
      A gateway: listens on the ports of the Gateway resources that select these labels.

  proxy-host capture --help
      Makes the rules that bring a workload's connections to --transparent.

  proxy-host filter --help
      Runs any proxy-wasm filter in front of one upstream.

Files may change at any time: the change is in effect a moment later, and a file that cannot be used leaves the last
good state in force. SIGHUP reads all of them again. SIGTERM and SIGINT end the proxy: it stops accepting, lets what is
under way end for --drain-time, and leaves; the second signal ends it at once.

Exit status: 0 after SIGTERM or SIGINT, 1 after a failure, 2 for arguments or files that cannot be used."
)]
pub struct Args {
    /// File or folder of Istio resources (YAML or JSON); may be given several times
    #[arg(long, value_name = "DIR|FILE", help_heading = CONFIGURATION)]
    pub config: Vec<PathBuf>,
    /// Istio's MeshConfig, as a YAML file
    #[arg(long, value_name = "FILE", help_heading = CONFIGURATION)]
    pub mesh: Option<PathBuf>,
    /// Address of a controller to use instead of files, as http://HOST:PORT or https://HOST:PORT
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["config", "mesh"], required_unless_present = "config", value_parser = controller, help_heading = CONFIGURATION)]
    pub controller: Option<String>,
    /// Authorities of the controller's certificate (PEM), for https
    #[arg(long, value_name = "FILE", requires = "controller", conflicts_with = "config", help_heading = CONFIGURATION)]
    pub controller_ca: Option<PathBuf>,
    /// Own certificate (PEM), for a controller that asks who is there
    #[arg(long, value_name = "FILE", requires_all = ["controller_ca", "controller_key"], help_heading = CONFIGURATION)]
    pub controller_cert: Option<PathBuf>,
    /// Private key of the own certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "controller_cert", help_heading = CONFIGURATION)]
    pub controller_key: Option<PathBuf>,
    /// Name that the controller's certificate must have, where it is not the host of its address
    #[arg(long, value_name = "NAME", requires = "controller_ca", help_heading = CONFIGURATION)]
    pub controller_name: Option<String>,

    /// Listen here for connections that iptables redirected (see `proxy-host capture --help`)
    #[arg(long, value_name = "IP:PORT", help_heading = LISTENERS)]
    pub transparent: Option<SocketAddr>,
    /// Listen here as an HTTP proxy (absolute form and CONNECT); the mesh's proxyHttpPort is served as well
    #[arg(long, value_name = "IP:PORT", help_heading = LISTENERS)]
    pub http_proxy: Option<SocketAddr>,
    /// Folder of the secrets that Gateways name (credentialName): NAME/tls.crt, NAME/tls.key and for clients NAME/ca.crt
    #[arg(long, value_name = "DIR", help_heading = LISTENERS)]
    pub credentials: Option<PathBuf>,
    /// Folder of the mesh's certificates for ISTIO_MUTUAL: cert-chain.pem, key.pem and root-cert.pem, read again when they
    /// change. Without it such traffic is plain text, and a Gateway's clients are refused
    #[arg(long, value_name = "DIR", help_heading = WORKLOAD)]
    pub mesh_certificates: Option<String>,
    /// Answer here about the proxy itself: /ready, /healthz, /metrics, /config_dump, /clusters, /logging. Whoever can
    /// reach it can read the configuration and change the log's level: keep it on loopback
    #[arg(long, value_name = "IP:PORT", help_heading = LISTENERS)]
    pub admin: Option<SocketAddr>,
    /// Answer DNS questions here, over UDP and TCP: names of the registry with its own addresses (ServiceEntries without
    /// addresses get some, so that TCP services on one port can be told apart), all others as the name servers say. Port 53
    /// of the workload is to be redirected to it, as Istio does with ISTIO_META_DNS_CAPTURE; customarily 127.0.0.1:15053
    #[arg(long, value_name = "IP:PORT", help_heading = LISTENERS)]
    pub dns: Option<SocketAddr>,

    /// Namespace of the workload that this proxy stands for
    #[arg(long, default_value = "default", help_heading = WORKLOAD)]
    pub namespace: String,
    /// Labels of the workload, as key=value,...
    #[arg(long, value_name = "K=V,...", value_delimiter = ',', value_parser = label, help_heading = WORKLOAD)]
    pub labels: Vec<(String, String)>,
    /// Address of the workload; several with commas
    #[arg(long, value_delimiter = ',', default_value = "127.0.0.1", help_heading = WORKLOAD)]
    pub ip: Vec<IpAddr>,
    /// Locality of the workload, as region/zone/subzone
    #[arg(long, value_name = "R/Z/S", default_value = "", help_heading = WORKLOAD)]
    pub locality: String,
    /// What the proxy stands for
    #[arg(long, value_enum, default_value_t = Role::Sidecar, help_heading = WORKLOAD)]
    pub role: Role,

    /// Name servers to ask, in place of those in /etc/resolv.conf
    #[arg(long, value_name = "IP[:PORT],...", value_delimiter = ',', value_parser = name_server, help_heading = OPERATION)]
    pub name_server: Vec<SocketAddr>,
    /// Worker threads; as many as there are cores where it is not given
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = OPERATION)]
    pub threads: Option<u16>,
    /// Most client connections at a time; one more is refused, an HTTP proxy's client with a 503. Where it is not given:
    /// what the limit of open files suffices for (the soft limit is raised to the hard one)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = OPERATION)]
    pub max_connections: Option<u32>,
    /// Limits of HTTP
    #[command(flatten)]
    pub http: HttpArgs,
    /// How long a TCP connection may go without a byte either way before both of its sides are closed, where no
    /// DestinationRule says so (connectionPool.tcp.idleTimeout). 0s: as long as it likes
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration, help_heading = OPERATION)]
    pub tcp_idle_timeout: Duration,
    /// How long connections get to end after SIGTERM; HTTP clients are told at once (`connection: close`, GOAWAY)
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration, help_heading = OPERATION)]
    pub drain_time: Duration,
    /// What to write to standard output for each request and connection
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = access_log::Format::Text, default_missing_value = "text", num_args = 0..=1, help_heading = OPERATION)]
    pub access_log: access_log::Format,
    /// How the log on standard error looks
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = logging::Format::Text, help_heading = OPERATION)]
    pub log_format: logging::Format,
    /// Least level of what is logged: error, warn, info, debug, trace, or a tracing filter such as info,h2=debug. The
    /// admin port changes it at run time
    #[arg(long, default_value = "info", help_heading = OPERATION)]
    pub log_level: String,
}

/// What clients may ask over HTTP; also of `proxy-host filter`.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Limits of HTTP (the defaults are Envoy's)")]
pub struct HttpArgs {
    /// Most headers of a request; one more is answered with 431
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_headers: u16,
    /// Most KiB of a request's headers; more are answered with 431
    #[arg(long, value_name = "KIB", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub max_header_kib: u32,
    /// Most requests at a time on one HTTP/2 connection
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_streams: u32,
    /// How long a client may take from the first byte of a request to the end of its headers, as 10s; after that it is
    /// answered with 408 (HTTP/1.1) or left with a GOAWAY (HTTP/2). 0s: as long as it likes
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    pub request_headers_timeout: Duration,
    /// Take requests of HTTP/1.0, which are answered with 426 otherwise, as under Istio without ISTIO_META_HTTP10
    #[arg(long)]
    pub accept_http_10: bool,
    /// How long a request may go without a byte either way, before its answer or within it: then it is answered with
    /// 408, or 504 once the client has said all, or reset where its answer has begun. 0s: as long as it likes, which is
    /// the default, as under Istio; of `proxy-host filter` it is 5m, as of Envoy
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub stream_idle_timeout: Option<Duration>,
    /// How long a client's connection may go without a request before it is closed. 0s: as long as it likes
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    pub connection_idle_timeout: Duration,
}

impl HttpArgs {
    /// The limits; `stream_idle` is the time of silence on a stream where nothing else is said.
    #[must_use]
    pub fn limits(self, stream_idle: Duration) -> HttpLimits {
        HttpLimits {
            header_bytes: self.max_header_kib * 1024,
            headers: self.max_headers.into(),
            streams: self.max_streams,
            header_time: self.request_headers_timeout,
            http10: self.accept_http_10,
            stream_idle: self.stream_idle_timeout.unwrap_or(stream_idle),
            connection_idle: self.connection_idle_timeout,
        }
    }
}

const CONFIGURATION: &str = "Configuration (one of --config and --controller)";
const LISTENERS: &str =
    "Listeners (at least one, or --role gateway; systemd may pass them as transparent, http-proxy, admin)";
const WORKLOAD: &str = "The workload, which decides what is visible";
const OPERATION: &str = "Operation";

/// What a proxy stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// A workload's own proxy.
    Sidecar,
    /// A gateway: it listens on the ports of the Gateway resources that select its labels.
    Gateway,
}

/// Who the proxy stands for; decides which objects it sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Namespace.
    pub namespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Addresses.
    pub ips: Vec<IpAddr>,
    /// region/zone/subzone, or empty.
    pub locality: String,
    /// Sidecar or gateway.
    pub role: Role,
    /// Its names are resolved here, so that allocated addresses count.
    pub dns_capture: bool,
    /// Folder of the mesh's certificates.
    pub mesh_certificates: Option<String>,
}

/// Where the configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Files, read by a controller in this process.
    Files {
        /// Files and folders of Istio resources.
        paths: Vec<PathBuf>,
        /// MeshConfig.
        mesh: Option<PathBuf>,
    },
    /// A controller elsewhere, as a URI.
    Controller(String),
}

/// Tells where a redirected connection was meant to go.
pub type OriginalDestination = fn(&TcpStream) -> io::Result<SocketAddr>;

/// All settings of one proxy.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the configuration comes from.
    pub source: Source,
    /// TLS towards a controller elsewhere.
    pub controller_tls: Option<ControllerTls>,
    /// Transparent listener.
    pub transparent: Option<SocketAddr>,
    /// HTTP proxy listeners.
    pub http_proxies: Vec<SocketAddr>,
    /// Admin listener.
    pub admin: Option<SocketAddr>,
    /// Folder of secrets.
    pub credentials: Option<PathBuf>,
    /// Listener for DNS; goes with [`Identity::dns_capture`].
    pub dns: Option<SocketAddr>,
    /// Who the proxy stands for.
    pub identity: Identity,
    /// What clients may ask over HTTP.
    pub http: HttpLimits,
    /// Silence that ends a TCP connection; zero for no limit.
    pub tcp_idle: Duration,
    /// Most client connections at a time.
    pub max_connections: usize,
    /// Name servers to ask in place of those in `resolv.conf`.
    pub name_servers: Vec<SocketAddr>,
    /// Worker threads, at least 1.
    pub threads: usize,
    /// Time that a request waits for a cluster.
    pub cluster_timeout: Duration,
    /// Time that connections get to end after a signal.
    pub drain: Duration,
    /// How the transparent listener learns destinations; the kernel's answer unless a test says otherwise.
    pub original_destination: OriginalDestination,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a label is written key=value".to_owned()),
    }
}

/// A controller's address as a URI.
fn controller(text: &str) -> Result<String, String> {
    let wrong = || "a controller is written http://HOST:PORT or https://HOST:PORT, for example http://10.0.0.1:15010";
    let has_scheme = text.contains("://");
    let address = if has_scheme { text.to_owned() } else { format!("http://{text}") };
    let uri: http::Uri = address.parse().map_err(|_| wrong())?;
    let is_known = matches!(uri.scheme_str(), Some("http" | "https"));
    // A bare word may well be a file that was meant for another option.
    if is_known && (has_scheme || uri.port().is_some()) { Ok(address) } else { Err(wrong().into()) }
}

fn name_server(text: &str) -> Result<SocketAddr, String> {
    let alone = || text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
    text.parse()
        .or_else(|_| alone())
        .map_err(|_| "a name server is written 192.0.2.1, 192.0.2.1:53 or [fd00::1]:53".into())
}

impl Config {
    /// Settings for these files and everything else by default.
    #[must_use]
    pub fn of_files(paths: Vec<PathBuf>) -> Self {
        Self {
            source: Source::Files { paths, mesh: None },
            controller_tls: None,
            transparent: None,
            http_proxies: Vec::new(),
            admin: None,
            credentials: None,
            http: HttpLimits::default(),
            tcp_idle: Duration::from_secs(3600),
            max_connections: usize::MAX,
            name_servers: Vec::new(),
            identity: Identity {
                namespace: "default".into(),
                labels: BTreeMap::new(),
                ips: vec![Ipv4Addr::LOCALHOST.into()],
                locality: String::new(),
                role: Role::Sidecar,
                dns_capture: false,
                mesh_certificates: None,
            },
            dns: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            cluster_timeout: Duration::from_secs(5),
            drain: Duration::from_secs(5),
            original_destination: crate::listener::original_destination,
        }
    }
}

impl From<Args> for Config {
    fn from(args: Args) -> Self {
        let mut config = Self::of_files(Vec::new());
        config.source = match args.controller {
            Some(address) => Source::Controller(address),
            None => Source::Files { paths: args.config, mesh: args.mesh },
        };
        let own = args.controller_cert.zip(args.controller_key);
        config.controller_tls = args.controller_ca.map(|ca| ControllerTls { ca, own, name: args.controller_name });
        config.transparent = args.transparent;
        config.http_proxies = args.http_proxy.into_iter().collect();
        config.admin = args.admin;
        config.credentials = args.credentials;
        config.name_servers = args.name_server;
        config.drain = args.drain_time;
        config.http = args.http.limits(Duration::ZERO);
        config.tcp_idle = args.tcp_idle_timeout;
        if let Some(most) = args.max_connections {
            config.max_connections = usize::try_from(most).unwrap_or(usize::MAX);
        }
        config.identity = Identity {
            namespace: args.namespace,
            labels: args.labels.into_iter().collect(),
            ips: args.ip,
            locality: args.locality,
            role: args.role,
            dns_capture: args.dns.is_some(),
            mesh_certificates: args.mesh_certificates,
        };
        config.dns = args.dns;
        if let Some(threads) = args.threads {
            config.threads = usize::from(threads);
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Config, clap::Error> {
        Args::try_parse_from([&["proxy-host"], args].concat()).map(Config::from)
    }

    #[test]
    fn arguments_become_settings() {
        let config = parse(&["--config", "a", "--config", "b", "--labels", "app=web,v=1", "--threads", "3"]).unwrap();
        assert_eq!(config.source, Source::Files { paths: vec!["a".into(), "b".into()], mesh: None });
        assert_eq!(config.identity.labels["v"], "1");
        assert_eq!(config.threads, 3);
        assert!(!config.identity.dns_capture);
        assert!(parse(&["--config", "a", "--dns", "127.0.0.1:15053"]).unwrap().identity.dns_capture);
        assert_eq!(parse(&["--controller", "c:1"]).unwrap().source, Source::Controller("http://c:1".into()));
    }

    #[test]
    fn the_access_log_is_text_unless_something_else_is_said() {
        use access_log::Format::{Json, Off, Text};
        for (args, format) in [
            (&[][..], Text),
            (&["--access-log"], Text),
            (&["--access-log=true"], Text),
            (&["--access-log=false"], Off),
            (&["--access-log", "json"], Json),
            (&["--access-log=off"], Off),
        ] {
            let parsed = Args::try_parse_from([&["proxy-host", "--config", "a"], args].concat()).unwrap();
            assert_eq!(parsed.access_log, format, "{args:?}");
        }
    }

    #[test]
    fn limits_are_read() {
        let config = parse(&["--config", "a", "--drain-time", "1m", "--max-connections", "7"]).unwrap();
        assert_eq!((config.drain, config.max_connections), (Duration::from_secs(60), 7));
        let servers = parse(&["--config", "a", "--name-server", "::1,192.0.2.1:5353"]).unwrap().name_servers;
        assert_eq!(servers, ["[::1]:53".parse().unwrap(), "192.0.2.1:5353".parse().unwrap()]);
    }

    #[test]
    fn bad_usage_is_refused() {
        for args in [
            &[][..],
            &["--config", "a", "--controller", "b:1"],
            &["--controller", "b"],
            &["--controller", "ftp://b:1"],
            &["--controller", "http://"],
            &["--config", "a", "--controller-ca", "b"],
            &["--controller", "https://a", "--controller-ca", "b", "--controller-cert", "c"],
            &["--config", "a", "--labels", "x"],
            &["--config", "a", "--threads", "0"],
            &["--config", "a", "--max-connections", "0"],
            &["--config", "a", "--drain-time", "5"],
            &["--config", "a", "--access-log", "xml"],
        ] {
            assert_eq!(parse(args).unwrap_err().exit_code(), 2, "{args:?}");
        }
    }
}
