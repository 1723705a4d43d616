#!/usr/bin/env python3
"""client_files.py PROXY...: the files of a DestinationRule's TLS, and of the mesh's (ISTIO_MUTUAL), are replaced while requests
go, and count from then on.

PROXY is `envoy` or `proxy-host`. First the server's certificate and the authorities that it is checked by are new, then the
certificate that the proxy shows. Runs in a network namespace of its own; needs root.
"""
import http.server, os, pathlib, signal, socket, ssl, subprocess, sys, tempfile, threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import ENVOY, PORTOLAN, PROXY_HOST, WASM, until  # noqa: E402

PROXY = ("127.0.0.1", 15080)
OBJECTS = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: own}
spec:
  hosts: [own.example.com]
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8443}]
  resolution: STATIC
  endpoints: [{address: 127.0.0.1}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: own}
spec:
  host: own.example.com
  trafficPolicy:
    tls: %(tls)s
"""
# The files of each mode: certificate, key, authorities.
MODES = {
    "MUTUAL": (("client.crt", "client.key", "ca.crt"),
               "{mode: MUTUAL, sni: own.example.com, clientCertificate: %(at)s/client.crt, privateKey: %(at)s/client.key, caCertificates: %(at)s/ca.crt}"),
    "ISTIO_MUTUAL": (("cert-chain.pem", "key.pem", "root-cert.pem"), "{mode: ISTIO_MUTUAL, sni: own.example.com}"),
}


def certificate(folder, name):
    """A new one, signed by itself; gives where its certificate and its key are."""
    path = f"{folder}/{name}"
    subprocess.run(f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name} "
                   f"-addext basicConstraints=critical,CA:FALSE "
                   f"-keyout {path}.key -out {path}.crt 2>/dev/null", shell=True, check=True)
    return f"{path}.crt", f"{path}.key"


def place(path, file):
    """Puts a file in place as a mounted Secret is: a link changes."""
    os.symlink(file, f"{path}.new")
    os.rename(f"{path}.new", path)


class Whoever(http.server.BaseHTTPRequestHandler):
    """Says who the client is, once on each connection."""
    def do_GET(self):
        name = dict(pair for (pair,) in self.connection.getpeercert()["subject"])["commonName"].encode()
        self.send_response(200)
        self.send_header("content-length", str(len(name)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(name)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """With TLS; `context` may be another one for later connections."""
    def __init__(self, context):
        super().__init__(("127.0.0.1", 8443), Whoever)
        self.context = context
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request, address):
        try:
            with self.context.wrap_socket(request, server_side=True) as secured:
                super().finish_request(secured, address)
        except OSError:
            pass  # a client that does not believe us


def server_tls(own, clients):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*own)
    context.verify_mode = ssl.CERT_REQUIRED
    for crt, _ in clients:
        context.load_verify_locations(crt)
    return context


def answer():
    """Status and body of a request by way of the proxy."""
    with socket.create_connection(PROXY, timeout=5) as s:
        s.sendall(b"GET http://own.example.com/ HTTP/1.1\r\nHost: own.example.com\r\nConnection: close\r\n\r\n")
        data = b""
        while part := s.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head[9:12]), body.decode()


def run(kind, mode):
    (own, key, authorities), tls = MODES[mode]
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/config"), os.makedirs(f"{folder}/tls")
        open(f"{folder}/config/own.yaml", "w").write(OBJECTS % {"tls": tls % {"at": f"{folder}/tls"} if mode == "MUTUAL" else tls})
        servers = [certificate(folder, name) for name in ("server-1", "server-2")]
        clients = [certificate(folder, name) for name in ("client-1", "client-2")]
        for name, file in zip((own, key, authorities), (*clients[0], servers[0][0])):
            place(f"{folder}/tls/{name}", file)
        server = Server(server_tls(servers[0], clients))
        at = ["--http-proxy", f"{PROXY[0]}:{PROXY[1]}", "--mesh-certificates", f"{folder}/tls"]
        log = open(f"{folder}/log", "ab")
        commands = [[PROXY_HOST, "--config", f"{folder}/config", *at]]
        if kind == "envoy":
            made = subprocess.run([PORTOLAN, "bootstrap", "envoy", "--plaintext", "--filter", WASM, *at], check=True, capture_output=True)
            open(f"{folder}/envoy.yaml", "wb").write(made.stdout)
            commands = [[PORTOLAN, "serve", "--config", f"{folder}/config"],
                        [ENVOY, "-c", f"{folder}/envoy.yaml", "--concurrency", "1", "--use-dynamic-base-id", "-l", "warn"]]
        processes = [subprocess.Popen([str(word) for word in command], stdout=log, stderr=log) for command in commands]
        try:
            until("client-1 is answered", answer, done=lambda found: found == (200, "client-1"))
            server.context = server_tls(servers[1], clients)
            assert answer()[0] == 503, "a server that nobody vouches for"
            place(f"{folder}/tls/{authorities}", servers[1][0])
            until("client-1 is answered", answer, done=lambda found: found == (200, "client-1"))
            for name, file in zip((own, key), clients[1]):
                place(f"{folder}/tls/{name}", file)
            until("client-2 is answered", answer, done=lambda found: found == (200, "client-2"))
            print(f"files of {mode}, {kind}: ok")
        except AssertionError:
            print(open(f"{folder}/log").read()[-3000:], file=sys.stderr)
            raise
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
            server.shutdown()
            server.server_close()


if __name__ == "__main__":
    if os.environ.get("INSIDE") != "1":
        inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, __file__, *sys.argv[1:]]
        sys.exit(subprocess.run(inside, env={**os.environ, "INSIDE": "1"}).returncode)
    for kind in sys.argv[1:]:
        for mode in MODES:
            run(kind, mode)
