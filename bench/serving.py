#!/usr/bin/env python3
"""serving.py BINARY ORIGIN [ENTRIES]: from a folder of YAML to serving, and from one changed entry to its effect.

Makes ENTRIES ServiceEntries in files of 100, starts proxy-host on them, and checks each answer before it counts.
"""
import os, re, socket, statistics, subprocess, sys, tempfile, time

BINARY, ORIGIN = sys.argv[1:3]
ENTRIES = int(sys.argv[3]) if len(sys.argv) > 3 else 100_000
PER_FILE = 100


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def entry(i, port):
    return f"""apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: entry-{i}, namespace: default}}
spec:
  hosts: [host-{i}.example.com]
  ports:
  - {{number: 80, name: http, protocol: HTTP, targetPort: {port}}}
  - {{number: 443, name: tls, protocol: TLS}}
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1}}]
"""


def write(folder, file, port, skip=None):
    """Whole or not at all, as editors and kubelet do."""
    ids = range(file * PER_FILE, min((file + 1) * PER_FILE, ENTRIES))
    text = "---\n".join(entry(i, port) for i in ids if i != skip)
    path = f"{folder}/entries-{file:05}.yaml"
    with open(path + ".new", "w") as f:
        f.write(text)
    os.rename(path + ".new", path)


class Client:
    """One keep-alive connection to the HTTP proxy port."""
    def __init__(self, port):
        self.s = socket.create_connection(("127.0.0.1", port))
        self.s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def status(self, host):
        self.s.sendall(f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        buf = b""
        while b"\r\n\r\n" not in buf:
            d = self.s.recv(65536)
            if not d:
                raise ConnectionError("closed")
            buf += d
        head, _, body = buf.partition(b"\r\n\r\n")
        m = re.search(rb"(?i)content-length: *(\d+)", head)
        if m:
            while len(body) < int(m.group(1)):
                body += self.s.recv(65536)
        elif b"chunked" in head.lower():
            while not body.endswith(b"0\r\n\r\n"):
                body += self.s.recv(65536)
        return int(head[9:12])


def until(port, host, wanted, limit):
    """Seconds until a request for host is answered with this status."""
    start = time.monotonic()
    client = None
    while time.monotonic() - start < limit:
        try:
            client = client or Client(port)
            if client.status(host) == wanted:
                return time.monotonic() - start
        except OSError:
            client = None
            time.sleep(0.001)
    raise SystemExit(f"{host} was not answered with {wanted} within {limit} s")


def memory(pid):
    text = open(f"/proc/{pid}/status").read()
    return {k: int(re.search(rf"{k}:\s+(\d+)", text).group(1)) // 1024 for k in ("VmRSS", "VmHWM")}


def main():
    with tempfile.TemporaryDirectory() as folder:
        origin_port, proxy_port = free_port(), free_port()
        with open(f"{folder}/mesh.yaml", "w") as f:
            f.write("outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n")
        files = (ENTRIES + PER_FILE - 1) // PER_FILE
        for file in range(files):
            write(folder, file, origin_port)
        origin = subprocess.Popen([ORIGIN, "--listen", f"127.0.0.1:{origin_port}"], stdout=subprocess.DEVNULL)
        start = time.monotonic()
        proxy = subprocess.Popen([BINARY, "--config", folder, "--http-proxy", f"127.0.0.1:{proxy_port}", "--access-log=false",
                                  "--log-level", "warn"])
        try:
            last = ENTRIES - 1
            until(proxy_port, f"host-{last}.example.com", 200, 120)
            serving = time.monotonic() - start
            client = Client(proxy_port)
            assert client.status("host-0.example.com") == 200 and client.status("nobody.example.com") == 502
            print(f"{ENTRIES} entries: {serving:.2f} s from start to the first right answer, "
                  f"memory {memory(proxy.pid)['VmRSS']} MB (peak {memory(proxy.pid)['VmHWM']} MB)", flush=True)
            times = []
            for n in range(20):
                file = (n * 37) % files
                changed = file * PER_FILE
                for skip, wanted in ((changed, 502), (None, 200)):
                    write(folder, file, origin_port, skip)
                    times.append(until(proxy_port, f"host-{changed}.example.com", wanted, 10) * 1000)
            times.sort()
            print(f"one changed entry: in effect after {statistics.median(times):.1f} ms (median of {len(times)}), "
                  f"{times[-1]:.1f} ms at most; memory {memory(proxy.pid)['VmRSS']} MB")
        finally:
            for p in (proxy, origin):
                p.terminate()
                p.wait(10)


main()
