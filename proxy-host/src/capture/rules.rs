//! The rules as a list, and as the two programs take them.

use std::fmt::Write as _;

use ipnet::IpNet;

/// Name of the chains and tables that are ours.
pub(super) const CHAIN: &str = "PORTOLAN_OUTPUT";
/// The chain that redirects.
pub(super) const REDIRECT: &str = "PORTOLAN_REDIRECT";
/// nft's table.
pub(super) const TABLE: &str = "portolan";

/// Ranges to capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ranges {
    /// Everything.
    All,
    /// These.
    These(Vec<IpNet>),
}

/// One of the two address families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    fn has(self, range: &IpNet) -> bool {
        matches!((self, range), (Self::V4, IpNet::V4(_)) | (Self::V6, IpNet::V6(_)))
    }

    fn loopback(self) -> &'static str {
        match self {
            Self::V4 => "127.0.0.1/32",
            Self::V6 => "::1/128",
        }
    }
}

/// What is captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Port of the transparent listener.
    pub port: u16,
    /// The proxy's user ids.
    pub uids: Vec<u32>,
    /// The proxy's group ids.
    pub gids: Vec<u32>,
    /// Ranges to capture.
    pub include: Ranges,
    /// Ranges to leave alone.
    pub exclude: Vec<IpNet>,
    /// Ports to capture whatever the address is.
    pub include_ports: Vec<u16>,
    /// Ports to leave alone whatever the address is.
    pub exclude_ports: Vec<u16>,
    /// Interfaces to leave alone.
    pub exclude_interfaces: Vec<String>,
}

/// What a connection has to be like for a rule.
enum Match<'r> {
    Any,
    Interface(&'r str),
    Port(u16),
    /// On the loopback interface, by anybody but the proxy.
    Local,
    User(u32),
    Group(u32),
    To(String),
}

impl Rules {
    /// In order; true redirects and false leaves alone.
    fn list(&self, family: Family) -> Vec<(Match<'_>, bool)> {
        let mut list = Vec::new();
        list.extend(self.exclude_interfaces.iter().map(|name| (Match::Interface(name), false)));
        list.extend(self.exclude_ports.iter().map(|port| (Match::Port(*port), false)));
        list.extend(self.uids.iter().map(|uid| (Match::User(*uid), false)));
        list.extend(self.gids.iter().map(|gid| (Match::Group(*gid), false)));
        // Between processes of one workload, and to servers that are called localhost.
        list.push((Match::Local, false));
        list.push((Match::To(family.loopback().to_owned()), false));
        let own = |range: &&IpNet| family.has(range);
        list.extend(self.exclude.iter().filter(own).map(|range| (Match::To(range.to_string()), false)));
        list.extend(self.include_ports.iter().map(|port| (Match::Port(*port), true)));
        match &self.include {
            Ranges::All => list.push((Match::Any, true)),
            Ranges::These(ranges) => {
                list.extend(ranges.iter().filter(own).map(|range| (Match::To(range.to_string()), true)));
            }
        }
        list
    }

    /// What `iptables-restore --noflush` (or its sibling for IPv6) reads. The jump from OUTPUT is not part of it, as
    /// there may be one already.
    #[must_use]
    pub fn iptables(&self, family: Family) -> String {
        let mut out = format!("*nat\n:{REDIRECT} - [0:0]\n:{CHAIN} - [0:0]\n");
        let _ = writeln!(out, "-A {REDIRECT} -p tcp -j REDIRECT --to-ports {}", self.port);
        for (of, redirect) in self.list(family) {
            let of = match of {
                Match::Any => String::new(),
                Match::Interface(name) => format!("-o {name} "),
                Match::Port(port) => format!("-p tcp --dport {port} "),
                Match::Local => "-o lo ".into(),
                Match::User(uid) => format!("-m owner --uid-owner {uid} "),
                Match::Group(gid) => format!("-m owner --gid-owner {gid} "),
                Match::To(range) => format!("-d {range} "),
            };
            let target = if redirect { REDIRECT } else { "RETURN" };
            let _ = writeln!(out, "-A {CHAIN} {of}-j {target}");
        }
        out.push_str("COMMIT\n");
        out
    }

    /// What `nft -f -` reads; it takes the place of an earlier table at once.
    #[must_use]
    pub fn nft(&self) -> String {
        // To delete a table that is not there is an error, so it is made first.
        let mut out = format!("table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
        out.push_str("  chain output {\n    type nat hook output priority -100; policy accept;\n");
        out.push_str("    meta l4proto != tcp return\n");
        for (family, guard, to) in [(Family::V4, "ipv4", "ip"), (Family::V6, "ipv6", "ip6")] {
            for (of, redirect) in self.list(family) {
                let of = match of {
                    Match::Any => String::new(),
                    Match::Interface(name) => format!("oifname \"{name}\" "),
                    Match::Port(port) => format!("tcp dport {port} "),
                    Match::Local => "oifname \"lo\" ".into(),
                    Match::User(uid) => format!("meta skuid {uid} "),
                    Match::Group(gid) => format!("meta skgid {gid} "),
                    Match::To(range) => format!("{to} daddr {range} "),
                };
                // nft wants to see the protocol in the rule itself before it takes a port.
                let redirected = || format!("meta l4proto tcp redirect to :{}", self.port);
                let verdict = if redirect { redirected() } else { "return".into() };
                let _ = writeln!(out, "    meta nfproto {guard} {of}{verdict}");
            }
        }
        out.push_str("  }\n}\n");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            port: 15001,
            uids: vec![1337],
            gids: vec![7],
            include: Ranges::These(vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()]),
            exclude: vec!["10.9.0.0/16".parse().unwrap()],
            include_ports: vec![443],
            exclude_ports: vec![22],
            exclude_interfaces: vec!["eth1".into()],
        }
    }

    #[test]
    fn istios_order_is_kept() {
        let expected = "*nat\n:PORTOLAN_REDIRECT - [0:0]\n:PORTOLAN_OUTPUT - [0:0]\n\
            -A PORTOLAN_REDIRECT -p tcp -j REDIRECT --to-ports 15001\n\
            -A PORTOLAN_OUTPUT -o eth1 -j RETURN\n\
            -A PORTOLAN_OUTPUT -p tcp --dport 22 -j RETURN\n\
            -A PORTOLAN_OUTPUT -m owner --uid-owner 1337 -j RETURN\n\
            -A PORTOLAN_OUTPUT -m owner --gid-owner 7 -j RETURN\n\
            -A PORTOLAN_OUTPUT -o lo -j RETURN\n\
            -A PORTOLAN_OUTPUT -d 127.0.0.1/32 -j RETURN\n\
            -A PORTOLAN_OUTPUT -d 10.9.0.0/16 -j RETURN\n\
            -A PORTOLAN_OUTPUT -p tcp --dport 443 -j PORTOLAN_REDIRECT\n\
            -A PORTOLAN_OUTPUT -d 10.0.0.0/8 -j PORTOLAN_REDIRECT\n\
            COMMIT\n";
        assert_eq!(rules().iptables(Family::V4), expected);
    }

    #[test]
    fn each_family_has_its_own_ranges() {
        let six = rules().iptables(Family::V6);
        assert!(six.contains("-d fd00::/8 -j PORTOLAN_REDIRECT\n") && !six.contains("10."), "{six}");
        let nft = rules().nft();
        assert!(nft.contains("    meta nfproto ipv4 ip daddr 10.9.0.0/16 return\n"), "{nft}");
        assert!(
            nft.contains("    meta nfproto ipv6 ip6 daddr fd00::/8 meta l4proto tcp redirect to :15001\n"),
            "{nft}"
        );
        assert_eq!(nft.matches("10.9.0.0/16").count(), 1);
    }

    #[test]
    fn everything_is_captured_by_a_star_and_nothing_by_an_empty_list() {
        let all = Rules { include: Ranges::All, include_ports: vec![], ..rules() };
        assert!(all.iptables(Family::V6).ends_with("-A PORTOLAN_OUTPUT -j PORTOLAN_REDIRECT\nCOMMIT\n"));
        let none = Rules { include: Ranges::These(vec![]), include_ports: vec![], ..rules() };
        assert!(!none.iptables(Family::V4).contains("-j PORTOLAN_REDIRECT\n"));
    }
}
