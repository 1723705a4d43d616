//! `proxy-host capture`: the kernel's rules that bring a workload's connections to the transparent port.
//!
//! Flags are called as in Istio's `istio-iptables`, or as its annotations `traffic.sidecar.istio.io/…` are; what they
//! mean, and in which order they count, is Istio's as well.

mod rules;
mod tool;

use std::{net::IpAddr, process::ExitCode};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

pub use rules::{Family, Ranges, Rules};
pub use tool::ToolError;

const EXAMPLES: &str = "\
Which connections are captured; the first line that fits decides:
  1. not those through --istio-exclude-interfaces, nor to --istio-local-outbound-ports-exclude
  2. not those of the proxy itself (--proxy-uid, --proxy-gid), nor those on the loopback interface
  3. not those to --istio-service-exclude-cidr
  4. those to --istio-outbound-ports
  5. those to --istio-service-cidr; with * (the default) all that are left

What is not captured is dialled directly, as if there were no proxy. Only TCP is captured, only what this network
namespace sends, IPv4 and IPv6.

Examples:
  proxy-host capture print --istio-service-exclude-cidr 10.0.0.0/8,fd00::/8
  proxy-host capture apply --proxy-uid 1337
  setpriv --reuid 1337 --regid 1337 --clear-groups proxy-host --config mesh/ --transparent '[::]:15001'
  proxy-host capture remove

The proxy has to run as --proxy-uid, and nothing else may: its own connections are told from the others by it. To
apply and remove needs root or CAP_NET_ADMIN. Exit status: 0 done, 1 the system refused, 2 bad usage.";

/// Make, show or remove the rules that redirect outbound connections to the transparent port
#[derive(Debug, Clone, Parser)]
#[command(name = "capture", bin_name = "proxy-host capture", after_help = EXAMPLES)]
pub struct Capture {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Action {
    /// Show the rules and change nothing
    Print,
    /// Put the rules in force, in place of those of an earlier run
    Apply,
    /// Take the rules away; not an error where there are none
    Remove,
}

/// The program that talks to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tool {
    /// iptables and ip6tables
    Iptables,
    /// nft
    Nft,
}

#[derive(Debug, Clone, Args)]
struct Settings {
    /// Port of the transparent listener
    #[arg(long, short = 'p', global = true, value_name = "PORT", default_value_t = 15001, visible_alias = "port", value_parser = clap::value_parser!(u16).range(1..))]
    envoy_port: u16,
    /// User ids of the proxy, whose connections are left alone
    #[arg(long, short = 'u', global = true, value_name = "UID,...", value_delimiter = ',', default_value = "1337")]
    proxy_uid: Vec<u32>,
    /// Group ids of the proxy, whose connections are left alone
    #[arg(long, short = 'g', global = true, value_name = "GID,...", value_delimiter = ',')]
    proxy_gid: Vec<u32>,
    /// Ranges to capture, or * for all
    #[arg(
        long,
        short = 'i',
        global = true,
        value_name = "CIDR,...",
        default_value = "*",
        visible_alias = "include-outbound-ip-ranges"
    )]
    istio_service_cidr: Ranges,
    /// Ranges to leave alone, even within those to capture
    #[arg(long, short = 'x', global = true, value_name = "CIDR,...", value_delimiter = ',', value_parser = range, visible_alias = "exclude-outbound-ip-ranges")]
    istio_service_exclude_cidr: Vec<IpNet>,
    /// Ports to capture whatever the address is
    #[arg(
        long,
        short = 'q',
        global = true,
        value_name = "PORT,...",
        value_delimiter = ',',
        visible_alias = "include-outbound-ports"
    )]
    istio_outbound_ports: Vec<u16>,
    /// Ports to leave alone whatever the address is
    #[arg(
        long,
        short = 'o',
        global = true,
        value_name = "PORT,...",
        value_delimiter = ',',
        visible_alias = "exclude-outbound-ports"
    )]
    istio_local_outbound_ports_exclude: Vec<u16>,
    /// Network interfaces to leave alone
    #[arg(long, short = 'c', global = true, value_name = "NAME,...", value_delimiter = ',', value_parser = interface, visible_alias = "exclude-interfaces")]
    istio_exclude_interfaces: Vec<String>,
    /// What to make the rules with; where it is not given, what is installed, iptables first
    #[arg(long, global = true, value_enum)]
    tool: Option<Tool>,
}

/// A range; an address alone is a range of one.
fn range(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| format!("{text:?} is no range of addresses; write 10.0.0.0/8, 192.0.2.1 or fd00::/8"))
}

fn interface(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-@+".contains(c);
    match text {
        "" => Err("an interface has a name, such as eth1".into()),
        text if text.len() > 15 || !text.chars().all(fits) => Err(format!("{text:?} is no name of an interface")),
        text => Ok(text.to_owned()),
    }
}

impl std::str::FromStr for Ranges {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "*" {
            return Ok(Self::All);
        }
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(range).collect::<Result<_, _>>().map(Self::These)
    }
}

impl Capture {
    /// Runs it.
    #[must_use]
    pub fn run(self) -> ExitCode {
        let rules = Rules::from(self.settings.clone());
        let done = match self.action {
            Action::Print => {
                print!("{}", tool::text(self.settings.tool.unwrap_or_else(tool::installed), &rules));
                Ok(())
            }
            Action::Apply => tool::apply(self.settings.tool.unwrap_or_else(tool::installed), &rules),
            Action::Remove => tool::remove(self.settings.tool),
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("proxy-host capture: {error}");
                ExitCode::FAILURE
            }
        }
    }
}

impl From<Settings> for Rules {
    fn from(settings: Settings) -> Self {
        Self {
            port: settings.envoy_port,
            uids: settings.proxy_uid,
            gids: settings.proxy_gid,
            include: settings.istio_service_cidr,
            exclude: settings.istio_service_exclude_cidr,
            include_ports: settings.istio_outbound_ports,
            exclude_ports: settings.istio_local_outbound_ports_exclude,
            exclude_interfaces: settings.istio_exclude_interfaces,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_ports_are_checked() {
        let parse = |args: &[&str]| Capture::try_parse_from([&["capture"], args].concat());
        let good =
            parse(&["print", "-x", "10.0.0.1/8,fd00::1", "-i", "*", "--exclude-outbound-ports", "22,25"]).unwrap();
        let expected: Vec<IpNet> = vec!["10.0.0.0/8".parse().unwrap(), "fd00::1/128".parse().unwrap()];
        assert_eq!(good.settings.istio_service_exclude_cidr, expected);
        assert_eq!(good.settings.istio_service_cidr, Ranges::All);
        assert_eq!(good.settings.istio_local_outbound_ports_exclude, [22, 25]);
        for bad in [&[][..], &["print", "-x", "10.0.0.0/33"], &["print", "-o", "0x1"], &["print", "-c", "a b"]] {
            assert_eq!(parse(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }
}
