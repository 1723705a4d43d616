#!/usr/bin/env python3
"""gateway_files.py PROXY...: a gateway's certificate is replaced while it serves, and counts from then on; of clients that
its authorities know only those with a pinned key or certificate are let in; versions and ciphers are those that it names.

PROXY is `envoy` or `proxy-host`. The Gateway names a secret, which is a folder. Runs in a network namespace of its own;
needs root.
"""
import os, pathlib, signal, socket, ssl, subprocess, sys, tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import ENVOY, PORTOLAN, PROXY_HOST, WASM, until  # noqa: E402

GATEWAY = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: g}
spec:
  servers:
  - {port: {number: 8443, name: p, protocol: HTTPS}, hosts: ["*"], tls: {mode: SIMPLE, credentialName: own}}
"""
CIPHER = "ECDHE-ECDSA-AES256-GCM-SHA384"
OLDER = """
  - port: {number: 8446, name: older, protocol: HTTPS}
    hosts: ["*"]
    tls: {mode: SIMPLE, credentialName: own, minProtocolVersion: TLSV1_2, maxProtocolVersion: TLSV1_2, cipherSuites: [%s]}
""" % CIPHER
PINNED = """
  - port: {number: %(port)d, name: p%(port)d, protocol: HTTPS}
    hosts: ["*"]
    tls: {mode: MUTUAL, serverCertificate: %(own)s/tls.crt, privateKey: %(own)s/tls.key, caCertificates: %(clients)s/all.crt, %(pin)s}
"""


def certificate(folder):
    """A new one, put in place as a mounted Secret is: a link changes. Gives its text."""
    new = tempfile.mkdtemp(dir=folder)
    os.chmod(new, 0o755)
    subprocess.run(f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=own "
                   f"-keyout {new}/tls.key -out {new}/tls.crt 2>/dev/null", shell=True, check=True)
    os.makedirs(f"{folder}/own", exist_ok=True)
    for name in ("tls.key", "tls.crt"):
        os.symlink(f"{new}/{name}", f"{new}/link")
        os.rename(f"{new}/link", f"{folder}/own/{name}")
    return open(f"{new}/tls.crt").read()


def clients(folder):
    """Two clients, each signed by itself, and the servers that let in the first by its key, and by its certificate."""
    os.makedirs(f"{folder}/clients")
    sh = lambda command: subprocess.run(command, shell=True, check=True, capture_output=True, text=True, cwd=f"{folder}/clients").stdout.strip()
    for name in ("one", "two"):
        sh("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
           f"-subj /CN={name} -addext basicConstraints=critical,CA:FALSE -keyout {name}.key -out {name}.crt")
    sh("cat one.crt two.crt > all.crt")
    key = sh("openssl x509 -in one.crt -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | openssl enc -base64")
    digest = sh("openssl x509 -in one.crt -noout -fingerprint -sha256").split("=")[1]
    at = {"own": f"{folder}/secrets/own", "clients": f"{folder}/clients"}
    return "".join(PINNED % {"port": port, "pin": pin, **at} for port, pin in
                   ((8444, f'verifyCertificateSpki: ["{key}"]'), (8445, f'verifyCertificateHash: ["{digest}"]')))


def let_in(folder, name, port):
    """Whether a client gets an answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(f"{folder}/clients/{name}.crt", f"{folder}/clients/{name}.key")
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
            return s.recv(100).startswith(b"HTTP/1.1 404")
    except OSError:
        return False


def served(wanted):
    until("the certificate is served", lambda: ssl.get_server_certificate(("127.0.0.1", 8443), timeout=2).split(), done=lambda found: found == wanted.split())


def spoken(port, **settings):
    """Version and cipher that a client with these settings and the server agree on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name, value in settings.items():
        setattr(context, name, value)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as s:
            return s.version(), s.cipher()[0]
    except OSError:
        return None


def run(kind):
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/config"), os.makedirs(f"{folder}/secrets")
        open(f"{folder}/config/gateway.yaml", "w").write(GATEWAY + OLDER + clients(folder))
        first = certificate(f"{folder}/secrets")
        who = ["--role", "gateway", "--credentials", f"{folder}/secrets"]
        log = open(f"{folder}/log", "ab")
        commands = [[PROXY_HOST, "--config", f"{folder}/config", *who]]
        if kind == "envoy":
            made = subprocess.run([PORTOLAN, "bootstrap", "envoy", "--plaintext", "--filter", WASM, *who], check=True, capture_output=True)
            open(f"{folder}/envoy.yaml", "wb").write(made.stdout)
            commands = [[PORTOLAN, "serve", "--config", f"{folder}/config"],
                        [ENVOY, "-c", f"{folder}/envoy.yaml", "--concurrency", "1", "--use-dynamic-base-id", "-l", "warn"]]
        processes = [subprocess.Popen([str(word) for word in command], stdout=log, stderr=log) for command in commands]
        try:
            served(first)
            served(certificate(f"{folder}/secrets"))
            for port in (8444, 8445):
                seen = [let_in(folder, name, port) for name in ("one", "two")]
                assert seen == [True, False], f"clients with a certificate that is pinned or not, port {port}: {seen}"
            assert spoken(8446) == ("TLSv1.2", CIPHER), f"the version and the cipher that the server names: {spoken(8446)}"
            assert spoken(8446, minimum_version=ssl.TLSVersion.TLSv1_3) is None, "a version that it does not name"
            assert spoken(8443)[0] == "TLSv1.3", f"without settings the newest version: {spoken(8443)}"
            print(f"certificates of a gateway, {kind}: ok")
        except AssertionError:
            print(open(f"{folder}/log").read()[-3000:], file=sys.stderr)
            raise
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()


if __name__ == "__main__":
    if os.environ.get("INSIDE") != "1":
        inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, __file__, *sys.argv[1:]]
        sys.exit(subprocess.run(inside, env={**os.environ, "INSIDE": "1"}).returncode)
    for kind in sys.argv[1:]:
        run(kind)
