#!/usr/bin/env python3
"""envoy.py PORTOLAN ORIGIN WASM ENVOY [ENTRIES]: a real Envoy with the filter, `portolan serve` behind it.

Makes ENTRIES ServiceEntries of two ports in files of 100 and measures, each answer checked before it counts: memory of
Envoy and the controller, bytes to a filter that connects and for one changed entry, from a change to its effect, CPU of a
request against the same Envoy with one native route, the slowest request while everything changes, and memory after
SOAK changes. SUBSCRIBERS names the example of that name of portolan-controller: then 1,000 of them are added at the end.
"""
import json, multiprocessing, os, re, socket, statistics, subprocess, sys, tempfile, time, urllib.request

PORTOLAN, ORIGIN, WASM, ENVOY = (os.path.abspath(a) for a in sys.argv[1:5])
ENTRIES = int(sys.argv[5]) if len(sys.argv) > 5 else 10_000
SUBSCRIBERS = os.environ.get("SUBSCRIBERS")
# Where the listeners are.
ADDRESS = os.environ.get("ADDRESS", "127.0.0.1")
SOAK = int(os.environ.get("SOAK", 10_000))
PER_FILE = 100
PORTS = {}


def port(name):
    if name not in PORTS:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            PORTS[name] = s.getsockname()[1]
    return PORTS[name]


def entry(i, path=""):
    return f"""apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: entry-{i}, namespace: default}}
spec:
  hosts: [host{path}-{i}.example.com]
  ports:
  - {{number: {port('http')}, name: http, protocol: HTTP, targetPort: {port('origin')}}}
  - {{number: {port('tls')}, name: tls, protocol: TLS}}
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1}}]
"""


def write(folder, file, skip=None, path=""):
    """Whole or not at all, as editors and kubelet do."""
    ids = range(file * PER_FILE, min((file + 1) * PER_FILE, ENTRIES))
    text = "---\n".join(entry(i, path) for i in ids if i != skip)
    name = f"{folder}/entries-{file:05}.yaml"
    with open(name + ".new", "w") as f:
        f.write(text)
    os.rename(name + ".new", name)


class Client:
    """One keep-alive connection."""
    def __init__(self, to):
        self.s = socket.create_connection((ADDRESS, to))
        self.s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, host):
        self.s.sendall((f"GET /index.html HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\nAccept: */*\r\n"
                        "Accept-Encoding: gzip\r\nX-Request-Id: 7d5f0a3c-2e7b-4f5e-9d53-0f6f3a0f1b2c\r\n\r\n").encode())

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

    def status(self, host):
        self.send(host)
        return self.receive()


class Flow:
    """Requests one after another from a process of its own, so that what else this one does keeps none of them waiting."""
    def __init__(self, host):
        fork = multiprocessing.get_context("fork")
        self.end, (self.result, result) = fork.Event(), fork.Pipe(False)
        self.process = fork.Process(target=self.run, args=(host, result), daemon=True)
        self.process.start()

    def run(self, host, result):
        client, worst = Client(port("http")), 0.0
        while not self.end.is_set():
            begin = time.monotonic()
            assert client.status(host) == 200
            worst = max(worst, time.monotonic() - begin)
        result.send(worst * 1000)

    def slowest(self):
        """Ends it; the slowest request, in ms."""
        self.end.set()
        return self.result.recv()


def until(host, wanted, limit=120):
    """Seconds until a request is answered so."""
    start, client = time.monotonic(), None
    while time.monotonic() - start < limit:
        try:
            client = client or Client(port("http"))
            if client.status(host) == wanted:
                return time.monotonic() - start
        except OSError:
            client = None
            time.sleep(0.002)
    raise SystemExit(f"{host} was not answered with {wanted} within {limit} s")


def memory(process):
    text = open(f"/proc/{process.pid}/status").read()
    return int(re.search(r"VmRSS:\s+(\d+)", text).group(1)) / 1024


def cpu(process):
    """Seconds of all its threads."""
    tasks = f"/proc/{process.pid}/task"
    return sum(int(open(f"{tasks}/{t}/schedstat").read().split()[0]) for t in os.listdir(tasks)) / 1e9


def metric(name):
    text = urllib.request.urlopen(f"http://127.0.0.1:{port('admin')}/metrics").read().decode()
    return next(int(line.split()[-1]) for line in text.splitlines() if re.match(rf"portolan_{name}(_total)? ", line))


def load(to, host, requests, connections=8):
    """Closed loop over some connections."""
    clients = [Client(to) for _ in range(connections)]
    for _ in range(requests // connections):
        for c in clients:
            c.send(host)
        for c in clients:
            if c.receive() != 200:
                raise SystemExit(f"{host} on port {to} was refused under load")


def native(ours):
    """The same Envoy with one listener, one route as istiod has it, and one cluster: what it costs without us."""
    cluster = {"name": "origin", "type": "STATIC", "load_assignment": {"cluster_name": "origin", "endpoints": [{"lb_endpoints": [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port("origin")}}}}]}]}}
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "native", "normalize_path": True, "stream_idle_timeout": "0s",
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "include_request_attempt_count": True, "routes": [
            {"match": {"prefix": "/"}, "route": {"cluster": "origin", "timeout": "0s", "retry_policy": {
                "retry_on": "connect-failure,refused-stream,unavailable,cancelled", "num_retries": 2,
                "host_selection_retry_max_attempts": 5, "retry_host_predicate": [{
                    "name": "envoy.retry_host_predicates.previous_hosts", "typed_config": {"@type": "type.googleapis.com/envoy"
                        ".extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"}}]}}}]}]}}
    return {**{key: ours[key] for key in ("overload_manager", "deferred_stat_options")},
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port("native admin")}}},
            "static_resources": {"clusters": [cluster], "listeners": [{
                "name": "native", "address": {"socket_address": {"address": ADDRESS, "port_value": port("native")}},
                "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}]}]}}


def main():
    with tempfile.TemporaryDirectory() as folder:
        config = f"{folder}/config"
        os.mkdir(config)
        with open(f"{config}/mesh.yaml", "w") as f:
            f.write("outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n")
        files = (ENTRIES + PER_FILE - 1) // PER_FILE
        for file in range(files):
            write(config, file)
        processes = []

        def start(*command):
            processes.append(subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL))
            return processes[-1]
        try:
            start(ORIGIN, "--listen", f"127.0.0.1:{port('origin')}")
            begun = time.monotonic()
            controller = start(PORTOLAN, "serve", "--config", config, "--listen", f"127.0.0.1:{port('serve')}",
                               "--admin", f"127.0.0.1:{port('admin')}", "--log-level", "error")
            bootstrap = subprocess.run(
                [PORTOLAN, "bootstrap", "envoy", "--plaintext", "--controller", f"127.0.0.1:{port('serve')}", "--filter", WASM,
                 "--output", "json", "--bind-ports", ADDRESS, "--admin", f"127.0.0.1:{port('envoy admin')}"], check=True, capture_output=True)
            with open(f"{folder}/envoy.json", "wb") as f:
                f.write(bootstrap.stdout)
            with open(f"{folder}/native.json", "w") as f:
                json.dump(native(json.loads(bootstrap.stdout)), f)
            options = ["--use-dynamic-base-id", "-l", "error", "--concurrency"]
            envoy = start(ENVOY, "-c", f"{folder}/envoy.json", *options, 1)
            plain = start(ENVOY, "-c", f"{folder}/native.json", *options, 1)
            last = f"host-{ENTRIES - 1}.example.com"
            until(last, 200)
            print(f"{ENTRIES} entries: {time.monotonic() - begun:.2f} s from nothing to the first right answer", flush=True)
            client = Client(port("http"))
            assert client.status("host-0.example.com") == 200 and client.status("nobody.example.com") == 502
            subscribers = metric("subscribers")
            print(f"bytes to a connecting filter: {metric('bytes') / subscribers / 1e6:.2f} MB per VM, {subscribers} VMs")
            print(f"memory: Envoy {memory(envoy):.0f} MB (the same without us {memory(plain):.0f}), "
                  f"controller {memory(controller):.0f} MB", flush=True)
            for i in range(100):
                assert client.status(f"host-{i}.example.com") == 200
            print(f"memory after 100 hosts were used: Envoy {memory(envoy):.0f} MB", flush=True)

            times, before = [], (metric("bytes"), metric("updates"))
            for n in range(100):
                file = (n * 37) % files
                changed = file * PER_FILE
                for skip, wanted in ((changed, 502), (None, 200)):
                    write(config, file, skip)
                    times.append(until(f"host-{changed}.example.com", wanted, 10) * 1000)
            times.sort()
            sent, updates = metric("bytes") - before[0], metric("updates") - before[1]
            print(f"one changed entry: {sent / updates:.0f} bytes per filter; in effect after {statistics.median(times):.1f} ms "
                  f"(median of {len(times)}), p99 {times[int(len(times) * 0.99)]:.1f} ms, {times[-1]:.1f} ms at most", flush=True)

            for to in (port("http"), port("native")):
                load(to, last, 8_000)  # V8 compiles what is used in the background

            def spent(process, to, requests=800):
                before = cpu(process)
                load(to, last, requests)
                return (cpu(process) - before) / requests * 1e6
            # In turns, so that whatever else the machine does meets both alike.
            rounds = [(spent(envoy, port("http")), spent(plain, port("native"))) for _ in range(41)][1:]
            least = [statistics.mean(sorted(r)[:10]) for r in zip(*rounds)]
            ratio = statistics.median(a / b for a, b in rounds)
            print(f"CPU per request: {least[0]:.1f} µs, native route {least[1]:.1f} µs in the least disturbed quarter: ratio "
                  f"{least[0] / least[1]:.2f}; median of the ratios of all rounds {ratio:.2f}", flush=True)

            def half():
                os.mkdir(f"{folder}/next")
                for file in range(files // 2, files):
                    write(f"{folder}/next", file, path="-new")
                flow = Flow("host-1.example.com")
                for name in sorted(os.listdir(f"{folder}/next")):
                    os.rename(f"{folder}/next/{name}", f"{config}/{name}")
                until(f"host-new-{ENTRIES - 1}.example.com", 200)
                return flow.slowest()
            idle = Flow("host-1.example.com")
            time.sleep(3)
            print(f"slowest request: {idle.slowest():.1f} ms idle, {half():.1f} ms while half of all entries change", flush=True)

            if SOAK:
                marks = []
                for n in range(SOAK):
                    write(config, n % (files // 2), skip=(n % (files // 2)) * PER_FILE + n % PER_FILE)
                    if n % 50 == 49:
                        client.status("host-0.example.com")
                    if (n + 1) % (SOAK // 5) == 0:
                        marks.append(f"{memory(envoy):.0f}/{memory(controller):.0f}")
                until(last.replace("host-", "host-new-"), 200)
                print(f"{SOAK} changes: Envoy/controller {' '.join(marks)} MB after each fifth, {metric('updates')} updates sent")
            if SUBSCRIBERS:
                crowd = subprocess.Popen([SUBSCRIBERS, f"http://127.0.0.1:{port('serve')}", "1000", "10"], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                print(f"{crowd.stdout.readline().strip()}: controller {memory(controller):.0f} MB", flush=True)
                crowd.stdin.close()
                crowd.wait(30)
        finally:
            for p in reversed(processes):
                p.terminate()
                p.wait(20)


main()
