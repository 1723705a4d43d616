//! The admin port of a filter's host.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::modules::filters;

const PATIENCE: Duration = Duration::from_secs(20);

struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ask(address: SocketAddr, method: &str, target: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "{method} {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn metrics_of_the_filter_readiness_and_the_level_of_the_log() {
    // Nobody answers there, which does not matter to the filter's counts.
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_proxy-host"));
    command.args(["filter", "--root-id", "shared", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--wasm"]);
    command.arg(filters()).args(["--upstream", &upstream.to_string()]);
    let mut program = Ends(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(program.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let ready = lines.find(|line| line.contains("listening on")).unwrap();
    let after = |what: &str| -> SocketAddr {
        ready.split_once(what).unwrap().1.split(',').next().unwrap().trim().parse().unwrap()
    };
    let (proxy, admin) = (after("listening on "), after(", admin "));
    assert!(ask(admin, "GET", "/ready").ends_with("\r\n\r\nLIVE\n"));
    assert!(ask(admin, "GET", "/healthz").ends_with("\r\n\r\nok\n"));
    assert!(ask(admin, "GET", "/").contains("/metrics"));
    assert!(ask(admin, "GET", "/clusters").starts_with("HTTP/1.1 404 "));
    assert!(ask(admin, "POST", "/metrics").starts_with("HTTP/1.1 405 "));
    let begun = Instant::now();
    loop {
        assert!(ask(proxy, "GET", "/metrics").starts_with("HTTP/1.1 "));
        let metrics = ask(admin, "GET", "/metrics");
        // What has ended is told a moment after its client has the answer.
        let lines = [
            "filter_requests_total ",
            "filter_level 4\n",
            "filter_sizes_count ",
            "portolan_filter_traps_total{kind=\"guest\"} 0\n",
            "portolan_requests_total{code=\"200\",flags=\"-\"} ",
            "portolan_request_duration_milliseconds_count ",
            "portolan_connections_total ",
        ];
        let Some(missing) = lines.iter().find(|line| !metrics.contains(**line)) else { break };
        assert!(begun.elapsed() < PATIENCE, "no {missing:?} in {metrics}");
    }
    assert!(ask(admin, "POST", "/logging?level=loud").starts_with("HTTP/1.1 400 "));
    assert!(ask(admin, "POST", "/logging?level=debug").starts_with("HTTP/1.1 200 "));
    assert!(ask(admin, "GET", "/logging").ends_with("\r\n\r\ndebug\n"));
}
