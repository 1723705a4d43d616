//! `proxy-host capture` in network namespaces of its own: what is captured, and what is dialled directly.

#[path = "it/proxy_support/mod.rs"]
mod proxy_support;

use std::{
    fs::File,
    net::{SocketAddr, TcpStream},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    process::Command,
    thread,
    time::Duration,
};

use proxy_support::*;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The proxy's user, as under Istio.
const PROXY: u32 = 1337;

/// Two namespaces joined by a wire: one with the workload and its proxy, one with the rest of the world.
struct Net {
    inside: String,
    outside: String,
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    output.is_ok_and(|output| {
        if !output.status.success() {
            eprintln!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        }
        output.status.success()
    })
}

impl Net {
    fn new(name: &str) -> Option<Self> {
        let id = format!("{name}{}", std::process::id());
        let net = Self { inside: format!("in-{id}"), outside: format!("out-{id}") };
        let (inside, outside) = (&net.inside, &net.outside);
        let made = [
            format!("netns add {inside}"),
            format!("netns add {outside}"),
            format!("-n {inside} link set lo up"),
            format!("-n {outside} link set lo up"),
            format!("-n {inside} link add wire type veth peer name wire netns {outside}"),
            format!("-n {inside} addr add 10.9.0.1/24 dev wire"),
            format!("-n {inside} -6 addr add fd09::1/64 dev wire nodad"),
            format!("-n {inside} link set wire up"),
            format!("-n {outside} addr add 10.9.0.2/24 dev wire"),
            format!("-n {outside} addr add 10.9.0.3/24 dev wire"),
            format!("-n {outside} -6 addr add fd09::2/64 dev wire nodad"),
            format!("-n {outside} -6 addr add fd09::3/64 dev wire nodad"),
            format!("-n {outside} link set wire up"),
        ]
        .iter()
        .all(|arguments| ip(arguments));
        made.then_some(net)
    }

    /// Does something in one of the namespaces.
    fn within<T: Send>(namespace: &str, what: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{namespace}")).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                what()
            });
            inside.join().unwrap()
        })
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.inside));
        ip(&format!("netns del {}", self.outside));
    }
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "SKIPPED: {why}");
    eprintln!("SKIPPED: {why}");
}

fn capture(arguments: &[&str]) -> (bool, String) {
    let output = Program::command().arg("capture").args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

/// Who answers: the origin through the proxy, the origin itself, or nobody.
fn who(address: &str) -> &'static str {
    let address: SocketAddr = address.parse().unwrap();
    let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_secs(5)) else { return "nobody" };
    drop(stream);
    let answer = exchange(address, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n");
    match answer {
        answer if !answer.ends_with("origin") => "nobody",
        answer if answer.contains("x-envoy-upstream-service-time") => "proxy",
        _ => "origin",
    }
}

fn check(tool: &'static str) {
    if !rustix::process::geteuid().is_root() || !installed("ip") {
        return skip("network namespaces need root and iproute2");
    }
    if !installed(tool) || (tool == "iptables" && !installed("ip6tables")) {
        return skip(&format!("{tool} is not installed"));
    }
    let Some(net) = Net::new(tool) else { return skip("network namespaces cannot be made here") };
    for address in ["10.9.0.2:80", "10.9.0.3:80", "10.9.0.2:81", "[fd09::2]:80", "[fd09::3]:80"] {
        Net::within(&net.outside, || origin_at(address, "origin", Duration::ZERO));
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |address: &str| address.parse::<SocketAddr>().unwrap();
    let other = entry("b", "a.test", "number: 81, name: http, protocol: HTTP", at("10.9.0.2:81"));
    write(dir.path(), &(entry("a", "a.test", HTTP, at("10.9.0.2:80")) + &other));
    // The proxy's user has to be able to read what root's test wrote.
    for path in [dir.path(), &dir.path().join("mesh.yaml"), &dir.path().join("entries.yaml")] {
        std::os::unix::fs::chown(path, Some(PROXY), Some(PROXY)).unwrap();
    }
    let program = dir.path().join("proxy-host");
    // Not by this process: a child that the other test starts meanwhile would hold the file open, and nobody could run it.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_proxy-host")).arg(&program).status().unwrap();
    assert!(copied.success());
    Net::within(&net.inside, || {
        let mut command = Command::new(&program);
        command.uid(PROXY).gid(PROXY).args(["--threads", "1", "--transparent", "[::]:15001", "--config"]);
        let mut proxy = Program::start(command.arg(dir.path()));
        proxy.line("ready after");
        let ask = || ["10.9.0.2:80", "10.9.0.3:80", "10.9.0.2:81", "[fd09::2]:80", "[fd09::3]:80"].map(who);
        assert_eq!(ask(), ["origin"; 5], "nothing is captured yet");

        let apply = |more: &[&str]| {
            let (done, said) = capture(&[&["apply", "--tool", tool][..], more].concat());
            assert!(done, "{said}");
        };
        apply(&[]);
        assert_eq!(ask(), ["proxy"; 5], "all is captured, by the name in Host");
        let excluded =
            ["--istio-service-exclude-cidr", "10.9.0.3,fd09::3/128", "--istio-local-outbound-ports-exclude", "81"];
        apply(&excluded);
        assert_eq!(ask(), ["proxy", "origin", "origin", "proxy", "origin"], "what is left out is dialled directly");
        apply(&["--istio-service-cidr", "10.9.0.3/32,fd09::3", "--istio-outbound-ports", "81"]);
        assert_eq!(ask(), ["origin", "proxy", "proxy", "origin", "proxy"], "only what is named is captured");
        apply(&["--proxy-uid", "1337,0"]);
        assert_eq!(ask(), ["origin"; 5], "the users named are left alone");
        apply(&[]);
        apply(&[]);
        let loopback = origin_at("127.0.0.1:0", "origin", Duration::ZERO);
        assert_eq!(who(&loopback.to_string()), "origin", "loopback is left alone");
        assert_eq!(exchange(at("10.9.0.1:15001"), "GET / HTTP/1.1\r\n\r\n"), "", "it does not dial itself");

        for _ in 0..2 {
            let (done, said) = capture(&["remove", "--tool", tool]);
            assert!(done, "{said}");
        }
        assert_eq!(ask(), ["origin"; 5], "the rules are gone, and to remove them again is no error");
    });
}

#[test]
fn iptables_captures_what_is_asked_for() {
    check("iptables");
}

#[test]
fn nft_captures_what_is_asked_for() {
    check("nft");
}

#[test]
fn print_shows_the_rules_and_changes_nothing() {
    let (done, rules) = capture(&["print", "--tool", "iptables", "-x", "10.1.0.0/16", "--port", "16001"]);
    assert!(done && rules.contains("-A PORTOLAN_OUTPUT -d 10.1.0.0/16 -j RETURN\n"), "{rules}");
    assert!(rules.contains("-j REDIRECT --to-ports 16001\n") && rules.contains("ip6tables-restore"), "{rules}");
    let (done, rules) = capture(&["print", "--tool", "nft", "--include-outbound-ip-ranges", "fd00::/8"]);
    assert!(done && rules.contains("ip6 daddr fd00::/8 meta l4proto tcp redirect to :15001\n"), "{rules}");
    assert_eq!(rules.matches("redirect").count(), 1, "{rules}");
}

#[test]
fn the_proxys_own_connections_are_left_alone_by_default() {
    let (done, rules) = capture(&["print", "--tool", "iptables"]);
    assert!(done && rules.contains("--uid-owner 1337 -j RETURN\n"), "{rules}");
}
