#!/usr/bin/env python3
"""two_hop.py PROXY [PROXY]: an application reaches the outside by its sidecar and an egress gateway.

Three network namespaces in a row: `app` has no route to `out`, only to `gw`. The sidecar, always proxy-host, redirects the
application's connections; the gateway is a `proxy-host` or an `envoy`. HTTP, and TLS by server name, go through both hops;
once the gateway's VirtualService is gone nothing does. Needs root.
"""
import http.server, os, pathlib, signal, ssl, subprocess, sys, tempfile, threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import ENVOY, PORTOLAN, PROXY_HOST, WASM, until  # noqa: E402

ID = f"hop{os.getpid()}"
APP, GW, OUT = (f"{ID}{name}" for name in ("a", "g", "o"))
UID = 1337

MESH = "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n"
COMMON = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: default}
spec:
  hosts: [outside.example.com]
  ports:
  - {number: 80, name: http, protocol: HTTP}
  - {number: 443, name: tls, protocol: TLS}
  resolution: STATIC
  endpoints: [{address: 10.2.0.2, ports: {http: 8000, tls: 8443}}]
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: egress, namespace: istio-system}
spec:
  selector: {istio: egressgateway}
  servers:
  - {port: {number: 80, name: http, protocol: HTTP}, hosts: [outside.example.com]}
  - {port: {number: 443, name: tls, protocol: TLS}, hosts: [outside.example.com], tls: {mode: PASSTHROUGH}}
---
apiVersion: v1
kind: Service
metadata: {name: egress, namespace: istio-system}
spec:
  clusterIP: 10.96.0.1
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: tls, port: 443, targetPort: 8443}
  selector: {istio: egressgateway}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: egress-1, namespace: istio-system, labels: {kubernetes.io/service-name: egress}}
addressType: IPv4
endpoints: [{addresses: [10.1.0.2], conditions: {ready: true}}]
ports: [{name: http, port: 8080, protocol: TCP}, {name: tls, port: 8443, protocol: TCP}]
"""
ROUTES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: by-egress, namespace: default}
spec:
  hosts: [outside.example.com]
  gateways: [mesh, istio-system/egress]
  http:
  - match: [{gateways: [mesh], port: 80}]
    route: [{destination: {host: egress.istio-system.svc.cluster.local, port: {number: 80}}}]
  - match: [{gateways: [istio-system/egress], port: 80}]
    route: [{destination: {host: outside.example.com, port: {number: 80}}}]
  tls:
  - match: [{gateways: [mesh], port: 443, sniHosts: [outside.example.com]}]
    route: [{destination: {host: egress.istio-system.svc.cluster.local, port: {number: 443}}}]
  - match: [{gateways: [istio-system/egress], port: 443, sniHosts: [outside.example.com]}]
    route: [{destination: {host: outside.example.com, port: {number: 443}}}]
"""


def sh(*lines):
    for line in lines:
        subprocess.run(line, shell=True, check=True)


def setup():
    link = ("ip link add {0}0 netns {1} type veth peer name {0}1 netns {2}; ip -n {1} addr add {3}.1/24 dev {0}0; "
            "ip -n {1} link set {0}0 up; ip -n {2} addr add {3}.2/24 dev {0}1; ip -n {2} link set {0}1 up")
    sh(*[f"ip netns add {ns} && ip -n {ns} link set lo up" for ns in (APP, GW, OUT)],
       link.format("l", APP, GW, "10.1.0"), link.format("m", GW, OUT, "10.2.0"),
       f"ip -n {APP} route add default via 10.1.0.2",
       f"ip netns exec {APP} iptables -t nat -A OUTPUT -p tcp -m owner ! --uid-owner {UID} ! -d 127.0.0.1 -j REDIRECT --to-ports 15001",
       f"ip netns exec {GW} sysctl -qw net.ipv4.ip_forward=0")


def teardown():
    for ns in (APP, GW, OUT):
        subprocess.run(["ip", "netns", "del", ns], check=False)


def origin(certificate):
    """Runs in `out`: says over HTTP and HTTPS who asked for what."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"{self.client_address[0]} {self.headers['host']} {self.path} {self.headers['x-forwarded-for']}\n".encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
    servers = [http.server.ThreadingHTTPServer(("10.2.0.2", port), Handler) for port in (8000, 8443)]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    servers[1].socket = context.wrap_socket(servers[1].socket, server_side=True)
    threading.Thread(target=servers[0].serve_forever, daemon=True).start()
    print("up", flush=True)
    servers[1].serve_forever()


def curl(url, *arguments):
    """What the application sees: the answer's status, a space, and its body; 000 where there is none."""
    command = ["ip", "netns", "exec", APP, "curl", "-sk", "--max-time", "3", "-w", "%{http_code} ", "-o", "-",
               "--resolve", "outside.example.com:80:10.9.9.9", "--resolve", "outside.example.com:443:10.9.9.9", *arguments, url]
    body, _, status = subprocess.run(command, capture_output=True, text=True).stdout.rstrip().rpartition("\n")
    return f"{status.strip()} {body}"


def run(kind):
    processes = []
    with tempfile.TemporaryDirectory(prefix=f"{ID}.") as folder:
        os.chmod(folder, 0o755)
        os.mkdir(f"{folder}/config")
        def write(name, text):
            with open(f"{folder}/{name}.new", "w") as file:
                file.write(text)
            os.rename(f"{folder}/{name}.new", f"{folder}/config/{name}")
        write("mesh.yaml", MESH), write("common.yaml", COMMON), write("routes.yaml", ROUTES)
        sh(f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=outside "
           f"-keyout {folder}/key.pem -out {folder}/cert.pem 2>/dev/null && cat {folder}/key.pem >> {folder}/cert.pem")
        log = open(f"{folder}/log", "ab")
        def start(ns, command, user=True):
            who = ["setpriv", "--reuid", str(UID), "--clear-groups"] if user else []
            command = ["ip", "netns", "exec", ns, *who, *map(str, command)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE if not user else log, stderr=log, text=True))
            return processes[-1]
        try:
            assert start(OUT, [sys.executable, __file__, "origin", f"{folder}/cert.pem"], user=False).stdout.readline() == "up\n"
            config = ["--config", f"{folder}/config"]
            start(APP, [PROXY_HOST, *config, "--transparent", "0.0.0.0:15001", "--ip", "10.1.0.1", "--threads", "1"])
            who = ["--role", "gateway", "--namespace", "istio-system", "--labels", "istio=egressgateway", "--ip", "10.1.0.2"]
            if kind == "envoy":
                start(GW, [PORTOLAN, "serve", *config, "--listen", "127.0.0.1:15010", "--admin", "127.0.0.1:15014"])
                made = subprocess.run([PORTOLAN, "bootstrap", "envoy", "--plaintext", "--filter", WASM, *who], check=True, capture_output=True)
                open(f"{folder}/envoy.yaml", "wb").write(made.stdout)
                start(GW, [ENVOY, "-c", f"{folder}/envoy.yaml", "--concurrency", "1", "--use-dynamic-base-id", "-l", "warn"])
            else:
                start(GW, [PROXY_HOST, *config, *who, "--threads", "1"])
            # The outside sees the gateway's address; of the application it hears only what the gateway says.
            until("HTTP goes by both", lambda: curl("http://outside.example.com/a"), done=lambda said: said == "200 10.2.0.1 outside.example.com /a 10.1.0.1")
            until("TLS goes by both", lambda: curl("https://outside.example.com/b"), done=lambda said: said == "200 10.2.0.1 outside.example.com /b None")
            direct = ["ip", "netns", "exec", APP, "setpriv", "--reuid", str(UID), "--clear-groups", "curl", "-s", "--max-time", "1", "http://10.2.0.2:8000/"]
            assert subprocess.run(direct, capture_output=True).returncode != 0, "the application has another way out"
            other = curl("http://10.9.9.9/", "-H", "host: other.example.com")
            assert other.startswith("502"), other
            # A sidecar that is led astray does not get past the gateway.
            write("routes.yaml", ROUTES.replace("gateways: [istio-system/egress]", "gateways: [istio-system/gone]"))
            until("the gateway knows no route", lambda: curl("http://outside.example.com/a"), done=lambda said: said.startswith("404"))
            until("nor for TLS", lambda: curl("https://outside.example.com/b"), done=lambda said: said.startswith("000"))
            print(f"two hops, gateway {kind}: ok")
        except AssertionError:
            print(open(f"{folder}/log").read()[-4000:], file=sys.stderr)
            raise
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "origin":
        origin(sys.argv[2])
    setup()
    try:
        for kind in sys.argv[1:]:
            run(kind)
    finally:
        teardown()
