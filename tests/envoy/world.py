"""What the scenarios share: a controller and a proxy in the namespace of tests/conformance/rig.py, and what can go wrong between them."""
import json, os, pathlib, random, re, signal, socket, subprocess, sys, tempfile, threading, time, urllib.request

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "conformance")]
import rig                                                                                          # noqa: E402
from support import ENVOY, PATIENCE, PORTOLAN, PROXY_HOST, WASM, until                              # noqa: E402, F401

CONTROLLER, ADMIN, GATE, ENVOY_ADMIN = 15010, 15014, 15012, 15015
SCENARIOS = []


def scenario(function):
    SCENARIOS.append(function)
    return function


def of_envoy(function):
    """A scenario that only concerns Envoy: proxy-host's own tests have it."""
    function.only = "envoy"
    return function


def entry(name, host, ports, address=None, extra=""):
    lines = "".join(f"  - {{number: {n}, name: p{n}, protocol: {p}}}\n" for n, p in ports)
    how = f"  resolution: STATIC\n  endpoints: [{{address: {address}}}]\n" if address else "  resolution: NONE\n"
    return (f"apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: default}}\n"
            f"spec:\n  hosts: ['{host}']\n  ports:\n{lines}{how}{extra}---\n")


class World:
    """One controller and one proxy, and the files between them."""
    def __init__(self, kind, echo, files, gate=None, controller=True, workers=2, wasm=WASM, serve=(), bootstrap=("--plaintext",), tls=(), ip="1.1.1.1"):
        self.kind, self.echo, self.workers, self.wasm = kind, echo, workers, wasm
        self.serve, self.bootstrap, self.tls, self.ip = serve, bootstrap, tls, ip
        self.folder = tempfile.TemporaryDirectory(prefix=f"{rig.NS}.")
        os.chmod(self.folder.name, 0o755)
        os.mkdir(f"{self.folder.name}/config")
        self.write("mesh.yaml", "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n")
        for name, text in files.items():
            self.write(name, text)
        self.processes = {}
        self.gate = Gate(gate) if gate else None
        if controller:
            self.start_controller()
        self.start_proxy()

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        for name in list(self.processes):
            self.stop(name, signal.SIGKILL)
        if self.gate:
            self.gate.close()
        if failed:
            for log in ("controller", "proxy"):
                path = f"{self.folder.name}/{log}.log"
                if os.path.exists(path):
                    print(f"--- {log}\n" + open(path).read()[-1500:], file=sys.stderr)
        self.folder.cleanup()

    def write(self, name, text):
        """Whole or not at all, as editors and kubelet do."""
        path = f"{self.folder.name}/config/{name}"
        with open(path + ".new", "w") as f:
            f.write(text)
        os.rename(path + ".new", path)

    def remove(self, name):
        os.unlink(f"{self.folder.name}/config/{name}")

    def start(self, name, command):
        log = open(f"{self.folder.name}/{name}.log", "ab")
        caps = "+dac_override,+dac_read_search"
        user = ["setpriv", "--reuid", str(rig.UID), "--clear-groups", "--inh-caps", caps, "--ambient-caps", caps]
        self.processes[name] = subprocess.Popen(user + [str(c) for c in command], stdout=log, stderr=log)

    def stop(self, name, how=signal.SIGTERM):
        process = self.processes.pop(name)
        process.send_signal(how)
        return process.wait(PATIENCE)

    def start_controller(self):
        self.start("controller", [PORTOLAN, "serve", "--listen", f"127.0.0.1:{CONTROLLER}", "--admin", f"127.0.0.1:{ADMIN}",
                                  "--config", f"{self.folder.name}/config", "--log-level", "info", *self.serve])
        until("the controller is ready", lambda: self.admin("ready"))

    def start_proxy(self):
        port = GATE if self.gate else CONTROLLER
        if self.kind == "envoy":
            made = subprocess.run([PORTOLAN, "bootstrap", "envoy", *self.bootstrap, "--controller", f"127.0.0.1:{port}",
                                   "--filter", self.wasm, "--transparent", "15001", "--http-proxy", "127.0.0.1:15020",
                                   "--ip", self.ip, "--admin", f"127.0.0.1:{ENVOY_ADMIN}"], check=True, capture_output=True)
            path = f"{self.folder.name}/envoy.yaml"
            open(path, "wb").write(made.stdout)
            self.start("proxy", [ENVOY, "-c", path, "--concurrency", self.workers, "--use-dynamic-base-id", "-l", "warn",
                                 "--component-log-level", "wasm:info"])
        else:
            self.start("proxy", [PROXY_HOST, "--controller", f"{'https' if self.tls else 'http'}://127.0.0.1:{port}", *self.tls, "--transparent", "0.0.0.0:15001",
                                 "--http-proxy", "127.0.0.1:15020", "--ip", self.ip, "--threads", self.workers,
                                 "--access-log=false"])

    def admin(self, page):
        return urllib.request.urlopen(f"http://127.0.0.1:{ADMIN}/{page}", timeout=5).read().decode()

    def metric(self, name):
        for line in self.admin("metrics").splitlines():
            if re.match(rf"portolan_{name}(_total)? ", line):
                return int(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def envoy_stat(self, name):
        text = urllib.request.urlopen(f"http://127.0.0.1:{ENVOY_ADMIN}/stats?filter={name}", timeout=5).read().decode()
        return {k: int(v) for k, v in (line.rsplit(": ", 1) for line in text.splitlines() if ": " in line) if v.isdigit()}

    def envoy_clusters(self):
        held = urllib.request.urlopen(f"http://127.0.0.1:{ENVOY_ADMIN}/clusters?format=json", timeout=5).read()
        return {c["name"] for c in json.loads(held)["cluster_statuses"]}

    def envoy_filters(self):
        """Names of all filters of its listeners."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{ENVOY_ADMIN}/config_dump?resource=dynamic_listeners", timeout=5).read()
        return set(re.findall(r'"name": "(envoy\.filters\.[^"]+)"', text.decode()))

    def listening(self, port=15001):
        until(f"the proxy listens on {port}", lambda: any(f":{port} " in line for line in
              subprocess.run(["ss", "-Hltn"], capture_output=True, text=True).stdout.splitlines()))

    def probe(self, **p):
        return rig.probe(p, self.echo, 0)

    def get(self, host, dst="9.9.9.9:80", **more):
        return self.probe(dst=dst, host=host, **more)

    def serving(self, host, dst="9.9.9.9:80", status=200):
        until(f"{host} is answered with {status}", lambda: self.get(host, dst)["status"] == status)

    def every_worker(self, host, status=200, tries=20):
        """So many connections that each worker has had some: all are answered alike."""
        got = {self.get(host)["status"] for _ in range(tries)}
        assert got == {status}, (host, got)


class Gate:
    """Stands between proxy and controller, and can be slow, dead or mad."""
    def __init__(self, mode):
        self.mode, self.random = mode, random.Random(7)
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", GATE))
        self.listener.listen(64)
        self.open, self.carried = [], 0
        threading.Thread(target=self.accept, daemon=True).start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)                        # wakes the thread that accepts
        self.listener.close()
        self.cut()

    def cut(self):
        """Ends every connection that is open."""
        for s in self.open:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass                                                    # it has ended already
        self.open = []

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.open.append(client)
            threading.Thread(target=self.carry, args=(client,), daemon=True).start()

    def carry(self, client):
        if self.mode == "first" and len(self.open) > 1:
            return
        if self.mode == "garbage":
            try:
                client.recv(65536)
                client.sendall(self.random.randbytes(4096))
                client.close()
            except OSError:
                pass
            return
        try:
            server = socket.create_connection(("127.0.0.1", CONTROLLER))
        except OSError:
            client.close()
            return
        self.open.append(server)
        threading.Thread(target=self.pump, args=(client, server, False), daemon=True).start()
        self.pump(server, client, True)

    def pump(self, source, sink, down):
        try:
            while data := source.recv(1400 if self.mode == "slow" else 65536):
                if down:
                    self.carried += len(data)
                    if self.mode == "slow":
                        time.sleep(0.05)
                    if self.mode == "flip" and len(data) > 200:
                        # Somewhere in the payload: frames stay frames, and what they carry is wrong.
                        data = bytearray(data)
                        for _ in range(8):
                            data[self.random.randrange(100, len(data))] ^= 1 << self.random.randrange(8)
                sink.sendall(data)
        except OSError:
            pass
        for s in (source, sink):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


BASIC = {"basic.yaml": entry("web", "web.example.com", [(80, "HTTP"), (443, "TLS")], "10.0.0.1")
         + entry("grpc", "grpc.example.com", [(9000, "GRPC")], "10.0.0.2")
         + entry("db", "db.example.com", [(3306, "TCP")], "10.0.0.3", "  addresses: [10.9.9.9]\n")}
