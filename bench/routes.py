#!/usr/bin/env python3
"""routes.py PROXY_HOST PORTOLAN ORIGIN WASM ENVOY [ROUTES]: what the length of a VirtualService costs.

One VirtualService of ROUTES routes (1,000), each with a prefix of its own, through proxy-host and through Envoy with the
filter; the same routes natively in an Envoy; all in one run, in turns. What counts is the CPU time of the process for a
request to the last route, by that for one to the first. That each route takes its own requests, and none those of a
route that is not there, is checked before.
"""
import json, os, re, socket, statistics, subprocess, sys, tempfile, time

PROXY_HOST, PORTOLAN, ORIGIN, WASM, ENVOY = (os.path.abspath(a) for a in sys.argv[1:6])
ROUTES = int(sys.argv[6]) if len(sys.argv) > 6 else 1000
HOST = "routes.example.com"
ROUNDS, REQUESTS = 31, 400
PORTS = {}


def port(name):
    if name not in PORTS:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            PORTS[name] = s.getsockname()[1]
    return PORTS[name]


def config():
    routes = "".join(f"  - match: [{{uri: {{prefix: /route-{i}/}}}}]\n    route: [{{destination: {{host: {HOST}}}}}]\n" for i in range(ROUTES))
    return f"""apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: routes}}
spec:
  hosts: [{HOST}]
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {port('origin')}}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: routes}}
spec:
  hosts: [{HOST}]
  http:
{routes}"""


def native(ours):
    """The same routes as istiod has them."""
    address = lambda name: {"socket_address": {"address": "127.0.0.1", "port_value": port(name)}}
    retry = {"retry_on": "connect-failure,refused-stream,unavailable,cancelled", "num_retries": 2}
    routes = [{"match": {"prefix": f"/route-{i}/"}, "route": {"cluster": "origin", "timeout": "0s", "retry_policy": retry}} for i in range(ROUTES)]
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "native", "normalize_path": True, "stream_idle_timeout": "0s", "http_protocol_options": {"allow_absolute_url": True},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
        "route_config": {"virtual_hosts": [{"name": "routes", "domains": [HOST], "include_request_attempt_count": True, "routes": routes}]}}
    cluster = {"name": "origin", "type": "STATIC", "load_assignment": {"cluster_name": "origin", "endpoints": [
        {"lb_endpoints": [{"endpoint": {"address": address("origin")}}]}]}}
    return {**{key: ours[key] for key in ("overload_manager", "deferred_stat_options")}, "admin": {"address": address("native admin")},
            "static_resources": {"clusters": [cluster], "listeners": [{
                "name": "native", "address": address("native"), "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}]}]}}


class Client:
    """One keep-alive connection."""
    def __init__(self, to):
        self.s = socket.create_connection(("127.0.0.1", to), timeout=20)
        self.s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, route):
        path = f"/route-{route}/index.html"
        self.s.sendall(f"GET http://{HOST}{path} HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode())

    def receive(self):
        buf = b""
        while b"\r\n\r\n" not in buf:
            d = self.s.recv(65536)
            if not d:
                raise ConnectionError("closed")
            buf += d
        head, _, body = buf.partition(b"\r\n\r\n")
        m = re.search(rb"(?i)content-length: *(\d+)", head)
        while m and len(body) < int(m.group(1)):
            body += self.s.recv(65536)
        return int(head[9:12])

    def status(self, route):
        self.send(route)
        return self.receive()


def until_ready(to, limit=60):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            if Client(to).status(0) == 200:
                return
        except OSError:
            pass
        time.sleep(0.02)
    raise SystemExit(f"nothing was served on port {to} within {limit} s")


def cpu(process):
    tasks = f"/proc/{process.pid}/task"
    return sum(int(open(f"{tasks}/{t}/schedstat").read().split()[0]) for t in os.listdir(tasks)) / 1e9


def spent(process, clients, route, requests=REQUESTS):
    """µs of CPU for a request."""
    before = cpu(process)
    for _ in range(requests // len(clients)):
        for c in clients:
            c.send(route)
        for c in clients:
            if c.receive() != 200:
                raise SystemExit(f"route {route} was refused under load")
    return (cpu(process) - before) / requests * 1e6


def main():
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/config.yaml", "w") as f:
            f.write(config())
        processes = []

        def start(*command):
            processes.append(subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL))
            return processes[-1]
        try:
            start(ORIGIN, "--listen", f"127.0.0.1:{port('origin')}")
            start(PORTOLAN, "serve", "--config", f"{folder}/config.yaml", "--listen", f"127.0.0.1:{port('serve')}",
                  "--admin", f"127.0.0.1:{port('admin')}", "--log-level", "error")
            bootstrap = subprocess.run(
                [PORTOLAN, "bootstrap", "envoy", "--plaintext", "--controller", f"127.0.0.1:{port('serve')}", "--filter", WASM, "--output", "json",
                 "--http-proxy", f"127.0.0.1:{port('envoy')}", "--admin", f"127.0.0.1:{port('envoy admin')}"], check=True, capture_output=True)
            with open(f"{folder}/envoy.json", "wb") as f:
                f.write(bootstrap.stdout)
            with open(f"{folder}/native.json", "w") as f:
                json.dump(native(json.loads(bootstrap.stdout)), f)
            options = ["--use-dynamic-base-id", "-l", "error", "--concurrency", 1]
            proxies = {
                "proxy-host": (start(PROXY_HOST, "--config", f"{folder}/config.yaml", "--http-proxy", f"127.0.0.1:{port('proxy-host')}",
                                     "--threads", 1, "--log-level", "error"), "proxy-host"),
                "Envoy with the filter": (start(ENVOY, "-c", f"{folder}/envoy.json", *options), "envoy"),
                "Envoy's own routes": (start(ENVOY, "-c", f"{folder}/native.json", *options), "native"),
            }
            crowd = {}
            for name, (process, at) in proxies.items():
                until_ready(port(at))
                crowd[name] = [Client(port(at)) for _ in range(8)]
                for route, wanted in ((0, 200), (ROUTES - 1, 200), (ROUTES, 404)):
                    got = crowd[name][0].status(route)
                    assert got == wanted, f"{name}: route {route} of {ROUTES} was answered with {got} and not {wanted}"
                # V8 compiles what is used in the background.
                for route in (0, ROUTES - 1):
                    spent(process, crowd[name], route, 4000)
            rounds = [{name: [spent(process, crowd[name], route) for route in (0, ROUTES - 1)] for name, (process, _) in proxies.items()}
                      for _ in range(ROUNDS)]
            for name in proxies:
                least = [statistics.mean(sorted(r[name][i] for r in rounds)[:ROUNDS // 4]) for i in (0, 1)]
                ratio = statistics.median(r[name][1] / r[name][0] for r in rounds)
                print(f"{name}: {least[0]:.1f} µs for the first of {ROUTES} routes, {least[1]:.1f} µs for the last in the least disturbed "
                      f"quarter: ratio {least[1] / least[0]:.2f}; median of all rounds {ratio:.2f}", flush=True)
        finally:
            for p in reversed(processes):
                p.terminate()
                p.wait(20)


main()
