#!/usr/bin/env python3
"""untouched.py PROXY_HOST [HOSTS]: what rules of other hosts cost a request to a host that has none.

One registry of HOSTS (500) plain hosts and as many others, without and with a VirtualService (conditions, faults, retries, a mirror)
and a DestinationRule (consistent hashing, outlier detection, subsets) for each of the others. What counts is the number of
instructions of proxy-host, the filter's included, for a request to a plain host, by callgrind, which neighbours do not disturb. That
each request arrives where it should, and that the rules of the others are in force, is checked before. Fails where they cost one
instruction in fifty.
"""
import os, re, socket, subprocess, sys, tempfile, threading, time

PROXY_HOST = os.path.abspath(sys.argv[1])
HOSTS = int(sys.argv[2]) if len(sys.argv) > 2 else 500
WARM, REQUESTS = 200, 3000


def origin():
    """Answers with the host that was asked for."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection):
        read = b""
        while data := connection.recv(65536):
            read += data
            while b"\r\n\r\n" in read:
                head, _, read = read.partition(b"\r\n\r\n")
                host = re.search(rb"(?i)\r\nhost: *([^\r]+)", head)[1]
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(host), host))

    def accept():
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def config(ruled, port):
    out = []
    for i in range(HOSTS):
        for kind in ("plain", "other"):
            out.append(f"""apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {kind}-{i}}}
spec:
  hosts: [{kind}-{i}.example.com]
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {port}}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1, labels: {{version: one}}}}]
""")
        if ruled:
            host = f"other-{i}.example.com"
            out.append(f"""apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: other-{i}}}
spec:
  hosts: [{host}]
  http:
  - match: [{{uri: {{prefix: /gone}}, headers: {{user-agent: {{regex: "b.*"}}}}}}]
    redirect: {{uri: /there}}
  - match: [{{uri: {{prefix: /rare}}}}]
    fault: {{delay: {{fixedDelay: 1s, percentage: {{value: 1}}}}}}
    timeout: 3s
    retries: {{attempts: 3, retryOn: "503", backoff: 5ms}}
    mirror: {{host: plain-{i}.example.com}}
    route: [{{destination: {{host: {host}, subset: one}}}}]
  - route: [{{destination: {{host: {host}}}}}]
""")
            out.append(f"""apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: other-{i}}}
spec:
  host: {host}
  trafficPolicy:
    loadBalancer: {{consistentHash: {{httpHeaderName: user-agent}}}}
    outlierDetection: {{consecutive5xxErrors: 5}}
  subsets: [{{name: one, labels: {{version: one}}}}]
""")
    return "---\n".join(out)


class Client:
    def __init__(self, port):
        self.s = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, host, path="/orders/42"):
        self.s.sendall(f"GET http://{host}{path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode())
        read = b""
        while b"\r\n\r\n" not in read:
            data = self.s.recv(65536)
            if not data:
                raise ConnectionError("closed")
            read += data
        head, _, body = read.partition(b"\r\n\r\n")
        length = int((re.search(rb"(?i)content-length: *(\d+)", head) or [0, 0])[1])
        while len(body) < length:
            body += self.s.recv(65536)
        return int(head[9:12]), body.decode()


def ready(port, host, limit=240):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            client = Client(port)
            if client.ask(host)[0] == 200:
                return client
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"nothing was served within {limit} s")


def instructions(ruled, folder):
    """Of one request."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(f"{folder}/config.yaml", "w") as f:
        f.write(config(ruled, origin()))
    log = f"{folder}/valgrind-{ruled}"
    proxy = subprocess.Popen(["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--instr-atstart=no", f"--log-file={log}",
                              PROXY_HOST, "--config", f"{folder}/config.yaml", "--http-proxy", f"127.0.0.1:{port}", "--threads", "1",
                              "--log-level", "error"], stdout=subprocess.DEVNULL)
    try:
        client = ready(port, "plain-0.example.com")
        # The rules of the others are in force, and the plain hosts do without.
        gone = client.ask("other-1.example.com", "/gone")[0]
        if gone != (301 if ruled else 200):
            raise SystemExit(f"a host {'with' if ruled else 'without'} rules answers {gone}")
        hosts = [f"plain-{i * 7 % HOSTS}.example.com" for i in range(20)]
        for i in range(WARM):
            host = hosts[i % len(hosts)]
            if client.ask(host) != (200, host):
                raise SystemExit(f"{host} is not what answers")
        control = lambda switch: subprocess.run(["callgrind_control", "-i", switch, str(proxy.pid)], check=True, stdout=subprocess.DEVNULL)
        control("on")
        for i in range(REQUESTS):
            client.ask(hosts[i % len(hosts)])
        control("off")
    finally:
        proxy.terminate()
        proxy.wait(120)
    return int(re.search(r"Collected\s*:\s*(\d+)", open(log).read())[1]) / REQUESTS


def main():
    with tempfile.TemporaryDirectory() as folder:
        plain, ruled = (instructions(kind, folder) for kind in (False, True))
    print(f"{HOSTS} plain hosts beside as many without rules: {plain:,.0f} instructions a request; with rules: {ruled:,.0f} ({ruled / plain:.3f})")
    if ruled > plain * 1.02:
        sys.exit("the rules of other hosts cost too much")


if __name__ == "__main__":
    main()
