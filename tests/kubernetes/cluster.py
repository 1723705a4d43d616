"""A real kube-apiserver with its etcd on loopback, and a client of it. There is no scheduler and no kubelet: Pods have the
status that a test writes."""
import contextlib, http.client, json, os, pathlib, re, secrets, signal, ssl, subprocess, sys, tempfile, threading, urllib.parse

import yaml

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import PATIENCE, free_port, until  # noqa: E402

ISTIO = "networking.istio.io/v1"
PLURALS = {"ServiceEntry": "serviceentries", "WorkloadEntry": "workloadentries", "VirtualService": "virtualservices",
           "DestinationRule": "destinationrules", "Gateway": "gateways", "Sidecar": "sidecars",
           "EndpointSlice": "endpointslices", "NetworkPolicy": "networkpolicies", "Ingress": "ingresses",
           "PodDisruptionBudget": "poddisruptionbudgets", "ServiceMonitor": "servicemonitors", "PrometheusRule": "prometheusrules"}
CLUSTER_WIDE = {"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "ValidatingWebhookConfiguration"}


class Refused(Exception):
    def __init__(self, code, status):
        super().__init__(f"{code}: {status.get('message')}")
        self.code, self.status = code, status


class Cluster:
    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="portolan-kubernetes.")
        self.path = pathlib.Path(self.folder.name)
        self.etcd, self.peer, self.port = free_port(), free_port(), free_port()
        # Users by token: the administrator, and those that scenarios bind to roles.
        self.tokens = {name: secrets.token_hex(16) for name in ("admin", "portolan", "denied", "selected")}
        groups = {"admin": ',"system:masters"'}
        lines = [f"{token},{name},{name}{groups.get(name, '')}\n" for name, token in self.tokens.items()]
        (self.path / "tokens.csv").write_text("".join(lines))
        subprocess.run(["openssl", "genrsa", "-out", "sa.key", "2048"], cwd=self.path, check=True, capture_output=True)
        subprocess.run(["openssl", "rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"], cwd=self.path, check=True, capture_output=True)
        self.processes, self.local = {}, threading.local()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.start_etcd()
            self.start()
            undo.pop_all()

    def spawn(self, name, command):
        log = open(self.path / f"{name}.log", "ab")
        self.processes[name] = subprocess.Popen([str(c) for c in command], cwd=self.path, stdout=log, stderr=log)

    def start_etcd(self):
        url, peer = f"http://127.0.0.1:{self.etcd}", f"http://127.0.0.1:{self.peer}"
        self.spawn("etcd", ["etcd", "--data-dir", "etcd", "--listen-client-urls", url, "--advertise-client-urls", url,
                            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                            "--initial-cluster", f"default={peer}", "--unsafe-no-fsync"])

    def start(self):
        self.spawn("apiserver", [
            os.environ["KUBE_APISERVER"], f"--etcd-servers=http://127.0.0.1:{self.etcd}", f"--secure-port={self.port}",
            "--bind-address=127.0.0.1", "--cert-dir=certs", "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-key-file=sa.pub", "--service-account-signing-key-file=sa.key", "--authorization-mode=RBAC",
            "--token-auth-file=tokens.csv", "--service-cluster-ip-range=10.96.0.0/16", "--max-requests-inflight=2000",
            "--max-mutating-requests-inflight=1000", "--disable-admission-plugins=ServiceAccount"])
        until("the API server is ready", self.ready, 90, 0.2)

    def ready(self):
        try:
            return self.request("GET", "/readyz")
        except Refused:
            return False

    def stop(self, name="apiserver", how=signal.SIGKILL):
        process = self.processes.pop(name)
        process.send_signal(how)
        process.wait(PATIENCE)

    def close(self):
        for name in list(self.processes):
            self.stop(name)
        self.folder.cleanup()

    def kubeconfig(self, user):
        """A kubeconfig of that user; the certificate is checked."""
        path = self.path / f"{user}.kubeconfig"
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": f"https://127.0.0.1:{self.port}",
                                                      "certificate-authority": str(self.path / "certs/apiserver.crt")}}],
            "users": [{"name": user, "user": {"token": self.tokens[user]}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}]}))
        return path

    def request(self, method, path, body=None, kind="application/json", user="admin"):
        headers = {"Authorization": f"Bearer {self.tokens[user]}", "Content-Type": kind}
        data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        connection = getattr(self.local, "connection", None)
        while True:
            kept = connection is not None
            if not kept:
                context = ssl._create_unverified_context()
                connection = self.local.connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=context)
            try:
                connection.request(method, path, data, headers)
                response = connection.getresponse()
                text = response.read()
                break
            except Exception as error:
                connection.close()
                connection = self.local.connection = None
                # The API server may end a connection at any time between two requests.
                if not (kept and isinstance(error, (ConnectionError, ssl.SSLEOFError))):
                    raise
        answer = json.loads(text) if text[:1] == b"{" else {"text": text.decode(), "message": text.decode()}
        answer["warnings"] = [v for k, v in response.getheaders() if k == "Warning"]
        if response.status >= 300:
            raise Refused(response.status, answer)
        return answer

    def address(self, resource, name=True, sub=""):
        version, kind, meta = resource["apiVersion"], resource["kind"], resource.get("metadata", {})
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        plural = PLURALS.get(kind, kind.lower() + "s")
        inside = "" if kind in CLUSTER_WIDE else f"/namespaces/{meta.get('namespace', 'default')}"
        last = f"/{urllib.parse.quote(meta.get('name', ''))}" if name else ""
        return f"{root}{inside}/{plural}{last}{sub}"

    def create(self, resource, query="", **how):
        return self.request("POST", self.address(resource, name=False) + query, resource, **how)

    def apply(self, resource, query="", sub="", **how):
        """Server-side apply; fields that the schema does not have are an error."""
        query = f"?fieldManager=test&force=true&fieldValidation=Strict{query}"
        return self.request("PATCH", self.address(resource, sub=sub) + query, resource, "application/apply-patch+yaml", **how)

    def get(self, resource):
        return self.request("GET", self.address(resource))

    def delete(self, resource, query="?gracePeriodSeconds=0"):
        return self.request("DELETE", self.address(resource) + query)

    def pod(self, name, ip, labels, namespace="default", ready=True, **more):
        """A Pod with the status that a kubelet would write."""
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": labels},
               "spec": {"containers": [{"name": "c", "image": "none"}], **more}}
        made = self.create(pod)
        made.pop("warnings")
        made["status"] = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                          "conditions": [{"type": "Ready", "status": "True" if ready else "False"}]}
        self.request("PUT", self.address(pod, sub="/status"), made)
        return pod


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def metric(text, name, **labels):
    """A value of a Prometheus page."""
    for line in text.splitlines():
        found = re.match(rf"{name}(?:_total)?(?:{{(.*)}})? (\S+)$", line)
        if found and all(f'{k}="{v}"' in (found[1] or "") for k, v in labels.items()):
            return float(found[2])
    raise AssertionError(f"no metric {name} {labels} in\n{text}")
