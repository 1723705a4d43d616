"""Scenarios of what a stock Envoy does by its listeners and clusters and not when told by a header: mirrors, retries in place of
the default ones, delays. Also addresses of IPv6, and certificates that are replaced. scenarios.py runs them."""
import json, os, shutil, socket, subprocess, threading, time

from world import BASIC, World, entry, of_envoy, rig, scenario, until

COPIES = {"copies.yaml": entry("copy", "copy.example.com", [(80, "HTTP")], "10.0.0.5")
          + entry("some", "some.example.com", [(80, "HTTP")], "10.0.0.6")}
REFUSED = {"refused.yaml": entry("refused", "refused.example.com", [(80, "HTTP")], "198.51.100.9")}


def virtual_service(host, routes):
    return (f"apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: routes, namespace: default}}\n"
            f"spec:\n  hosts: [{host}]\n  http:\n{routes}")


def arrived(echo, path):
    """What reached an upstream with this path."""
    with echo.lock:
        return [e for e in echo.log if e.get("path") == path]


@scenario
def mirrors(kind, echo):
    """Copies go to every mirror that the VirtualService names, with the authority of the request and no order of ours; of a share
    only some; and none when the VirtualService has gone. The clusters come unasked, and go."""
    copies = {"outbound|80||copy.example.com", "outbound|80||some.example.com"}
    with World(kind, echo, BASIC | COPIES) as w:
        w.serving("web.example.com")
        if kind == "envoy":
            assert not copies & w.envoy_clusters(), "nothing is mirrored yet"
        w.write("routes.yaml", virtual_service("web.example.com", """\
  - route: [{destination: {host: web.example.com}}]
    mirrors:
    - destination: {host: copy.example.com}
    - {destination: {host: some.example.com}, percentage: {value: 50}}
"""))

        def copied():
            path = f"/copied-{time.monotonic_ns()}"
            assert w.get("web.example.com", path=path)["status"] == 200
            return any(e["dst"] == "10.0.0.5:80" for e in arrived(echo, path))
        until("a copy arrives", copied)
        for n in range(40):
            answer = w.get("web.example.com", path=f"/mirrored-{n}", method="POST", body="a body", show=["content-length"])
            assert answer["status"] == 200, answer

        def hosts(n):
            return sorted(e["dst"].split(":")[0] for e in arrived(echo, f"/mirrored-{n}"))
        until("every request and its copy has arrived", lambda: all({"10.0.0.1", "10.0.0.5"} <= set(hosts(n)) for n in range(40)))
        some = sum("10.0.0.6" in hosts(n) for n in range(40))
        assert 6 <= some <= 34, f"{some} of 40 are not half of them"
        for entry_ in (e for n in range(40) for e in arrived(echo, f"/mirrored-{n}")):
            assert entry_["host"] == "web.example.com", entry_
            assert not [h for h in entry_["headers"] if h.startswith("x-portolan")], entry_
        if kind == "envoy":
            assert copies <= w.envoy_clusters()
        w.remove("routes.yaml")

        def alone():
            path = f"/alone-{time.monotonic_ns()}"
            w.get("web.example.com", path=path, settle=0.1)
            return [e["dst"] for e in arrived(echo, path)] == ["10.0.0.1:80"]
        until("no copy arrives", alone)
        if kind == "envoy":
            until("the clusters have gone", lambda: not copies & w.envoy_clusters())
            assert w.get("copy.example.com")["upstream"][0]["dst"] == "10.0.0.5:80"
        assert w.metric("discovery_nacks") == 0


@scenario
def retries(kind, echo):
    """A VirtualService's conditions for retries stand in place of the default ones, and are carried out."""
    def routes(retry):
        return virtual_service("'*.example.com'", "  - match: [{authority: {prefix: web}}]\n"
                               f"    route: [{{destination: {{host: web.example.com}}}}]\n    retries: {retry}\n"
                               f"  - route: [{{destination: {{host: refused.example.com}}}}]\n    retries: {retry}\n")

    def failing(times):
        path = f"/failing-{time.monotonic_ns()}?fail={times}"
        return w.get("web.example.com", path=path)["status"], len(arrived(echo, path))

    def refused():
        """Retries after a refused connection."""
        name = "upstream_rq_retry$"
        before = sum(w.envoy_stat(name).values())
        assert w.get("refused.example.com")["status"] == 503
        return sum(w.envoy_stat(name).values()) - before
    with World(kind, echo, BASIC | REFUSED) as w:
        w.serving("web.example.com")
        w.serving("refused.example.com", status=503)
        assert failing(1) == (503, 1)
        if kind == "envoy":
            assert refused() == 2
        w.write("routes.yaml", routes("{attempts: 3, retryOn: '503'}"))
        until("a status is retried", lambda: failing(2) == (200, 3))
        assert failing(4) == (503, 4)
        if kind == "envoy":
            until("refused connections are not", lambda: refused() == 0)
        w.write("routes.yaml", routes("{attempts: 1, retryOn: 'unavailable,connect-failure'}"))
        until("the status is not retried any more", lambda: failing(2) == (503, 1))
        if kind == "envoy":
            until("refused connections are, once", lambda: refused() == 1)
        w.write("routes.yaml", routes("{attempts: 0}"))
        if kind == "envoy":
            until("nothing is retried", lambda: refused() == 0)
        assert w.metric("discovery_nacks") == 0


@scenario
def delays(kind, echo):
    """A VirtualService's delay is kept; where none asks for one, Envoy has no fault filter, which would cost every request."""
    with World(kind, echo, BASIC) as w:
        w.serving("web.example.com")
        if kind == "envoy":
            assert "envoy.filters.http.fault" not in w.envoy_filters()

        def takes():
            start = time.monotonic()
            assert w.get("web.example.com")["status"] == 200
            return time.monotonic() - start
        fault = "    fault: {delay: {fixedDelay: 0.4s, percentage: {value: 100}}}\n"
        w.write("routes.yaml", virtual_service("web.example.com", "  - route: [{destination: {host: web.example.com}}]\n" + fault))
        until("requests are delayed", lambda: takes() >= 0.4)
        w.remove("routes.yaml")
        until("they are not any more", lambda: takes() < 0.4)
        if kind == "envoy":
            until("the filter has gone", lambda: "envoy.filters.http.fault" not in w.envoy_filters())
        assert w.metric("discovery_nacks") == 0


class Server6:
    """An upstream of IPv6, for which the rig's echo is not there: says which Host it was asked for."""
    def __init__(self):
        self.listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection:
            head = b""
            while b"\n" not in head or head.startswith(b"GET") and b"\r\n\r\n" not in head:
                data = connection.recv(65536)
                if not data:
                    return
                head += data
            host = next((line[6:] for line in head.split(b"\r\n") if line.lower().startswith(b"host: ")), b"")
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(host), host))


@scenario
@of_envoy
def ipv6(kind, echo):
    """Captured connections of IPv6, to upstreams of IPv6; ports that are bound at an address of IPv6."""
    server = Server6()
    rules = ["-p tcp -m owner --uid-owner " + str(rig.UID) + " -j RETURN", "-p tcp -d ::1 -j RETURN",
             "-p tcp -j REDIRECT --to-ports 15001"]
    subprocess.run("ip -6 route replace local ::/0 dev lo", shell=True, check=True)
    for rule in rules:
        subprocess.run(f"ip6tables -t nat -A OUTPUT {rule}", shell=True, check=True)
    http = (f"apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: six, namespace: default}}\n"
            f"spec:\n  hosts: [six.example.com]\n  addresses: ['fd00::9']\n"
            f"  ports:\n  - {{number: 80, name: http, protocol: HTTP, targetPort: {server.port}}}\n"
            f"  - {{number: 3306, name: tcp, protocol: TCP, targetPort: {server.port}}}\n"
            f"  resolution: STATIC\n  endpoints: [{{address: '::1'}}]\n---\n")

    def ask(address, port, host):
        with socket.create_connection((address, port), timeout=5) as s:
            s.settimeout(5)
            s.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            try:
                while data := s.recv(65536):
                    answer += data
            except ConnectionError:
                pass                                                    # refused, like an end without an answer
        return (int(answer[9:12]), answer.partition(b"\r\n\r\n")[2]) if answer else None
    with World(kind, echo, BASIC | {"six.yaml": http}, ip="1.1.1.1,fd00::1") as w:
        until("captured", lambda: ask("fd00::77", 80, "six.example.com") == (200, b"six.example.com"))
        assert ask("fd00::9", 80, "[fd00::9]") == (200, b"[fd00::9]")
        assert ask("fd00::77", 80, "other.example.com")[0] == 502
        assert ask("fd00::9", 3306, "any.example.com") == (200, b"any.example.com"), "TCP by address"
        assert ask("fd00::8", 3306, "any.example.com") is None, "an address that nobody declares"
        w.serving("web.example.com")
    with World(kind, echo, {"six.yaml": http}, bootstrap=["--plaintext", "--bind-ports", "::1"], ip="fd00::1") as w:
        until("bound", lambda: ask("::1", 80, "six.example.com") == (200, b"six.example.com"))
        assert ask("::1", 80, "other.example.com")[0] == 502
        until("captured as well", lambda: ask("fd00::77", 80, "six.example.com") == (200, b"six.example.com"))
    for rule in rules:
        subprocess.run(f"ip6tables -t nat -D OUTPUT {rule}", shell=True, check=True)


@scenario
@of_envoy
def certificates_are_replaced(kind, echo):
    """Envoy's own certificate and the authorities that it trusts are read again when they are replaced: connections opened then
    have the new ones, and nothing is started again."""
    certs, own = rig.CERTS, f"/tmp/{rig.NS}.certs"
    shutil.rmtree(own, ignore_errors=True)
    os.mkdir(own)

    def put(name, source):
        shutil.copy(source, f"{own}/{name}.new")
        os.chmod(f"{own}/{name}.new", 0o644)
        os.rename(f"{own}/{name}.new", f"{own}/{name}")

    def issue(account):
        """Signed by the rig's authority, for this service account."""
        base = f"{own}/issued-{account}"
        with open(f"{base}.ext", "w") as f:
            f.write(f"subjectAltName=URI:spiffe://cluster.local/ns/default/sa/{account}")
        rig.sh(f"openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={account} -keyout {base}-key.pem "
               f"-out {base}.csr 2>&1 && openssl x509 -req -in {base}.csr -CA {certs}/ca.pem -CAkey {certs}/ca-key.pem "
               f"-set_serial {time.monotonic_ns()} -days 3650 -extfile {base}.ext -out {base}.pem 2>&1")
        put("key.pem", f"{base}-key.pem")
        put("cert.pem", f"{base}.pem")
    issue("first")
    put("ca.pem", f"{certs}/ca.pem")
    serve = ["--tls-cert", f"{certs}/server.pem", "--tls-key", f"{certs}/server-key.pem", "--tls-client-ca", f"{certs}/ca.pem"]
    bootstrap = ["--ca", f"{own}/ca.pem", "--cert", f"{own}/cert.pem", "--key", f"{own}/key.pem", "--secrets", f"{own}/secrets",
                 "--controller-name", "example.com"]
    with World(kind, echo, BASIC, gate="pass", serve=serve, bootstrap=bootstrap) as w:
        def identities():
            return {s["identity"].rpartition("/")[2] for s in json.loads(w.admin("config_dump"))["subscribers"]}

        def loaded():
            return sum(w.envoy_stat("ssl_context_update_by_sds").values())

        def replace(what, function):
            before = loaded()
            function()
            until(f"{what} are loaded", lambda: loaded() > before)

        def again(account):
            w.gate.cut()
            until(f"Envoy is {account}", lambda: identities() == {account})
            w.serving("web.example.com")
        w.serving("web.example.com")
        assert identities() == {"first"}
        replace("certificate and key", lambda: issue("second"))
        again("second")
        # Authorities that do not know the controller: what is held decides on, and nothing new is believed.
        replace("other authorities", lambda: put("ca.pem", f"{certs}/other-ca.pem"))
        w.gate.cut()
        until("the controller is refused", lambda: sum(w.envoy_stat("ssl.fail_verify").values()) > 0)
        w.every_worker("web.example.com")
        replace("the old ones", lambda: put("ca.pem", f"{certs}/ca.pem"))
        until("Envoy is back", lambda: identities() == {"second"}, 60)
    shutil.rmtree(own)
