#!/usr/bin/env python3
"""kubernetes.py PORTOLAN PROXY_HOST [ENTRIES]: the controller on a real kube-apiserver and etcd, with ENTRIES ServiceEntries
(10,000), 1,000 Services with an EndpointSlice each, and 5,000 Pods: start, memory, change to effect in a proxy's answers,
and what a controller that starts again sends. Each answer is checked before it counts. `tests/kubernetes/build.sh` builds
the API server once."""
import contextlib, os, pathlib, subprocess, sys, time

ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ["PORTOLAN"], os.environ["PROXY_HOST"] = (str(pathlib.Path(p).resolve()) for p in sys.argv[1:3])
ENTRIES = int(sys.argv[3]) if len(sys.argv) > 3 else 10_000
SERVICES, PODS, CHANGES = 1_000, 5_000, 200
sys.path.insert(0, str(ROOT / "tests/kubernetes"))
os.environ.setdefault("KUBE_APISERVER", subprocess.check_output([ROOT / "tests/kubernetes/build.sh"], text=True).strip())

from cluster import Cluster, until                                                      # noqa: E402
from scenarios import Controller, Origin, Proxy, entry, everywhere, namespace, prepare  # noqa: E402


def memory(process, what="VmRSS"):
    """In MB."""
    return int(next(l for l in open(f"/proc/{process.pid}/status") if l.startswith(what)).split()[1]) * 1024 / 1e6


def fill(cluster):
    for n in range(10):
        namespace(cluster, f"bench-{n}")

    def service(n):
        ns, name = f"bench-{n % 10}", f"s{n}"
        ports = [{"name": "http", "port": 80, "targetPort": 8080}]
        cluster.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": ns},
                        "spec": {"selector": {"app": name}, "ports": ports}})
        at = [f"10.{100 + n // 200}.{n % 200}.{i + 1}" for i in range(PODS // SERVICES)]
        for i, ip in enumerate(at):
            cluster.pod(f"{name}-{i}", ip, {"app": name, "pod-template-hash": "5d4f8c7b9"}, ns)
        cluster.create({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                        "metadata": {"name": name, "namespace": ns, "labels": {"kubernetes.io/service-name": name}},
                        "ports": [{"name": "http", "port": 8080}],
                        "endpoints": [{"addresses": [ip], "conditions": {"ready": True}} for ip in at]})
    everywhere(service, range(SERVICES))
    everywhere(lambda n: cluster.create(entry(f"e{n}", f"e{n}.bench.example.com", ns=f"bench-{n % 10}", port=9)), range(ENTRIES))


def main():
    cluster = Cluster()
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.close)
        prepare(cluster)
        start = time.monotonic()
        fill(cluster)
        print(f"{ENTRIES} entries, {SERVICES} services, {PODS} pods: created in {time.monotonic() - start:.0f} s", flush=True)
        origin = Origin("bench", "127.0.0.1")
        start = time.monotonic()
        first = stack.enter_context(Controller(cluster))
        print(f"start to serving: {time.monotonic() - start:.1f} s")
        assert first.metric("kubernetes_objects", kind="ServiceEntry") == ENTRIES
        proxy = stack.enter_context(Proxy(cluster, first, namespace="bench-0"))
        until("it is served", lambda: proxy.get("e1.bench.example.com")[0] == 503)
        print(f"memory: {memory(first.process):.0f} MB, at most {memory(first.process, 'VmHWM'):.0f} MB")
        # The API server ends connections that were idle meanwhile.
        until("the API server answers", lambda: cluster.request("GET", "/readyz"))
        told, sent = [], []
        for n in range(CHANGES):
            name = f"t{n}.bench.example.com"
            assert proxy.get(name)[0] == 502
            made = entry(f"t{n}", name, ns=f"bench-{n % 10}", port=origin.server_port)
            asked = time.monotonic()
            cluster.create(made)
            stored = time.monotonic()
            until("it is in effect", lambda: proxy.get(name) == (200, "bench"), pause=0.001)
            now = time.monotonic()
            told.append(1000 * (now - stored)), sent.append(1000 * (now - asked))
        told.sort(), sent.sort()
        p99 = sent[-1 - CHANGES // 100]
        print(f"change to effect in {CHANGES} changes: from the API server's answer {told[CHANGES // 2]:.0f} ms median, "
              f"{told[-1 - CHANGES // 100]:.0f} ms p99; from the request to it {sent[CHANGES // 2]:.0f} ms median, {p99:.0f} ms p99, {sent[-1]:.0f} ms at most")
        most = memory(first.process, "VmHWM")
        print(f"memory after that: {memory(first.process):.0f} MB, at most {most:.0f} MB")
        full = first.metric("bytes")
        first.stop()
        assert proxy.get("t1.bench.example.com") == (200, "bench"), "the proxy has lost its snapshot"
        second = stack.enter_context(Controller(cluster, "controller-2", listen=first.listen))
        until("the proxy is told that it is up to date", lambda: second.metric("updates") >= 1)
        again = second.metric("bytes")
        print(f"restart: {again:.0f} bytes of {full:.0f} sent again")
        second.stop()
        writer = stack.enter_context(Controller(cluster, "writer", extra=["--write-status"]))
        start = time.monotonic()
        path = cluster.address(entry("e1", "", ns="bench-1"), name=False)
        last = lambda: all(e.get("status", {}).get("addresses") for e in cluster.request("GET", path)["items"])
        # STATIC entries without addresses are entitled to allocated ones.
        until("addresses are written", last, 300, 1)
        print(f"allocated addresses written for {ENTRIES} entries in {time.monotonic() - start:.0f} s; memory then {memory(writer.process):.0f} MB")
        origin.shutdown()
        assert p99 <= 100, f"p99 {p99:.0f} ms"
        assert most <= 300, f"{most:.0f} MB"
        assert again <= full / 100, f"{again} of {full} bytes"


if __name__ == "__main__":
    main()
