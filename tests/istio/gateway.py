#!/usr/bin/env python3
"""gateway.py: the egress gateway of golden/gateway.json in a real Envoy: istiod's own listeners and routes, with deploy/istio in them,
our module and a controller that has the same resources. What an agent would do is done here: the module is a file, the way to
the controller has no TLS, the certificate is a file. Ports are free ones; istio-proxy's own filters are not in Envoy, and left out.
"""
import contextlib, http.client, http.server, json, pathlib, socket, ssl, subprocess, sys, tempfile, threading

import yaml

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from support import ENVOY, PORTOLAN, WASM, free_port, until  # noqa: E402

HOST = "api.example.org"


class Origin(http.server.BaseHTTPRequestHandler):
    """Says what it was asked."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = json.dumps({"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def resources(ports, origin):
    """The mesh's own, on these ports, and with something that istiod's routes would do as well."""
    for document in yaml.safe_load_all((HERE / "meshes/gateway.yaml").read_text()):
        spec = document["spec"]
        if document["kind"] == "Gateway":
            for server in spec["servers"]:
                server["port"]["number"] = ports[server["port"]["number"]]
        elif document["kind"] == "ServiceEntry":
            spec.update(resolution="STATIC", endpoints=[{"address": "127.0.0.1"}])
            for port in spec["ports"]:
                port["targetPort"] = origin
        elif document["kind"] == "VirtualService":
            spec["tcp"][0]["match"][0]["port"] = ports[9000]
            spec["tls"][0]["match"][0]["port"] = ports[443]
            first = {"match": [{"uri": {"prefix": "/v1"}}], "rewrite": {"uri": "/v1/v1"}, "headers": {"request": {"add": {"seen": "once"}}}}
            spec["http"].insert(0, {**first, "route": spec["http"][0]["route"]})
        else:
            continue
        yield document


def bootstrap(golden, ports, controller, folder):
    extensions, routes = ({e["name"]: e for e in golden[what]} for what in ("extensions", "routes"))

    def own(filter):
        """A filter as the agent would have it in the end."""
        if "config_discovery" not in filter:
            return filter
        found = json.loads(json.dumps(extensions[filter["name"]]["typed_config"]))
        found["config"]["vm_config"]["code"] = {"local": {"filename": str(WASM)}}
        return {"name": filter["name"], "typed_config": found}
    listeners = []
    for listener in golden["listeners"]:
        address = listener["address"]["socket_address"]
        written = address["port_value"]
        address.update(address="127.0.0.1", port_value=ports[written])
        for chain in listener["filter_chains"]:
            if "name" in chain:
                chain["name"] = chain["name"].replace(f".{written}.", f".{ports[written]}.")
            chain["filters"] = [own(filter) for filter in chain["filters"]]
            for filter in chain["filters"]:
                manager = filter["typed_config"]
                if "http_filters" in manager:
                    manager["http_filters"] = [own(f) for f in manager["http_filters"] if not f["name"].startswith("istio.")]
                    manager["route_config"] = routes[manager.pop("rds")["route_config_name"]]
            if "transport_socket" in chain:
                files = {"certificate_chain": {"filename": f"{folder}/cert.pem"}, "private_key": {"filename": f"{folder}/key.pem"}}
                chain["transport_socket"]["typed_config"] = {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                    "common_tls_context": {"tls_certificates": [files]}}
        listeners.append(listener)
    cluster = next(c for c in golden["clusters"] if c["name"] == "portolan")
    del cluster["transport_socket"]
    at = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    at.update(address="127.0.0.1", port_value=controller)
    node = {"id": "router~10.1.1.1~egress.istio-system~istio-system.svc.cluster.local", "cluster": "egress",
            "metadata": {"NAMESPACE": "istio-system", "LABELS": {"istio": "egressgateway"}}}
    return {"node": node, "static_resources": {"listeners": listeners, "clusters": [cluster]}}


@contextlib.contextmanager
def running(folder, name, command):
    log = folder / f"{name}.log"
    process = subprocess.Popen([str(c) for c in command], stdout=open(log, "wb"), stderr=subprocess.STDOUT)
    try:
        yield process
    except BaseException:
        print(f"--- {name}\n" + "\n".join(list(dict.fromkeys(line.split("] ", 2)[-1] for line in log.read_text().splitlines()))[-30:]), file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait(15)


def get(port, host, path="/", secure=False):
    """Status, headers and body."""
    if secure:
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection.sock = context.wrap_socket(plain, server_hostname=host)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Host": host, "x-portolan-cluster": "PassthroughCluster"})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()


def check(ports):
    status, _, body = until("the gateway serves", lambda: (a := get(ports[80], HOST))[0] == 200 and a)
    told = json.loads(body)
    ours = [name for name in told["headers"] if name.startswith("x-portolan")]
    assert told["path"] == "/" and not ours, f"the upstream is told {ours}"
    # With istiod's routes in force as well the second prefix would be taken for the first one.
    told = json.loads(get(ports[80], HOST, "/v1/x")[2])
    assert (told["path"], told["headers"]["seen"]) == ("/v1/v1/x", "once"), told
    for port, host in ((80, "other.example.org"), (8080, "other.example.org")):
        status, _, body = get(ports[port], host)
        assert status == 404 and "portolan" in body, (port, status, body)
    assert get(ports[8080], HOST)[0] == 200, "the VirtualService is for every server of its Gateway"
    status, headers, _ = get(ports[8081], HOST)
    assert (status, headers["location"]) == (301, f"https://{HOST}/"), (status, headers)
    assert get(ports[8443], HOST, secure=True)[0] == 200
    assert get(ports[9000], "anything")[0] == 200, "a TCP server takes any bytes"


def main():
    golden = json.loads((HERE / "golden/gateway.json").read_text())
    ports = {l["address"]["socket_address"]["port_value"]: free_port() for l in golden["listeners"]}
    origin = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    origin.daemon_threads = True
    threading.Thread(target=origin.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="portolan-gateway.") as name, contextlib.ExitStack() as stack:
        folder, controller, admin = pathlib.Path(name), free_port(), free_port()
        (folder / "config").mkdir()
        (folder / "config/mesh.yaml").write_text("outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n")
        (folder / "config/all.yaml").write_text(yaml.safe_dump_all(resources(ports, origin.server_port)))
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={HOST}",
                        "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "1"], check=True, capture_output=True)
        (folder / "envoy.json").write_text(json.dumps(bootstrap(golden, ports, controller, folder)))
        stack.enter_context(running(folder, "portolan", [PORTOLAN, "serve", "--config", folder / "config", "--listen", f"127.0.0.1:{controller}",
                                                         "--admin", f"127.0.0.1:{admin}"]))
        stack.enter_context(running(folder, "envoy", [ENVOY, "-c", folder / "envoy.json", "--concurrency", "1", "--use-dynamic-base-id", "-l", "warn",
                                                      "--component-log-level", "wasm:info"]))
        check(ports)
    origin.shutdown()
    print(f"istiod {golden['istio']}: its egress gateway in Envoy goes where the filter says")


if __name__ == "__main__":
    main()
