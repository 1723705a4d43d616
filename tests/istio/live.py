#!/usr/bin/env python3
"""live.py: deploy/istio in a mesh that lives, but for containers: kube-apiserver and etcd, istiod, and pods that are network namespaces
with Istio's own iptables rules and its agent. `live.sh` builds what is needed, and gives it a network and mounts of its own.

Not Istio's own: Envoy is the stock one of .venv, so istiod is told to leave out the filters of istio-proxy (metadata exchange, statistics,
ALPN); names are in /etc/hosts; injection is done here; the registry is a few lines of HTTP.
"""
import base64, contextlib, http.server, json, os, pathlib, re, socketserver, ssl, subprocess, sys, threading, time, urllib.request

import yaml

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests/kubernetes"))
from cluster import Cluster, Refused, documents, metric, until                             # noqa: E402

PORTOLAN = os.environ.get("PORTOLAN", ROOT / "target/debug/portolan")
WASM = os.environ.get("FILTER_WASM", ROOT / "target/filter/wasm32-wasip1/wasm/portolan_filter.wasm")
ENVOY = os.environ.get("ENVOY", ROOT / ".venv/bin/envoy")
ISTIO, BUILT = pathlib.Path(os.environ["ISTIO_SOURCE"]), pathlib.Path(os.environ["ISTIO_BUILT"])
ISTIOD, CONTROLLER, REGISTRY, GATE = "10.96.0.2", "10.96.0.3", "10.96.0.4", "10.244.0.1"
OUTSIDE = {"api.example.org": "203.0.113.10", "other.example.org": "203.0.113.11", "db.example.org": "203.0.113.12",
           "late.example.org": "203.0.113.13"}
NAMES = {"istiod.istio-system.svc": ISTIOD, "portolan.portolan-system.svc.cluster.local": CONTROLLER, "registry.example.com": REGISTRY, **OUTSIDE}
STARTED = time.monotonic()


def say(text):
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


def sh(command):
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


class Origin(http.server.BaseHTTPRequestHandler):
    """The world outside: says what it was asked, and at which of its addresses."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = json.dumps({"at": self.connection.getsockname()[0], "host": self.headers["Host"],
                           "ours": [name for name in self.headers if name.lower().startswith("x-portolan")]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Images(http.server.BaseHTTPRequestHandler):
    """A registry of OCI images that has one, from its layout; as long as it is shut nothing at all."""
    protocol_version, layout, shut, asked = "HTTP/1.1", None, True, []

    def do_GET(self):
        self.asked.append(self.path)
        name = self.path.rsplit("/", 1)[1]
        data, kind = b"{}", "application/json"
        code = 503 if self.shut else 200
        if code == 200 and self.path != "/v2/":
            blob = self.layout / "blobs/sha256" / name.removeprefix("sha256:")
            code, data = (200, blob.read_bytes()) if blob.exists() else (404, b"{}")
            kind = "application/vnd.oci.image.manifest.v1+json" if "/manifests/" in self.path else "application/octet-stream"
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if name.startswith("sha256:"):
            self.send_header("Docker-Content-Digest", name)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def serve(address, port, handler, tls=None):
    server = http.server.ThreadingHTTPServer((address, port), handler)
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Banner(socketserver.BaseRequestHandler):
    """A server that speaks first."""
    def handle(self):
        self.request.sendall(b"welcome\n")


def page(port, path, host="127.0.0.1"):
    return urllib.request.urlopen(f"http://{host}:{port}/{path}", timeout=10).read().decode()


class Mesh(Cluster):
    """The cluster, istiod and the controller."""
    def __init__(self):
        sh("ip link set lo up; ip link add br0 type bridge; ip link set br0 up; mkdir -p /run/netns; mount -t tmpfs tmpfs /run/netns")
        for address in (ISTIOD, CONTROLLER, REGISTRY, *OUTSIDE.values()):
            sh(f"ip addr add {address}/32 dev lo")
        # The API server wants a default route, to find an address of its own.
        sh(f"ip addr add {GATE}/24 dev br0; ip route add default via 10.244.0.254")
        self.pods = {}
        super().__init__()
        self.path.chmod(0o755)
        (self.path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in NAMES.items()))
        (self.path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        sh(f"mount --bind {self.path}/hosts /etc/hosts; mount --bind {self.path}/resolv.conf /etc/resolv.conf")

    def begin(self, name, command, within=(), **env):
        """Starts it in a folder of its name, with nothing of our environment."""
        folder = self.path / name
        folder.mkdir(exist_ok=True, parents=True)
        log = open(self.path / f"{name}.log", "ab")
        clean = {"PATH": os.environ["PATH"], "HOME": str(folder)}
        self.processes[name] = subprocess.Popen([str(c) for c in (*within, *command)], cwd=folder, stdout=log, stderr=log, env={**clean, **env})

    def said(self, name, text):
        """How often that process has said so."""
        if self.processes[name].poll() is not None:
            raise AssertionError(f"{name} ended with {self.processes[name].returncode}")
        return (self.path / f"{name}.log").read_text(errors="replace").count(text)

    def put(self, text):
        for document in documents(text):
            self.apply(document)

    def away(self, text):
        for document in reversed(documents(text)):
            self.delete(document)

    def token(self, namespace, account, *audiences):
        made = self.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
                            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
                             "spec": {"audiences": list(audiences), "expirationSeconds": 86400}})
        return made["status"]["token"]

    def account(self, namespace, account):
        self.put(f"{{apiVersion: v1, kind: Namespace, metadata: {{name: {namespace}}}}}\n---\n"
                 f"{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {account}, namespace: {namespace}}}}}")

    def service(self, namespace, name, address, *ports):
        """A Service as its Deployment's would be, with the endpoint that is here."""
        self.put(json.dumps({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
                             "spec": {"clusterIP": address, "ports": [{"name": n, "port": p} for n, p in ports]}}))

    def crds(self):
        for document in documents((ISTIO / "manifests/charts/base/files/crd-all.gen.yaml").read_text()):
            self.create(document)
        for path in ("networking.istio.io/v1/serviceentries", "networking.istio.io/v1alpha3/envoyfilters", "extensions.istio.io/v1alpha1/wasmplugins"):
            until(f"{path} is served", lambda: self.served(f"/apis/{path}"))

    def served(self, path):
        try:
            return self.request("GET", path)
        except Refused:
            return None

    def istiod(self):
        """Its CA signs itself; what it says on the API server it says as an administrator."""
        self.account("istio-system", "istiod")
        self.service("istio-system", "istiod", ISTIOD, ("grpc-xds", 15010), ("https-dns", 15012))
        self.start_istiod()
        self.root = until("istiod publishes the root of its CA", self.published, 120, 0.2)

    def start_istiod(self):
        (self.path / "mesh.yaml").write_text("accessLogFile: /dev/stdout\ndefaultProviders: {}\nenablePrometheusMerge: false\n")
        self.begin("istiod", [BUILT / "pilot-discovery", "discovery", "--kubeconfig", self.kubeconfig("admin"), "--meshConfig", self.path / "mesh.yaml",
                              "--secureGRPCAddr", f"{ISTIOD}:15012", "--grpcAddr", "", "--monitoringAddr", "127.0.0.1:15014", "--httpAddr", "127.0.0.1:8080",
                              "--httpsAddr", f"{ISTIOD}:15017", "--ctrlz_port", "0", "--shutdownDuration", "1s"],
                   POD_NAME="istiod-1", POD_NAMESPACE="istio-system", SERVICE_ACCOUNT="istiod", PILOT_CERT_PROVIDER="istiod", CLUSTER_ID="Kubernetes",
                   REVISION="default", INJECTION_WEBHOOK_CONFIG_NAME="", VALIDATION_WEBHOOK_CONFIG_NAME="", PILOT_ENABLE_METADATA_EXCHANGE="false",
                   PILOT_ENABLE_ALPN_FILTER="false")

    def published(self):
        self.said("istiod", "")
        found = self.served("/api/v1/namespaces/istio-system/configmaps/istio-ca-root-cert")
        return found and found["data"]["root-cert.pem"]

    def agent(self, name, namespace, account, role, within=(), **env):
        """An agent in a folder that has what a pod would mount."""
        folder = self.path / name
        for path, text in {"var/run/secrets/istio/root-cert.pem": self.root, "etc/istio/proxy/.made": "",
                           "var/run/secrets/tokens/istio-token": self.token(namespace, account, "istio-ca"),
                           "var/run/secrets/workload-spiffe-uds/.made": "", "certs/.made": ""}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        labels = env.pop("labels", {})
        (folder / "etc/istio/pod").mkdir()
        (folder / "etc/istio/pod/labels").write_text("".join(f'{k}="{v}"\n' for k, v in labels.items()))
        sh(f"chown -R 1337:1337 {folder}")
        config = {"discoveryAddress": "istiod.istio-system.svc:15012", "binaryPath": str(ENVOY), "concurrency": 2, "terminationDrainDuration": "1s"}
        caps = "+dac_override,+dac_read_search,+net_bind_service"
        user = ["setpriv", "--reuid", "1337", "--regid", "1337", "--clear-groups", "--inh-caps", caps, "--ambient-caps", caps]
        self.begin(name, [*user, BUILT / "pilot-agent", "proxy", role, "--domain", f"{namespace}.svc.cluster.local", "--proxyLogLevel=warning,wasm:info",
                          "--templateFile", ISTIO / "tools/packaging/common/envoy_bootstrap.json"], within,
                   POD_NAME=name, POD_NAMESPACE=namespace, SERVICE_ACCOUNT=account, CA_ADDR="istiod.istio-system.svc:15012", PILOT_CERT_PROVIDER="istiod",
                   PROXY_CONFIG=json.dumps(config), ISTIO_META_CLUSTER_ID="Kubernetes", ISTIO_META_WORKLOAD_NAME=name, ISTIO_META_MESH_ID="cluster.local",
                   TRUST_DOMAIN="cluster.local", WASM_INSECURE_REGISTRIES="registry.example.com", **env)
        return folder

    def controller(self):
        """As deploy/kubernetes has it, with the certificate that an agent beside it gets from istiod."""
        self.account("portolan-system", "portolan")
        kinds = {"ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ConfigMap"}
        for document in documents((ROOT / "deploy/kubernetes/controller.yaml").read_text()):
            if document["kind"] in kinds:
                self.apply(document)
        self.service("portolan-system", "portolan", CONTROLLER, ("grpc-registry", 15012))
        certs = self.agent("controller-agent", "portolan-system", "portolan", "sidecar", DISABLE_ENVOY="true", OUTPUT_CERTS="./certs") / "certs"
        until("the agent writes the controller's certificate", (certs / "cert-chain.pem").exists, 60, 0.1)
        until("and the root", (certs / "root-cert.pem").exists, 60, 0.1)
        self.tokens["controller"] = self.token("portolan-system", "portolan", "https://kubernetes.default.svc")
        (self.path / "registry-only.yaml").write_text("outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n")
        self.begin("controller", [PORTOLAN, "serve", "--kubernetes", "--kubeconfig", self.kubeconfig("controller"), "--mesh", self.path / "registry-only.yaml",
                                  "--listen", f"{CONTROLLER}:15012", "--tls-cert", certs / "cert-chain.pem", "--tls-key", certs / "key.pem",
                                  "--tls-client-ca", certs / "root-cert.pem", "--admin", f"{CONTROLLER}:15014"])
        until("the controller is ready", lambda: page(15014, "ready", CONTROLLER), 60)

    def pod_of(self, name, number, namespace, account, role, labels):
        """A network namespace with Istio's redirection, and the agent with its Envoy in it."""
        ip = f"10.244.0.{number}"
        self.account(namespace, account)
        self.pod(name, ip, labels, namespace, serviceAccountName=account)
        for command in (f"ip netns add {name}", f"ip link add v{number} type veth peer name eth0 netns {name}", f"ip link set v{number} master br0 up",
                        f"ip -n {name} link set lo up", f"ip -n {name} addr add {ip}/24 dev eth0", f"ip -n {name} link set eth0 up",
                        f"ip -n {name} route add default via {GATE}"):
            sh(command)
        inside = ["nsenter", f"--net=/run/netns/{name}"]
        if role == "sidecar":
            rules = [BUILT / "pilot-agent", "istio-iptables", "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "",
                     "-b", "*", "-d", "15090,15021,15020"]
            subprocess.run([*inside, *rules], check=True, stdout=open(self.path / f"{name}-iptables.log", "wb"), stderr=subprocess.STDOUT)
        self.pods[name] = inside
        self.agent(name, namespace, account, role, inside, INSTANCE_IP=ip, labels=labels)
        until(f"{name} is ready", lambda: self.inside(name, "http://127.0.0.1:15021/healthz/ready")[0] == 200, 120, 0.2)

    def inside(self, pod, url, *more):
        """Status and body of a request from within the pod; status 0: the connection came to nothing."""
        asked = subprocess.run([*self.pods[pod], "curl", "-sk", "--max-time", "15", "-w", "\n%{http_code}", url, *more], capture_output=True, text=True)
        body, _, status = asked.stdout.rpartition("\n")
        return int(status), body

    def said_by(self, pod, host, port, data):
        """What comes back for these bytes."""
        code = (f"import socket, sys; s = socket.create_connection(({host!r}, {port}), 10); s.sendall({data!r})\ntry: sys.stdout.buffer.write(s.recv(4096))\n"
                "except ConnectionError: pass")
        return subprocess.run([*self.pods[pod], sys.executable, "-c", code], check=True, capture_output=True).stdout

    def envoy(self, pod, path):
        return self.inside(pod, f"http://127.0.0.1:15000/{path}")[1]

    def show(self):
        for name in sorted(set(self.processes) - {"etcd", "apiserver"}):
            log = self.path / f"{name}.log"
            if log.exists():
                print(f"--- {name}\n" + "\n".join(line[:600] for line in log.read_text(errors="replace").splitlines()[-25:]), file=sys.stderr)

    def close(self):
        for name in reversed(list(self.processes)):
            process = self.processes.pop(name)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        self.folder.cleanup()


def image(folder):
    """The image of this build; the manifests with its digest in them."""
    made = subprocess.run([ROOT / "deploy/wasm-image.py", WASM, folder], check=True, capture_output=True, text=True)
    digest = made.stdout.strip().removeprefix("sha256:")
    Images.layout = folder
    return lambda *names, namespace="istio-system": "".join((ROOT / "deploy/istio" / name).read_text() for name in names).replace(
        "sha256:DIGEST", f"sha256:{digest}").replace("namespace: istio-system", f"namespace: {namespace}")


def entry(name, host, ports, extra="", namespace="shop"):
    lines = "".join(f"  - {{number: {n}, name: p{n}, protocol: {p}}}\n" for n, p in ports.items())
    return (f"---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
            f"spec:\n  hosts: [{host}]\n  ports:\n{lines}  resolution: STATIC\n  endpoints: [{{address: {OUTSIDE[host]}}}]\n{extra}")


def outside(mesh):
    sh(f"cd {mesh.path} && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=example.org -keyout key.pem -out cert.pem -days 1 2>&1")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(mesh.path / "cert.pem", mesh.path / "key.pem")
    for address in OUTSIDE.values():
        for port in (80, 8000, 9000):
            serve(address, port, Origin)
        serve(address, 443, Origin, tls)
        serve(address, 3306, Banner)
    serve(REGISTRY, 443, Images, tls)


def seconds(what, function, limit=60):
    began = time.monotonic()
    until(what, function, limit, 0.01)
    return time.monotonic() - began


def answers(mesh, pod, *urls):
    return [mesh.inside(pod, url)[0] for url in urls]


def responses(mesh, pod):
    """What istiod has sent to this pod's agent so far, by the agent's own count."""
    return metric(mesh.inside(pod, "http://127.0.0.1:15020/metrics")[1], "istio_agent_xds_proxy_responses")


def expect(pod, mesh, wanted):
    for url, status in wanted.items():
        got, body = mesh.inside(pod, url)
        assert got == status, f"{url}: {got}, not {status}: {body}"
        say(f"  {pod}: {url} -> {status or 'closed'}" + (f": {body.strip()}" if status >= 400 else ""))
        if status == 200:
            told = json.loads(body)
            assert told["at"] == OUTSIDE[told["host"].split(":")[0]] and not told["ours"], body


# What nobody declared, in each way that istiod's listeners have.
UNKNOWN = ("http://other.example.org/", "https://other.example.org/", "http://other.example.org:9000/", "http://other.example.org:15012/")


def without_module(mesh, manifests):
    """The registry answers nobody: the filter is asked for, and not there."""
    assert answers(mesh, "shop-1", *UNKNOWN[:3]) == [200, 200, 200], "without Portolan istiod lets everything out"
    say("before: unknown hosts are let out")
    mesh.put(manifests("sidecar.yaml", "filter.yaml", "sidecars.yaml", namespace="shop"))
    took = seconds("nothing goes out", lambda: all(status in (0, 403, 500) for status in answers(mesh, "shop-1", *UNKNOWN)))
    until("the agent was refused the module", lambda: mesh.said("shop-1", "applying deny RBAC filter") == 3)
    say(f"deploy/istio for the namespace, registry down: closed after {took:.1f} s, {answers(mesh, 'shop-1', *UNKNOWN)}; "
        "the agent puts a filter in its place that denies")
    took = seconds("a new pod is ready", lambda: mesh.pod_of("shop-2", 12, "shop", "default", "sidecar", {"app": "shop"}) or True)
    closed = answers(mesh, "shop-2", *UNKNOWN)
    assert set(closed) <= {0, 403, 500}, closed
    say(f"a new pod is ready after {took:.1f} s, when its agent has given up, and as closed: {closed}")
    Images.shut = False
    fetch = {"metadata": {"annotations": {"portolan.io/fetch": "again"}}, "spec": {"priority": 1}}
    mesh.request("PATCH", "/apis/networking.istio.io/v1alpha3/namespaces/shop/envoyfilters/portolan", fetch, "application/merge-patch+json")
    took = seconds("the filter decides", lambda: all(answers(mesh, pod, *UNKNOWN[:2]) == [502, 0] for pod in ("shop-1", "shop-2")))
    held = mesh.envoy("shop-1", "config_dump?resource=ecds_filters")
    files = set(re.findall(r'"filename": "([^"]+)"', held))
    assert len(files) == 1 and pathlib.Path(*files).read_bytes() == pathlib.Path(WASM).read_bytes(), files
    say(f"registry up, and the EnvoyFilter changed: the filter decides after {took:.1f} s; the agent has fetched oci://…@sha256 into {files.pop()}, "
        f"for {held.count('ecds_filter')} filters")


def decides(mesh):
    mesh.put(entry("api", "api.example.org", {80: "HTTP", 443: "TLS"}) + entry("db", "db.example.org", {9000: "TCP", 3306: "TCP"}, f"  addresses: [{OUTSIDE['db.example.org']}]\n"))
    until("the entry is in force", lambda: mesh.inside("shop-1", "http://api.example.org/")[0] == 200)
    expect("shop-1", mesh, {"http://api.example.org/": 200, "https://api.example.org/": 200, "http://db.example.org:9000/": 200,
                            "http://other.example.org/": 502, "https://other.example.org/": 0, "http://other.example.org:9000/": 502,
                            "http://other.example.org:15012/": 502, "http://api.example.org:8000/": 502})
    for host, port, data, answer in (("db.example.org", 9000, b"no HTTP\n", b"400"), ("other.example.org", 9000, b"no HTTP\n", b""),
                                     ("db.example.org", 3306, b"", b"welcome"), ("other.example.org", 3306, b"", b"")):
        got = mesh.said_by("shop-1", host, port, data)
        assert answer in got and bool(got) == bool(answer), f"{host}:{port}: {got}"
        say(f"  shop-1: {data or 'silence'} to {host}:{port} -> {'answered' if got else 'closed'}")
    # One on a port that istiod has a listener for, one on another.
    for host in ("other.example.org", "other.example.org:15012"):
        until(f"the access log tells of {host}", lambda: re.search(rf"portolan_denied.*\"{host}\"", (mesh.path / "shop-1.log").read_text(errors="replace")))


def mutual_tls(mesh):
    text = page(15014, "metrics", CONTROLLER)
    streams = metric(text, "portolan_subscribers"), metric(text, "portolan_discovery_streams")
    assert all(streams) and not metric(text, "portolan_denied") and not metric(text, "portolan_nacks"), text
    errors = {kind: metric(text, "portolan_kubernetes_watch_errors", kind=kind) for kind in ("ServiceEntry", "Service", "Sidecar", "EndpointSlice")}
    assert not any(errors.values()), f"the ClusterRole of deploy/kubernetes is too little: {errors}"
    clusters = sorted(set(re.findall(r"^(outbound\|[^:]+example.org)::", mesh.envoy("shop-1", "clusters"), re.M)))
    assert clusters == ["outbound|3306||db.example.org", "outbound|443||api.example.org", "outbound|80||api.example.org", "outbound|9000||db.example.org"], clusters
    bare = mesh.inside("shop-1", f"https://{CONTROLLER}:15012/", "--http2-prior-knowledge")
    say(f"the controller: {streams[0]:.0f} registry streams and {streams[1]:.0f} for clusters, none refused; Envoy was given {clusters}; "
        f"without a certificate: {bare[0] or 'closed'}")
    assert bare[0] == 0, bare


def changes(mesh):
    """Without istiod at all."""
    mesh.stop("istiod")
    before, took, gone = responses(mesh, "shop-1"), [], []
    for _ in range(5):
        began = time.monotonic()
        mesh.put(entry("late", "late.example.org", {80: "HTTP"}))
        until("a new entry is in force", lambda: mesh.inside("shop-1", "http://late.example.org/")[0] == 200, pause=0)
        took.append(time.monotonic() - began)
        began = time.monotonic()
        mesh.away(entry("late", "late.example.org", {80: "HTTP"}))
        until("and is gone", lambda: mesh.inside("shop-1", "http://late.example.org/")[0] == 502, pause=0)
        gone.append(time.monotonic() - began)
    pushed = responses(mesh, "shop-1") - before
    say(f"istiod stopped, and a ServiceEntry made 5 times: answered after at most {max(took) * 1000:.0f} ms, and gone after {max(gone) * 1000:.0f} ms, by a client "
        f"started anew each time; responses of istiod to this pod meanwhile: {pushed:.0f}")
    assert pushed == 0
    mesh.start_istiod()
    until("the agent has found istiod again", lambda: mesh.said("shop-1", "connected to delta upstream XDS server") == 2, 60)


def back_out(mesh, manifests):
    mesh.away(manifests("sidecars.yaml", namespace="shop"))
    mesh.away(manifests("sidecar.yaml", "filter.yaml", namespace="shop"))
    took = seconds("unknown hosts are let out again", lambda: answers(mesh, "shop-1", *UNKNOWN[:3]) == [200, 200, 200])
    until("Envoy has no cluster of ours", lambda: "portolan::" not in re.findall(r"^\w+::", mesh.envoy("shop-1", "clusters"), re.M))
    listeners = json.loads(mesh.envoy("shop-1", "config_dump?resource=dynamic_listeners"))["configs"]
    ours = [listener["name"] for listener in listeners if "portolan-http" in json.dumps(listener.get("active_state"))]
    assert not ours, ours
    say(f"backed out: unknown hosts are let out again after {took:.1f} s; no listener and no cluster of ours is left")


def gateway_resources(mesh):
    """The Gateway of meshes/gateway.yaml with its VirtualService, to hosts that are here."""
    for document in documents((HERE / "meshes/gateway.yaml").read_text()):
        if document["kind"] == "ServiceEntry":
            document["spec"].update(resolution="STATIC", endpoints=[{"address": OUTSIDE["api.example.org"]}])
        yield document
    for kind, more in (("Role", {"rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "list", "watch"]}]}),
                       ("RoleBinding", {"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "egress"},
                                        "subjects": [{"kind": "ServiceAccount", "name": "egress", "namespace": "istio-system"}]})):
        yield {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": "egress", "namespace": "istio-system"}, **more}
    pair = {name: base64.b64encode((mesh.path / file).read_bytes()).decode() for name, file in (("tls.crt", "cert.pem"), ("tls.key", "key.pem"))}
    yield {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "api", "namespace": "istio-system"}, "type": "kubernetes.io/tls", "data": pair}


def gateway(mesh, manifests):
    """The whole mesh, and an egress gateway that its clients reach by address."""
    mesh.put(manifests("sidecar.yaml", "filter.yaml", "sidecars.yaml", "gateways.yaml"))
    for document in gateway_resources(mesh):
        mesh.apply(document)
    mesh.pod_of("egress-1", 11, "istio-system", "egress", "router", {"istio": "egressgateway"})

    def through(port, host, scheme="http"):
        asked = subprocess.run(["curl", "-sk", "--max-time", "15", "-w", "\n%{http_code}", f"{scheme}://{host}:{port}/",
                                "--connect-to", f"{host}:{port}:10.244.0.11:{port}"], capture_output=True, text=True)
        body, _, status = asked.stdout.rpartition("\n")
        return int(status), body
    until("the gateway serves", lambda: through(80, "api.example.org")[0] == 200, 60)
    for port, host, scheme, status in ((80, "api.example.org", "http", 200), (80, "other.example.org", "http", 404), (443, "api.example.org", "https", 200),
                                       (443, "other.example.org", "https", 0), (8443, "api.example.org", "https", 200), (9000, "any.example.org", "http", 200),
                                       (8081, "api.example.org", "http", 301)):
        got, body = through(port, host, scheme)
        say(f"  egress-1: {scheme}://{host}:{port}/ -> {got or 'closed'}" + (f": {body.strip()}" if got >= 400 else ""))
        assert got == status, (port, host, scheme, got, body)
        if got == 200:
            told = json.loads(body)
            assert told["at"] == OUTSIDE["api.example.org"] and not told["ours"], told
    before = responses(mesh, "egress-1")
    say(f"the egress gateway goes where the filter says; istiod's responses to it so far: {before:.0f}")
    until("the whole mesh follows", lambda: answers(mesh, "shop-1", *UNKNOWN[:2]) == [502, 0], 60)
    expect("shop-1", mesh, {"http://api.example.org/": 200, "http://other.example.org/": 502})


def main():
    with contextlib.ExitStack() as stack:
        sh("mount -t tmpfs tmpfs /var/lib; mkdir -p /var/lib/istio/data; chmod 777 /var/lib/istio/data")
        mesh = stack.enter_context(contextlib.closing(Mesh()))
        try:
            run(mesh)
        except BaseException:
            mesh.show()
            raise


def run(mesh):
    say(f"{pathlib.Path(os.environ['KUBE_APISERVER']).name}, istiod {os.environ['ISTIO_VERSION']}")
    mesh.crds()
    mesh.istiod()
    mesh.controller()
    outside(mesh)
    manifests = image(mesh.path / "image")
    mesh.pod_of("shop-1", 10, "shop", "default", "sidecar", {"app": "shop"})
    say("istiod, the controller with a certificate of its CA, and a pod with agent and Envoy are ready")
    without_module(mesh, manifests)
    decides(mesh)
    mutual_tls(mesh)
    changes(mesh)
    back_out(mesh, manifests)
    gateway(mesh, manifests)
    print("all seen")


if __name__ == "__main__":
    main()
