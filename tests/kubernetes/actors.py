"""Who acts in the scenarios: controllers, proxies and origins as processes and threads, namespaces and entries as objects."""
import contextlib, http.client, http.server, signal, subprocess, sys, threading, urllib.request

from cluster import ISTIO, Refused, metric
from support import PORTOLAN, PROXY_HOST, free_port, until


class Process:
    """A child whose log can be read; ends with the block."""
    def __init__(self, cluster, name, command):
        self.log = cluster.path / f"{name}.log"
        self.process = subprocess.Popen([str(c) for c in command], stdout=open(self.log, "wb"), stderr=subprocess.STDOUT)

    def said(self, text):
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}:\n{self.log.read_text()[-2000:]}")
        return text in self.log.read_text()

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(15)

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if failed:
            print(f"--- {self.log.name}\n{self.log.read_text()[-3000:]}", file=sys.stderr)


class Controller(Process):
    def __init__(self, cluster, name="controller", user="portolan", listen=None, wait=True, mesh=None, extra=(), pod=None):
        self.listen, self.admin_port = listen or free_port(), free_port()
        if mesh is None:
            (cluster.path / "mesh.yaml").write_text("outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n")
            mesh = f"--mesh={cluster.path}/mesh.yaml"
        where = ["--kubeconfig", cluster.kubeconfig(user)] if pod is None else []
        super().__init__(cluster, name, [*(pod or []), PORTOLAN, "serve", "--kubernetes", *where, mesh, "--listen", f"127.0.0.1:{self.listen}", "--admin", f"127.0.0.1:{self.admin_port}", *extra])
        if wait:
            until("the controller serves", lambda: self.said("serving on"), 60)

    def admin(self, page):
        return urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/{page}", timeout=10).read().decode()

    def metric(self, name, **labels):
        return metric(self.admin("metrics"), f"portolan_{name}", **labels)


class Proxy(Process):
    def __init__(self, cluster, controller, name="proxy", namespace="default"):
        self.port = free_port()
        super().__init__(cluster, name, [PROXY_HOST, "--controller", f"http://127.0.0.1:{controller.listen}", "--namespace", namespace,
                                         "--http-proxy", f"127.0.0.1:{self.port}", "--threads", 1, "--access-log=off"])
        until("the proxy listens", lambda: self.get("none.example.com") is not None)

    def get(self, host):
        """Status and body of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", f"http://{host}/", headers={"Host": host})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


class Origin(http.server.ThreadingHTTPServer):
    """Says who it is."""
    def __init__(self, name, address, port=0):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(name)))
                self.end_headers()
                self.wfile.write(name.encode())

            def log_message(self, *_):
                pass
        super().__init__((address, port), Handler)
        self.daemon_threads = True
        threading.Thread(target=self.serve_forever, daemon=True).start()


def namespace(cluster, name):
    with contextlib.suppress(Refused):
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


def entry(name, host, spec=None, ns="default", port=80, address="127.0.0.1"):
    spec = spec or {"resolution": "STATIC", "endpoints": [{"address": address}]}
    return {"apiVersion": ISTIO, "kind": "ServiceEntry", "metadata": {"name": name, "namespace": ns},
            "spec": {"hosts": [host], "ports": [{"number": 80, "targetPort": port, "name": "http", "protocol": "HTTP"}],
                     "location": "MESH_INTERNAL", **spec}}
