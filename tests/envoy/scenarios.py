#!/usr/bin/env python3
"""scenarios.py PROXY [NAME...]: what happens to traffic while things change or fail, with a real proxy and controller.

PROXY is `envoy` or `proxy-host`; each scenario runs against both, with the controller as a process of its own. Everything
runs in a network namespace of its own, made as tests/conformance/rig.py makes it: the client's connections are redirected
to the proxy, the proxy's to an echo that says what reached it. Needs root.
"""
import json, os, re, signal, socket, subprocess, sys, threading, time

import route_scenarios                                                                              # noqa: F401
from world import BASIC, PATIENCE, SCENARIOS, World, entry, of_envoy, rig, scenario, until


@scenario
def protocols(kind, echo):
    """HTTP/1.1, HTTP/2, gRPC, TCP and TLS by server name, two workers; the HTTP proxy port; refusals."""
    with World(kind, echo, BASIC) as w:
        w.serving("web.example.com")
        w.every_worker("web.example.com")
        up = w.get("web.example.com")["upstream"]
        assert [u["dst"] for u in up] == ["10.0.0.1:80"] and up[0]["http"] == "1.1", up
        assert not [h for h in up[0]["headers"] if h.startswith("x-portolan")], up
        shown = w.get("web.example.com", headers={"x-portolan-cluster": "PassthroughCluster", "x-portolan-hash": "1"},
                      show=["x-portolan-cluster", "x-portolan-hash", "x-portolan-mirror"])
        assert shown["status"] == 200 and shown["upstream"][0]["dst"] == "10.0.0.1:80", shown
        assert shown["upstream"][0]["headers"] == {}, shown
        h2 = w.probe(proto="h2", dst="9.9.9.9:80", host="web.example.com")
        assert h2["status"] == 200, h2
        grpc = w.probe(proto="h2", dst="9.9.9.9:9000", host="grpc.example.com", method="POST",
                       headers={"content-type": "application/grpc", "te": "trailers"})
        assert grpc["status"] == 200 and grpc["upstream"][0]["http"] == "2", grpc
        assert grpc["upstream"][0]["dst"] == "10.0.0.2:9000", grpc
        tcp = w.probe(proto="tcp", dst="10.9.9.9:3306")
        assert tcp["status"] == "reply" and tcp["upstream"][0]["dst"] == "10.0.0.3:3306", tcp
        silent = w.probe(proto="tcp", dst="10.9.9.9:3306", data="")
        assert silent["status"] == "reply" and silent["upstream"][0]["kind"] == "silent", silent
        tls = w.probe(proto="tls", dst="9.9.9.9:443", sni="web.example.com")
        assert tls["status"] == "reply" and tls["upstream"] == [{"dst": "10.0.0.1:443", "kind": "tls", "sni": "web.example.com"}], tls
        other = w.probe(proto="tls", dst="9.9.9.9:443", sni="other.example.com")
        assert other["status"] == "closed" and not other["upstream"], other
        assert w.get("other.example.com")["status"] == 502
        forward = w.probe(dst="proxy:15020", host="web.example.com", target="http://web.example.com/")
        assert forward["status"] == 200 and forward["upstream"][0]["dst"] == "10.0.0.1:80", forward
        tunnel = w.probe(dst="proxy:15020", host="web.example.com:443", target="web.example.com:443", method="CONNECT")
        assert tunnel["status"] == 200, tunnel


@scenario
def clusters_follow_use(kind, echo):
    """A cluster is fetched with its first request; its change and removal reach who holds it, and nobody else hears."""
    files = {f"e{i}.yaml": entry(f"e{i}", f"host-{i}.example.com", [(80, "HTTP")], f"10.0.1.{i}") for i in range(1, 60)}
    with World(kind, echo, files) as w:
        w.serving("host-1.example.com")
        if kind == "envoy":
            names = w.envoy_clusters()
            assert {n for n in names if n.startswith("outbound")} == {"outbound|80||host-1.example.com"}, names
        before = w.metric("resources")
        w.write("e2.yaml", entry("e2", "host-2.example.com", [(80, "HTTP")], "10.0.2.2"))
        w.write("e1.yaml", entry("e1", "host-1.example.com", [(80, "HTTP")], "10.0.2.1"))
        until("the new address is used", lambda: w.get("host-1.example.com")["upstream"][0]["dst"] == "10.0.2.1:80")
        assert w.metric("resources") - before == 1, "one cluster for the one proxy that holds it"
        assert w.get("host-2.example.com")["upstream"][0]["dst"] == "10.0.2.2:80"
        w.remove("e1.yaml")
        w.serving("host-1.example.com", status=502)
        w.write("e1.yaml", entry("e1", "host-1.example.com", [(80, "HTTP")], "10.0.3.1"))
        w.serving("host-1.example.com")
        assert w.get("host-1.example.com")["upstream"][0]["dst"] == "10.0.3.1:80"


@scenario
def ports_come_and_go(kind, echo):
    """A port of the registry gets its listener while the proxy runs, and loses it."""
    with World(kind, echo, BASIC) as w:
        w.serving("web.example.com")
        assert w.get("late.example.com", "9.9.9.9:8085")["status"] == "closed"
        w.write("late.yaml", entry("late", "late.example.com", [(8085, "HTTP")], "10.0.0.9"))
        w.serving("late.example.com", "9.9.9.9:8085")
        w.remove("late.yaml")
        w.serving("late.example.com", "9.9.9.9:8085", "closed")


@scenario
def no_snapshot_yet(kind, echo):
    """Before the first snapshot: 503 with the reason, on the HTTP proxy port; right as soon as it has come."""
    # Envoy has no listeners before the controller speaks. Its first connection is the main thread's, and gets through; the
    # workers' filters are kept waiting.
    envoy = kind == "envoy"
    with World(kind, echo, BASIC, gate="first" if envoy else "pass", controller=envoy) as w:
        def ask():
            return w.probe(dst="proxy:15020", host="web.example.com", target="http://web.example.com/", expect_body=True)
        w.listening(15020)
        early = ask()
        assert early["status"] == 503 and "has not been received" in early["body"], early
        assert not early["upstream"], early
        captured = w.probe(proto="tcp", dst="10.9.9.9:3306")
        assert captured["status"] == "closed" and not captured["upstream"], captured
        if envoy:
            w.gate.mode = "pass"
            w.gate.cut()
        else:
            w.start_controller()
        until("it is right", lambda: ask()["status"] == 200, 40)


@scenario
def controller_killed(kind, echo):
    """The controller dies: what is held decides on, new clusters fail closed; it comes back: everything works again."""
    with World(kind, echo, BASIC) as w:
        w.serving("web.example.com")
        w.every_worker("web.example.com")
        w.stop("controller", signal.SIGKILL)
        w.every_worker("web.example.com")
        assert w.get("other.example.com")["status"] == 502
        w.write("new.yaml", entry("new", "new.example.com", [(80, "HTTP")], "10.0.0.7"))
        assert w.get("new.example.com")["status"] == 502
        w.start_controller()
        w.serving("new.example.com", status=200)
        w.every_worker("web.example.com")
        until("every worker has subscribed again", lambda: w.metric("subscribers") >= w.workers, 40)
        w.every_worker("new.example.com")
        assert w.metric("nacks") == 0


@scenario
def controller_slow(kind, echo):
    """A controller behind a slow line: late, and then right; nothing is let through meanwhile."""
    with World(kind, echo, BASIC, gate="pass") as w:
        w.gate.mode = "slow"
        w.gate.cut()
        w.serving("web.example.com")
        w.write("new.yaml", entry("new", "new.example.com", [(80, "HTTP")], "10.0.0.7"))
        seen = set()

        def there():
            got = w.get("new.example.com")
            seen.add(got["status"])
            return got["status"] == 200
        until("the change arrives", there)
        assert seen <= {502, 200}, seen


@scenario
def controller_garbage(kind, echo):
    """A controller that sends noise, and one whose messages are damaged: the last good state decides on, and recovers."""
    with World(kind, echo, BASIC, gate="pass") as w:
        w.serving("web.example.com")
        for mode in ("garbage", "flip"):
            w.gate.mode = mode
            w.gate.cut()
            for n in range(5):
                w.write("noise.yaml", entry("noise", f"noise-{mode}-{n}.example.com", [(80, "HTTP")], "10.0.0.8"))
                w.every_worker("web.example.com", tries=4)
                assert w.get("other.example.com")["status"] == 502
            w.gate.mode = "pass"
            w.gate.cut()
            w.write("new.yaml", entry("new", f"after-{mode}.example.com", [(80, "HTTP")], "10.0.0.7"))
            until(f"after {mode}", lambda: w.get(f"after-{mode}.example.com")["status"] == 200, 60)
            assert w.processes["proxy"].poll() is None, "the proxy ended"


@scenario
def changes_under_load(kind, echo, changes=1000):
    """1,000 changes while requests flow: none is answered wrongly, none is lost."""
    files = {"steady.yaml": entry("steady", "steady.example.com", [(80, "HTTP")], "10.0.0.1")}
    with World(kind, echo, files) as w:
        w.serving("steady.example.com")
        w.every_worker("steady.example.com")
        stop, wrong, count = threading.Event(), [], [0, 0]

        def flow(host, wanted, slot):
            while not stop.is_set():
                s = socket.create_connection(("9.9.9.9", 80))
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                s.settimeout(10)
                with s:
                    for _ in range(50):
                        if stop.is_set():
                            return
                        s.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                        head, body = b"", b""
                        try:
                            while b"\r\n\r\n" not in head:
                                data = s.recv(65536)
                                if not data:
                                    wrong.append((host, "closed"))
                                    return
                                head += data
                        except OSError as error:
                            wrong.append((host, repr(error)))
                            return
                        head, _, body = head.partition(b"\r\n\r\n")
                        length = re.search(rb"(?i)content-length: *(\d+)", head)
                        while length and len(body) < int(length.group(1)):
                            body += s.recv(65536)
                        count[slot] += 1
                        if int(head[9:12]) != wanted:
                            wrong.append((host, head[:200]))
        threads = [threading.Thread(target=flow, args=a, daemon=True)
                   for a in (("steady.example.com", 200, 0), ("nobody.example.com", 502, 1))]
        for t in threads:
            t.start()
        before = w.metric("updates")
        for n in range(changes):
            w.write(f"c{n % 50}.yaml", entry(f"c{n % 50}", f"c{n}.example.com", [(80, "HTTP")], f"10.1.{n // 250}.{n % 250 + 1}"))
            time.sleep(0.004)
        w.serving(f"c{changes - 1}.example.com")
        stop.set()
        for t in threads:
            t.join(PATIENCE)
        assert not wrong, wrong[:5]
        assert min(count) > 200, count
        print(f"   {changes} changes in {w.metric('updates') - before} updates, {sum(count)} requests", flush=True)


@scenario
def mutual_tls(kind, echo):
    """With mutual TLS a proxy is served as what its certificate says, and not at all if it says otherwise."""
    certs = rig.CERTS
    serve = ["--tls-cert", f"{certs}/server.pem", "--tls-key", f"{certs}/server-key.pem", "--tls-client-ca", f"{certs}/ca.pem"]
    own = ["--ca", f"{certs}/ca.pem", "--cert", f"{certs}/client.pem", "--key", f"{certs}/client-key.pem",
           "--controller-name", "example.com", "--namespace"]
    host = ["--controller-ca", f"{certs}/ca.pem", "--controller-cert", f"{certs}/client.pem",
            "--controller-key", f"{certs}/client-key.pem", "--controller-name", "example.com", "--namespace"]
    with World(kind, echo, BASIC, serve=serve, bootstrap=[*own, "ext"], tls=[*host, "ext"]) as w:
        w.serving("web.example.com")
        held = json.loads(w.admin("config_dump"))["subscribers"]
        assert {s["identity"] for s in held} == {"spiffe://cluster.local/ns/ext/sa/echo"}, held
        assert {s["stream"] for s in held} == {"registry", "discovery"}, held
    with World(kind, echo, BASIC, serve=serve, bootstrap=[*own, "default"], tls=[*host, "default"]) as w:
        until("the lie is refused", lambda: w.metric("denied") > 0)
        assert not json.loads(w.admin("config_dump"))["subscribers"]


@scenario
@of_envoy
def bound_ports(kind, echo):
    """Without iptables: every port of the registry is bound at one address, and the access log says what was decided."""
    log = f"/tmp/{rig.NS}.access.log"
    with World(kind, echo, BASIC, bootstrap=["--plaintext", "--bind-ports", "127.0.0.1", "--access-log", log]) as w:
        w.serving("web.example.com", "127.0.0.1:80")
        tls = w.probe(proto="tls", dst="127.0.0.1:443", sni="web.example.com")
        assert tls["upstream"] == [{"dst": "10.0.0.1:443", "kind": "tls", "sni": "web.example.com"}], tls
        assert w.get("other.example.com", "127.0.0.1:80")["status"] == 502
        w.write("late.yaml", entry("late", "late.example.com", [(8085, "HTTP")], "10.0.0.9"))
        w.serving("late.example.com", "127.0.0.1:8085")
        for said in ("outbound|80||web.example.com 10.0.0.1:80 \"host_exact: ServiceEntry default/web", "502 - portolan_denied{blocked}"):
            until(f"the access log says {said}", lambda: said in open(log).read(), 20)


@scenario
@of_envoy
def trapping_filter(kind, echo):
    """A filter that traps on every request and connection refuses them all, and lets nothing through."""
    path = f"/tmp/{rig.NS}.trap.wasm"
    with open(path, "wb") as f:
        f.write(trap_module())
    os.chmod(path, 0o644)
    with World(kind, echo, BASIC, wasm=path) as w:
        w.listening()
        until("the port has its listener", lambda: w.get("web.example.com")["status"] == 503)
        for _ in range(10):
            got = w.get("web.example.com")
            assert got["status"] == 503 and not got["upstream"], got
        got = w.probe(proto="tcp", dst="10.9.9.9:3306")
        assert got["status"] == "closed" and not got["upstream"], got


def trap_module():
    """A proxy-wasm module whose callbacks for requests and connections are `unreachable`."""
    def leb(n):
        out = b""
        while True:
            byte, n = n & 0x7F, n >> 7
            out += bytes([byte | (0x80 if n else 0)])
            if not n:
                return out

    def section(number, items):
        body = leb(len(items)) + b"".join(items)
        return bytes([number]) + leb(len(body)) + body
    i32 = 0x7F
    kinds = [([], []), ([i32] * 2, []), ([i32] * 2, [i32]), ([i32] * 3, [i32]), ([i32], [i32]), ([i32], [])]
    types = [bytes([0x60]) + leb(len(a)) + bytes(a) + leb(len(r)) + bytes(r) for a, r in kinds]
    fine, trap = b"\x00\x41\x01\x0b", b"\x00\x00\x0b"
    functions = [("proxy_abi_version_0_2_1", 0, b"\x00\x0b"), ("_initialize", 0, b"\x00\x0b"),
                 ("proxy_on_memory_allocate", 4, b"\x00\x41\x80\x08\x0b"), ("proxy_on_context_create", 1, b"\x00\x0b"),
                 ("proxy_on_vm_start", 2, fine), ("proxy_on_configure", 2, fine), ("proxy_on_request_headers", 3, trap),
                 ("proxy_on_new_connection", 4, trap), ("proxy_on_done", 4, fine), ("proxy_on_delete", 5, b"\x00\x0b")]
    exports = [leb(len(n)) + n.encode() + b"\x00" + leb(i) for i, (n, _, _) in enumerate(functions)]
    exports.append(b"\x06memory\x02\x00")
    code = [leb(len(c)) + c for _, _, c in functions]
    return (b"\0asm\1\0\0\0" + section(1, types) + section(3, [leb(t) for _, t, _ in functions]) + section(5, [b"\x00\x02"])
            + section(7, exports) + section(10, code))


def inside(kind, names):
    echo = rig.Echo()
    rig.dns_server()
    failed = 0
    for function in SCENARIOS:
        if names and function.__name__ not in names or getattr(function, "only", kind) != kind:
            continue
        start = time.monotonic()
        try:
            function(kind, echo)
            print(f"{kind} {function.__name__}: ok ({time.monotonic() - start:.1f} s)", flush=True)
        except Exception as error:                                      # whatever it is, the others run
            failed += 1
            print(f"{kind} {function.__name__}: FAILED: {type(error).__name__}: {error}", flush=True)
            if os.environ.get("TRACE"):
                raise
    sys.exit(1 if failed else 0)


def main():
    kind, names = sys.argv[1], sys.argv[2:]
    rig.setup()
    try:
        return subprocess.run(["ip", "netns", "exec", rig.NS, sys.executable, __file__, "inside", rig.NS, kind, *names]).returncode
    finally:
        rig.teardown()


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        rig.NS = sys.argv[2]
        inside(sys.argv[3], sys.argv[4:])
    elif sys.argv[1:2] and sys.argv[1] in ("envoy", "proxy-host"):
        sys.exit(main())
    else:
        sys.exit(__doc__)
