#!/usr/bin/env python3
"""traffic.py PROXY_HOST LOAD [ENVOY] [--only=NAME]... [--entries=N] [--soak=SECONDS]: what proxy-host and Envoy cost per
request, connection and byte, in one run.

LOAD is target/release/load. proxy-host asks the filter, Envoy has one native route. Each runs one worker thread; what counts
is the CPU time of the process. --entries: proxy-host holds so many more entries, of two ports each. --soak: instead of all others,
HTTP/1.1 requests at full load for so long, with the memory after each tenth. Runs itself in a network namespace (root), where TCP
is redirected to both in the same way.
"""
import http.client, json, os, resource, shutil, subprocess, sys, tempfile, time, socket

REDIRECTED = {"proxy-host": 9001, "envoy": 9002}           # ports whose connections are redirected
TRANSPARENT = {"proxy-host": 15001, "envoy": 15002}
CORES = sorted(os.sched_getaffinity(0))
HTTP = {"proxy-host": 15080, "envoy": 15081}


def namespace():
    """Starts this script again in a network namespace of its own."""
    if os.environ.get("BENCH_NAMESPACE"):
        return
    if os.geteuid() != 0:
        raise SystemExit("SKIPPED: needs root for a network namespace")
    os.environ["BENCH_NAMESPACE"] = "1"
    os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])


def sh(command):
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


def entries(http1, http2, raw):
    text = ""
    for name, number, protocol, target in (("bench", 80, "HTTP", http1), ("bench2", 80, "HTTP2", http2), ("bytes", REDIRECTED["proxy-host"], "TCP", raw)):
        text += f"""apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: default}}
spec:
  hosts: [{name}.example.com]
  ports: [{{number: {number}, name: p, protocol: {protocol}, targetPort: {target}}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1}}]
---
"""
    return text


def others(count):
    """So many more entries, of hosts that nobody asks for; a hundred in a file."""
    for first in range(0, count, 100):
        yield "".join(f"""apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: other-{n}, namespace: default}}
spec:
  hosts: [other-{n}.example.org]
  ports: [{{number: 80, name: http, protocol: HTTP}}, {{number: 443, name: tls, protocol: TLS}}]
  resolution: DNS
---
""" for n in range(first, min(first + 100, count)))


def envoy_config(http1, http2, raw):
    socket_address = lambda port: {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    typed = lambda name, **more: {"@type": f"type.googleapis.com/{name}", **more}

    def cluster(name, port, http2=False):
        made = {"name": name, "type": "STATIC", "load_assignment": {"cluster_name": name, "endpoints": [
            {"lb_endpoints": [{"endpoint": {"address": socket_address(port)}}]}]}}
        if http2:
            made["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed(
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions", explicit_http_config={"http2_protocol_options": {}})}
        unlimited = {"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}
        return {**made, "circuit_breakers": {"thresholds": [unlimited]}}

    retry = {"retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes", "num_retries": 2}
    routes = [{"name": name, "domains": [f"{name}.example.com"],
               "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name, "timeout": "0s", "retry_policy": retry}}]} for name in ("bench", "bench2")]
    manager = typed("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                    stat_prefix="h", stream_idle_timeout="0s", normalize_path=True, upgrade_configs=[{"upgrade_type": "websocket"}],
                    http_protocol_options={"allow_absolute_url": True}, route_config={"virtual_hosts": routes},
                    http_filters=[{"name": "router", "typed_config": typed("envoy.extensions.filters.http.router.v3.Router")}])
    tcp = typed("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", stat_prefix="t", cluster="bytes")
    listener = lambda name, port, config: {"name": name, "address": socket_address(port), "filter_chains": [{"filters": [{"name": name, "typed_config": config}]}]}
    return {"static_resources": {"listeners": [listener("http", HTTP["envoy"], manager), listener("tcp", TRANSPARENT["envoy"], tcp)],
                                 "clusters": [cluster("bench", http1), cluster("bench2", http2, True), cluster("bytes", raw)]}}


def pinned(core, command, **more):
    """On one core: the proxy on the first, clients and origin on the last, so that they do not preempt each other."""
    return subprocess.Popen(command, preexec_fn=lambda: os.sched_setaffinity(0, {CORES[core]}), **more)


def until(port):
    for _ in range(6000):
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.01)
    raise SystemExit(f"nothing listens on {port}")


def until_routed(port):
    """Large configurations take a while to be in force."""
    for _ in range(600):
        try:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            client.request("GET", "http://bench.example.com/")
            if client.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"requests to {port} are not answered")


RUNS = [  # name, aim (share of Envoy's), key, arguments
    ("HTTP/1.1", 0.4, "cpu_us_per_request", ["http1"]),
    ("HTTP/2 to HTTP/1.1", 0.4, "cpu_us_per_request", ["http2"]),
    ("HTTP/2 to HTTP/2", 0.4, "cpu_us_per_request", ["http2", "--host", "bench2.example.com"]),
    ("connections", 1.0, "cpu_us_per_request", ["connections", "--concurrency", "8"]),
    ("idle connections", None, "memory_mb", ["idle", "--concurrency", "10000"]),
    ("TCP down", 0.7, "cpu_seconds_per_gigabyte", ["tcp"]),
    ("TCP up", 0.7, "cpu_seconds_per_gigabyte", ["tcp", "--up"]),
]


def main():
    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    only = [a[7:] for a in sys.argv[1:] if a.startswith("--only=")]
    more = int(next((a[10:] for a in sys.argv[1:] if a.startswith("--entries=")), 0))
    soak = float(next((a[7:] for a in sys.argv[1:] if a.startswith("--soak=")), 0))
    runs = RUNS if not soak else [("soak", None, "memory_mb", ["http1", "--seconds", str(soak / 10)])] * 10
    proxy_host, load = arguments[:2]
    envoy = arguments[2] if len(arguments) > 2 else shutil.which("envoy")
    namespace()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sh("ip link set lo up; sysctl -qw net.ipv4.ip_local_port_range='20000 65000'")
    processes = {}
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/config")
        try:
            origin = processes["origin"] = pinned(-1, [load, "origin"], stdout=subprocess.PIPE, text=True)
            ports = [int(address.rpartition(":")[2]) for address in origin.stdout.readline().split()]
            open(f"{folder}/config/entries.yaml", "w").write(entries(*ports))
            for number, text in enumerate(others(more)):
                open(f"{folder}/config/other-{number}.yaml", "w").write(text)
            processes["proxy-host"] = pinned(0, [proxy_host, "--config", f"{folder}/config", "--http-proxy", f"127.0.0.1:{HTTP['proxy-host']}",
                "--transparent", f"127.0.0.1:{TRANSPARENT['proxy-host']}", "--threads", "1", "--access-log=false", "--log-level", "warn",
                # Idle connections share one upstream connection: the limit that follows from the open files is for two each.
                "--max-connections", "15000"])
            if envoy:
                json.dump(envoy_config(*ports), open(f"{folder}/envoy.json", "w"))
                processes["envoy"] = pinned(0, [envoy, "-c", f"{folder}/envoy.json", "--concurrency", "1", "-l", "error", "--disable-hot-restart"])
            else:
                print("SKIPPED: Envoy's side; it is not installed")
            for name in HTTP:
                if name in processes:
                    until(HTTP[name])
            until_routed(HTTP["proxy-host"])
            # Redirection comes with connection tracking, whose cost must not be part of the other figures.
            redirected = False
            for what, aim, key, command in runs:
                if only and what not in only:
                    continue
                if command[0] == "tcp" and not redirected:
                    redirected = True
                    for name, port in REDIRECTED.items():
                        sh(f"iptables -t nat -A OUTPUT -p tcp --dport {port} -j REDIRECT --to-ports {TRANSPARENT[name]}")
                found = {}
                for name in HTTP:
                    if name not in processes:
                        continue
                    proxy = f"127.0.0.1:{REDIRECTED[name] if command[0] == 'tcp' else HTTP[name]}"
                    client = pinned(-1, [load, *command, "--proxy", proxy, "--pid", str(processes[name].pid)], stdout=subprocess.PIPE, text=True)
                    said, status = client.communicate()[0], client.returncode
                    if status:
                        raise SystemExit(f"{what} through {name} failed")
                    found[name] = json.loads(said)
                    print(f"{what:20} {name:11}", ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found[name].items()), flush=True)
                if len(found) == 2:
                    ratio = found["proxy-host"][key] / found["envoy"][key]
                    print(f"{what:20} {ratio:.2f} of Envoy's {key}" + (f"; aim {aim}" if aim else ""), flush=True)
        finally:
            for process in processes.values():
                process.terminate()
                process.wait(10)


main()
