#!/usr/bin/env python3
"""scenarios.py [NAME...]: Portolan in a cluster whose API server and etcd are real; only nodes are missing.

One cluster serves all scenarios, each with namespaces of its own. `run.sh` builds what is needed.
"""
import base64, concurrent.futures, contextlib, http.client, http.server, json, os, pathlib, re, signal, socket, ssl, subprocess, sys
import threading, time, traceback

import promql_parser

from cluster import ISTIO, Cluster, Refused, documents
from actors import Controller, Origin, Proxy, entry, namespace
from support import PORTOLAN, ROOT, free_port, until

ENTRIES = int(os.environ.get("ENTRIES", 5000))
# Seconds that the API server stays away, once the controller has noticed.
AWAY = float(os.environ.get("AWAY", 0))
SCENARIOS = []


def scenario(function):
    SCENARIOS.append(function)
    return function


def everywhere(work, items, threads=16):
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


@scenario
def custom_resources_are_judged_as_recorded(cluster):
    """The API server with our CRDs says of every recorded case what it says with Istio's."""
    cases = [json.loads(line) for line in open(ROOT / "tests/conformance/validation.jsonl")]
    for ns in {case["resource"].get("metadata", {}).get("namespace") for case in cases} - {None}:
        namespace(cluster, ns)

    def judge(case):
        resource = case["resource"]
        try:
            cluster.create(resource, "?dryRun=All")
            got = "ok"
        except Refused as refused:
            got = f"error ({refused})"
        return None if got.split()[0] == case["crd"] else f"{case['id']}: recorded {case['crd']} ({case['rule']}), is {got}"
    wrong = [answer for answer in everywhere(judge, cases) if answer]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    return f"{len(cases)} cases"


@scenario
def a_vm_moves_to_pods_while_requests_flow(cluster):
    namespace(cluster, "move")
    selected = {"resolution": "STATIC", "workloadSelector": {"labels": {"app": "shop"}}}
    # On one port, as a workload is wherever it is.
    vm = Origin("vm", "127.0.0.2")
    pods = Origin("pods", "127.0.0.3", vm.server_port)
    cluster.apply(entry("shop", "shop.example.com", selected, "move", vm.server_port))
    workload = {"apiVersion": ISTIO, "kind": "WorkloadEntry", "metadata": {"name": "vm", "namespace": "move"},
                "spec": {"address": "127.0.0.2", "labels": {"app": "shop"}}}
    cluster.apply(workload)
    with Controller(cluster) as controller, Proxy(cluster, controller, namespace="move") as proxy:
        until("the VM answers", lambda: proxy.get("shop.example.com") == (200, "vm"))
        answers, stop = [], threading.Event()

        def client():
            while not stop.is_set():
                answers.append(proxy.get("shop.example.com"))
        clients = [threading.Thread(target=client) for _ in range(4)]
        [c.start() for c in clients]
        try:
            pod = cluster.pod("shop-1", "127.0.0.3", {"app": "shop"}, "move")
            until("the pod answers too", lambda: (200, "pods") in answers[-50:])
            cluster.delete(workload)
            until("the VM answers no more", lambda: len(answers) > 200 and set(answers[-100:]) == {(200, "pods")})
            # And back.
            cluster.apply(workload)
            until("the VM answers again", lambda: (200, "vm") in answers[-50:])
            cluster.delete(pod)
            until("the pod answers no more", lambda: set(answers[-100:]) == {(200, "vm")})
        finally:
            stop.set()
            [c.join() for c in clients]
        assert {status for status, _ in answers} == {200}, "requests failed"
        said = f"{len(answers)} requests, none failed"
    vm.shutdown(), pods.shutdown()
    return said


@scenario
def thousands_of_entries_come_change_and_go(cluster):
    namespace(cluster, "many")
    names = [f"e{n}" for n in range(ENTRIES)]
    with Controller(cluster) as controller, Proxy(cluster, controller, namespace="many") as proxy:
        count = lambda: controller.metric("kubernetes_objects", kind="ServiceEntry")
        others = count()
        start = time.monotonic()
        everywhere(lambda name: cluster.create(entry(name, f"{name}.many.example.com", ns="many", port=9)), names)
        created = time.monotonic() - start
        until("all are there", lambda: count() == others + ENTRIES)
        bytes_of_all = controller.metric("snapshot_bytes")
        origin = Origin("changed", "127.0.0.1")
        start = time.monotonic()
        patch = {"spec": {"ports": [{"number": 80, "targetPort": origin.server_port, "name": "http", "protocol": "HTTP"}]}}

        def change(name):
            address = cluster.address(entry(name, "x", ns="many"))
            cluster.request("PATCH", address, patch, "application/merge-patch+json")
        everywhere(change, names)
        changed = time.monotonic() - start
        until("the last one is changed", lambda: proxy.get(f"{names[-1]}.many.example.com") == (200, "changed"))
        # From a change in the API server to its effect on a request.
        times = []
        for n in range(60):
            cluster.create(entry(f"t{n}", f"t{n}.time.example.com", ns="many", port=origin.server_port))
            start = time.monotonic()
            until("it is in effect", lambda: proxy.get(f"t{n}.time.example.com")[0] == 200, pause=0.001)
            times.append(time.monotonic() - start)
        times.sort()
        resident = int(next(line for line in open(f"/proc/{controller.process.pid}/status") if line.startswith("VmRSS")).split()[1])
        # One by one: the API server deletes a collection in one request, one after the other, which may outlast the request.
        everywhere(lambda name: cluster.request("DELETE", cluster.address(entry(name, "x", ns="many"))), [*names, *(f"t{n}" for n in range(60))])
        until("all are gone", lambda: count() == others, 60)
        until("the proxy knows none", lambda: proxy.get(f"{names[0]}.many.example.com")[0] != 200)
        origin.shutdown()
    return (f"{ENTRIES} entries: created in {created:.1f} s, changed in {changed:.1f} s; {bytes_of_all / 1024:.0f} KiB of snapshot, "
            f"{resident / 1024:.0f} MiB resident; a change is in effect after {1000 * times[30]:.0f} ms (median), {1000 * times[-1]:.0f} ms (most of 60)")


@scenario
def a_controller_starts_again_and_sends_nothing_twice(cluster):
    namespace(cluster, "again")
    origin = Origin("again", "127.0.0.1")
    everywhere(lambda n: cluster.apply(entry(f"e{n}", f"e{n}.again.example.com", ns="again", port=origin.server_port)), range(300))
    with contextlib.ExitStack() as both:
        first = both.enter_context(Controller(cluster))
        proxy = both.enter_context(Proxy(cluster, first, namespace="again"))
        until("it is served", lambda: proxy.get("e1.again.example.com") == (200, "again"))
        full = first.metric("bytes")
        first.stop()
        assert proxy.get("e1.again.example.com") == (200, "again"), "the proxy has lost its snapshot"
        second = both.enter_context(Controller(cluster, "controller-2", listen=first.listen))
        until("the proxy is back", lambda: second.metric("subscribers") >= 1)
        until("it is told that it is up to date", lambda: second.metric("updates") >= 1)
        again = second.metric("bytes")
        assert second.metric("pages") == 0, "pages were sent again"
        assert again <= full / 100, f"{again} bytes of {full} were sent again"
        cluster.delete(entry("e1", "", ns="again"))
        until("changes arrive", lambda: proxy.get("e1.again.example.com")[0] != 200)
    origin.shutdown()
    return f"{full:.0f} bytes at first, {again:.0f} after the restart"


@scenario
def an_api_server_goes_away(cluster):
    namespace(cluster, "away")
    origin = Origin("here", "127.0.0.1")
    stays, goes = (entry(n, f"{n}.away.example.com", ns="away", port=origin.server_port) for n in ("stays", "goes"))
    cluster.apply(stays), cluster.apply(goes)
    with Controller(cluster) as controller, Proxy(cluster, controller, namespace="away") as proxy:
        until("they are served", lambda: proxy.get("goes.away.example.com")[0] == 200)
        pages = controller.metric("pages")
        cluster.stop()
        until("the controller notices", lambda: controller.metric("kubernetes_watching", kind="ServiceEntry") == 0)
        end = time.monotonic() + AWAY
        while time.monotonic() < end:
            time.sleep(1)
            assert proxy.get("stays.away.example.com")[0] == 200
        assert proxy.get("stays.away.example.com")[0] == 200
        cluster.start()
        # Before the controller is back, which it says by its metric.
        cluster.delete(goes)
        until("it has caught up", lambda: proxy.get("goes.away.example.com")[0] != 200)
        assert proxy.get("stays.away.example.com")[0] == 200
        until("all is watched", lambda: "} 0" not in "".join(l for l in controller.admin("metrics").splitlines() if "_watching{" in l))
        again = controller.metric("pages") - pages
        assert again <= 4, f"{again} pages were sent again, more than what differs"
    origin.shutdown()


@scenario
def a_pods_service_account_is_enough(cluster):
    namespace(cluster, "inside")
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "portolan", "namespace": "portolan-system"}}
    cluster.apply(account)
    bind(cluster, role_of(cluster)["metadata"]["name"], "system:serviceaccount:portolan-system:portolan", "inside")
    path = "/api/v1/namespaces/portolan-system/serviceaccounts/portolan/token"
    token = cluster.request("POST", path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}})["status"]["token"]
    mounted = cluster.path / "serviceaccount"
    mounted.mkdir()
    for file, text in (("token", token), ("namespace", "portolan-system"), ("ca.crt", (cluster.path / "certs/apiserver.crt").read_text())):
        (mounted / file).write_text(text)
    # As a kubelet would have it, in a mount namespace that goes with the controller.
    setup = ('mount -t tmpfs none /run && mkdir -p /var/run/secrets/kubernetes.io && ln -s "$0" /var/run/secrets/kubernetes.io/serviceaccount && exec "$@"')
    pod = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "env", "-u", "KUBECONFIG", f"HOME={mounted}",
           "KUBERNETES_SERVICE_HOST=127.0.0.1", f"KUBERNETES_SERVICE_PORT={cluster.port}", "sh", "-c", setup, mounted]
    origin = Origin("inside", "127.0.0.1")
    cluster.apply(entry("e", "e.inside.example.com", ns="inside", port=origin.server_port))
    with Controller(cluster, pod=pod) as controller, Proxy(cluster, controller, namespace="inside") as proxy:
        until("it is served", lambda: proxy.get("e.inside.example.com") == (200, "inside"))
    origin.shutdown()


@scenario
def a_kind_is_denied(cluster):
    namespace(cluster, "denied")
    role = role_of(cluster)
    for rule in role["rules"]:
        rule["resources"] = [r for r in rule["resources"] if not r.startswith("virtualservices")]
    role["metadata"]["name"] = "denied"
    cluster.apply(role)
    bind(cluster, "denied", "denied")
    origin = Origin("served", "127.0.0.1")
    cluster.apply(entry("served", "served.denied.example.com", ns="denied", port=origin.server_port))
    with Controller(cluster, user="denied") as controller, Proxy(cluster, controller, namespace="denied") as proxy:
        until("the rest is served", lambda: proxy.get("served.denied.example.com")[0] == 200)
        assert controller.metric("kubernetes_watching", kind="VirtualService") == 0
        assert controller.metric("kubernetes_watch_errors", kind="VirtualService") >= 1
        lines = [line for line in controller.log.read_text().splitlines() if "may not be listed" in line]
        assert len(lines) == 1 and "virtualservices" in lines[0], lines
    origin.shutdown()


def certify(cluster, serial):
    """A certificate for 127.0.0.1, signed by an authority that stays the same."""
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=cluster.path, check=True, capture_output=True)
    if not (cluster.path / "authority.pem").exists():
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=authority",
                "-keyout", "authority.key", "-out", "authority.pem", "-days", "2")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=webhook",
            "-keyout", "webhook.key.new", "-out", "webhook.csr")
    (cluster.path / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl("x509", "-req", "-in", "webhook.csr", "-CA", "authority.pem", "-CAkey", "authority.key", "-days", "1",
            "-set_serial", str(serial), "-extfile", "san", "-out", "webhook.pem.new")
    for name in ("webhook.key", "webhook.pem"):
        os.rename(cluster.path / f"{name}.new", cluster.path / name)


def serial_at(port):
    context = ssl._create_unverified_context()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain, context.wrap_socket(plain) as secure:
        der = secure.getpeercert(True)
    said = subprocess.run(["openssl", "x509", "-inform", "der", "-noout", "-serial"], input=der, capture_output=True, check=True)
    return int(said.stdout.decode().strip().split("=")[1], 16)


@scenario
def the_webhook_judges_as_recorded(cluster):
    """What istiod's webhook refuses of what the API server lets through, ours refuses; conflicts are warnings."""
    namespace(cluster, "hook")
    cases = [json.loads(line) for line in open(ROOT / "tests/conformance/validation.jsonl")]
    for ns in {case["resource"].get("metadata", {}).get("namespace") for case in cases} - {None}:
        namespace(cluster, ns)
    certify(cluster, 17)
    port = free_port()
    hook = ["--webhook", f"127.0.0.1:{port}", "--webhook-cert", cluster.path / "webhook.pem", "--webhook-key", cluster.path / "webhook.key"]
    with Controller(cluster, extra=hook) as controller:
        configuration = next(d for d in rendered() if d["kind"] == "ValidatingWebhookConfiguration")
        webhook = configuration["webhooks"][0]
        authority = base64.b64encode((cluster.path / "authority.pem").read_bytes()).decode()
        webhook["clientConfig"] = {"url": f"https://127.0.0.1:{port}/validate", "caBundle": authority}
        # Here a request that nobody judges has to be seen.
        webhook["failurePolicy"] = "Fail"
        cluster.apply(configuration)
        try:
            bad = next(c for c in cases if c["crd"] == "ok" and c.get("webhookPruned", c["webhook"]) == "error")["resource"]

            def refused():
                try:
                    cluster.create(bad, "?dryRun=All")
                except Refused as refused:
                    return refused
            said = until("the webhook is asked", refused)
            assert "validation.portolan.io" in str(said), said

            def judge(case):
                expected = "error" if case["crd"] == "error" or case.get("webhookPruned", case["webhook"]) == "error" else "ok"
                try:
                    answer = cluster.create(case["resource"], "?dryRun=All")
                    got = "ok"
                except Refused as refused:
                    answer, got = refused, "error"
                return None if got == expected else f"{case['id']}: expected {expected}, is {got}: {answer}"
            start = time.monotonic()
            wrong = [answer for answer in everywhere(judge, cases) if answer]
            took = time.monotonic() - start
            assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)

            def warned():
                answer = cluster.create(entry("second", "one.hook.example.com", {"resolution": "DNS"}, "hook"), "?dryRun=All")
                return next((w for w in answer["warnings"] if "hook/first" in w), None)
            cluster.apply(entry("first", "one.hook.example.com", {"resolution": "NONE"}, "hook"))
            warning = until("the conflict is a warning", warned)
            # Certificates change without a restart, and nobody is refused meanwhile.
            certify(cluster, 18)
            until("the new certificate is used", lambda: serial_at(port) == 18)
            cluster.create(entry("third", "three.hook.example.com", {"resolution": "DNS"}, "hook"), "?dryRun=All")
            assert controller.metric("webhook_denied") > 100
        finally:
            cluster.delete(configuration)
        loaded = ask_while_certificates_change(cluster, port, [c for c in cases if c["crd"] == "ok"] * 4)
    return f"{len(cases)} cases in {took:.1f} s by 16 clients; warning: {warning}; {loaded}"


def ask_while_certificates_change(cluster, port, cases, clients=32):
    """Asks the webhook itself, over a new connection each time, as API servers do that come and go."""
    context = ssl.create_default_context(cafile=cluster.path / "authority.pem")
    serials, done = [18], threading.Event()

    def change():
        while not done.wait(0.2):
            certify(cluster, serials[-1] + 1)
            serials.append(serials[-1] + 1)

    def ask(case):
        resource = case["resource"]
        group, _, version = resource["apiVersion"].rpartition("/")
        review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": case["id"], "operation": "CREATE", "kind": {"group": group, "version": version, "kind": resource["kind"]},
            "namespace": resource["metadata"].get("namespace", "default"), "name": resource["metadata"].get("name", ""), "object": resource}}
        start = time.monotonic()
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
        try:
            connection.request("POST", "/validate", json.dumps(review), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())["response"]
        finally:
            connection.close()
        assert answer["uid"] == case["id"], "the answer to somebody else's question"
        expected, took = case.get("webhookPruned", case["webhook"]) != "error", time.monotonic() - start
        # What the API server would have pruned is refused here for being unknown.
        return took, None if answer["allowed"] in (expected, case["webhook"] != "error") else f"{case['id']}: {answer}"
    changing = threading.Thread(target=change)
    changing.start()
    try:
        answers = everywhere(ask, cases, clients)
    finally:
        done.set()
        changing.join()
    wrong = [said for _, said in answers if said]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:20])
    until("the last certificate is used", lambda: serial_at(port) == serials[-1])
    times = sorted(took for took, _ in answers)
    return (f"{len(times)} by {clients} clients on new connections while {len(serials) - 1} certificates followed each other: "
            f"{1000 * times[len(times) // 2]:.0f} ms median, {1000 * times[-1 - len(times) // 100]:.0f} ms p99, none wrong")


@scenario
def one_of_two_controllers_writes_conditions(cluster):
    namespace(cluster, "told")
    older = cluster.apply(entry("older", "same.told.example.com", {"resolution": "NONE"}, "told"))
    time.sleep(1.1)                                      # ages are whole seconds
    younger = entry("younger", "same.told.example.com", {"resolution": "DNS"}, "told")
    cluster.apply(younger)

    def condition(kind="portolan.io/Conflicted"):
        conditions = cluster.get(younger).get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})
    with Controller(cluster, "first", extra=["--write-status"]) as first, Controller(cluster, "second", extra=["--write-status"]) as second:
        told = until("the conflict is told", lambda: condition().get("status") == "True" and condition())
        assert "told/older" in told["message"], told
        # Conditions and addresses are two writes, the addresses the later one.
        until("an address is allocated", lambda: cluster.get(younger)["status"].get("addresses"))
        version = cluster.get(younger)["metadata"]["resourceVersion"]
        assert not cluster.get(older).get("status", {}).get("conditions"), "the one that wins has nothing to be told"
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"namespace": "portolan-system", "name": "portolan"}}
        holder = cluster.get(lease)["spec"]["holderIdentity"]
        leader, other = (first, second) if holder.endswith(f"_{first.process.pid}") else (second, first)
        # Other changes come by, of which this one is told nothing new.
        cluster.apply(entry("by", "by.told.example.com", {"resolution": "DNS"}, "told"))
        before = cluster.get(lease)["spec"]["renewTime"]
        until("the Lease is renewed", lambda: cluster.get(lease)["spec"]["renewTime"] != before)
        assert cluster.get(younger)["metadata"]["resourceVersion"] == version, "written though nothing has changed"
        leader.stop(signal.SIGKILL)
        start = time.monotonic()
        until("the other one leads", lambda: cluster.get(lease)["spec"]["holderIdentity"].endswith(f"_{other.process.pid}"), 40)
        took = time.monotonic() - start
        cluster.delete(older)
        until("the conflict is over", lambda: condition().get("status") == "False")
        other.stop()
        assert not cluster.get(lease)["spec"].get("holderIdentity"), "the Lease was not given up"
    return f"the other one led after {took:.1f} s; {told['message']}"


def chart_with(setting):
    """What the chart makes of a setting."""
    helm = subprocess.check_output([ROOT / "tests/kubernetes/helm.sh"], text=True).strip()
    return documents(subprocess.check_output([helm, "template", "portolan", ROOT / "deploy/kubernetes/chart", "--set", setting,
                                              "--kube-version", "1.33.0", "-n", "portolan-system", "-s", "templates/controller.yaml"], text=True))


@scenario
def namespaces_are_considered_by_their_labels(cluster):
    """With the permission that the chart gives where the mesh has selectors, and none without it."""
    chart = chart_with("mesh.discoverySelectors[0].matchLabels.portolan-test=considered")
    role = next(d for d in chart if d["kind"] == "ClusterRole")
    default, (grant,) = role_of(cluster)["rules"], [r for r in role["rules"] if r["resources"] == ["namespaces"]]
    assert role["rules"] == default + [grant] and grant["verbs"] == ["list", "watch"], role
    (settings,) = (d["data"]["mesh.yaml"] for d in chart if d["kind"] == "ConfigMap")
    (cluster.path / "selectors.yaml").write_text(settings)
    role["metadata"]["name"] = "selected"
    label = lambda name, value: cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"portolan-test": value}}})
    label("seen", "considered"), label("unseen", "not")
    origin = Origin("seen", "127.0.0.1")
    for ns in ("seen", "unseen"):
        cluster.apply(entry("e", f"{ns}.selected.example.com", ns=ns, port=origin.server_port))
    with Controller(cluster, user="selected", mesh=f"--mesh={cluster.path}/selectors.yaml", wait=False) as controller:
        bind(cluster, "portolan", "selected")
        until("it waits for the permission", lambda: controller.said("Namespaces cannot be listed"), 60)
        assert not controller.said("serving on"), "served without knowing which namespaces count"
        cluster.apply(role), bind(cluster, "selected", "selected", "too")
        until("it serves", lambda: controller.said("serving on"), 60)
        with Proxy(cluster, controller, namespace="seen") as proxy:
            get = lambda ns: proxy.get(f"{ns}.selected.example.com")
            until("what is chosen is served", lambda: get("seen") == (200, "seen"))
            assert get("unseen")[0] == 502
            label("unseen", "considered")
            until("the other comes with the label", lambda: get("unseen") == (200, "seen"))
            label("unseen", "not")
            until("and goes with it", lambda: get("unseen")[0] == 502)
            assert get("seen") == (200, "seen")
            # Selectors are in a file here; other ones come into force without a restart.
            (cluster.path / "selectors.yaml").write_text(settings.replace("considered", "not"))
            until("the other selectors count", lambda: get("seen")[0] == 502 and get("unseen") == (200, "seen"))
    origin.shutdown()


@scenario
def the_meshs_config_map_is_followed(cluster):
    """With the permission that the chart gives, which is for that ConfigMap alone."""
    namespace(cluster, "istio-system")
    chart = chart_with("meshConfigMap=istio-system/istio")
    grants = [d for d in chart if d["metadata"]["name"] == "portolan-mesh"]
    assert [d["kind"] for d in grants] == ["Role", "RoleBinding"], grants
    for grant in grants:
        for subject in grant.get("subjects", []):
            subject.clear()
            subject.update({"kind": "User", "name": "portolan", "apiGroup": "rbac.authorization.k8s.io"})
    config = lambda mode, name="istio": {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "istio-system"},
                                         "data": {"mesh": f"outboundTrafficPolicy: {{mode: {mode}}}\nrootNamespace: istio-system\n"}}
    cluster.apply(config("REGISTRY_ONLY"))
    cluster.apply(config("ALLOW_ANY_DYNAMIC_DNS", "other"))
    origin = Origin("outside", "127.0.0.1")
    host = f"localhost:{origin.server_port}"
    with Controller(cluster, mesh="--mesh-config-map", wait=False) as controller:
        until("it waits for the permission", lambda: controller.said("nothing is served before it can"))
        assert not controller.said("serving on"), "served by settings that are not the mesh's"
        for grant in grants:
            cluster.apply(grant)
        until("it serves", lambda: controller.said("serving on"), 60)
        with Proxy(cluster, controller) as proxy:
            assert proxy.get(host)[0] == 502
            cluster.apply(config("ALLOW_ANY_DYNAMIC_DNS"))
            until("the mesh is open", lambda: proxy.get(host) == (200, "outside"))
            cluster.apply(config("REGISTRY_ONLY"))
            until("it is closed again", lambda: proxy.get(host)[0] == 502)
            assert controller.metric("kubernetes_watching", kind="ConfigMap") == 1
            assert controller.metric("kubernetes_watch_errors", kind="ConfigMap") >= 1, "it was denied at first"
    origin.shutdown()


@scenario
def allocated_addresses_are_written_once(cluster):
    namespace(cluster, "given")
    names = [f"e{n}" for n in range(300)]
    made = {name: entry(name, f"{name}.given.example.com", {"resolution": "DNS"}, "given") for name in names}
    everywhere(lambda name: cluster.create(made[name]), names)
    declared = entry("declared", "declared.given.example.com", {"resolution": "DNS", "addresses": ["10.1.2.3"]}, "given")
    cluster.apply(declared)

    def states():
        """Addresses and resourceVersion by name."""
        everything = cluster.request("GET", cluster.address(declared, name=False))["items"]
        return {e["metadata"]["name"]: ([a["value"] for a in e.get("status", {}).get("addresses", [])],
                                        e["metadata"]["resourceVersion"]) for e in everything}

    def complete():
        now = states()
        return all(now[name][0] for name in names) and now
    with Controller(cluster, extra=["--write-status"]) as controller:
        start = time.monotonic()
        before = until("all have addresses", complete, 60)
        took = time.monotonic() - start
        given = [address for addresses, _ in before.values() for address in addresses]
        assert len(given) == len(set(given)) == 2 * len(names), "one of each family for each host"
        assert not before["declared"][0]
        # A conflict is told to an entry that has addresses: conditions and addresses stay beside each other.
        time.sleep(1.1)                                  # ages are whole seconds
        rival = entry("rival", "e7.given.example.com", {"resolution": "NONE"}, "given")
        cluster.apply(rival)
        told = until("the conflict is told", lambda: cluster.get(rival).get("status", {}).get("conditions"))
        cluster.delete(rival)
        controller.stop()
    with Controller(cluster, "again", extra=["--write-status"]):
        cluster.apply(entry("late", "late.given.example.com", {"resolution": "DNS"}, "given"))
        until("the new one has them", lambda: states()["late"][0])
        now = states()
    moved = [name for name in names if now[name] != before[name] and name != "e7"]
    assert not moved, f"written again: {moved[:5]}"
    assert now["e7"][0] == before["e7"][0]
    cluster.request("DELETE", cluster.address(declared, name=False))
    return f"{len(names)} entries in {took:.1f} s; none written again by the next controller; told {told[0]['type']}"


@scenario
def what_is_deployed_is_valid(cluster):
    for path in pathlib.Path(os.environ["MONITORING_CRDS"]).glob("*.yaml"):
        for crd in documents(path.read_text()):
            cluster.apply(crd)
            served_by(cluster, crd)
    count = 0
    for path in sorted((ROOT / "deploy/kubernetes").glob("*.yaml")):
        for document in documents(path.read_text()):
            cluster.apply(document, "&dryRun=All")
            count += 1
    subprocess.run([sys.executable, ROOT / "deploy/istio/gen.py", "--check"], check=True)
    sidecar = documents((ROOT / "deploy/istio/sidecar.yaml").read_text())[0]
    namespace(cluster, sidecar["metadata"]["namespace"])
    cluster.apply(sidecar, "&dryRun=All")
    return f"{count} objects, those of the Prometheus operator's kinds included"


@scenario
def alerts_and_dashboard_ask_for_what_there_is(cluster):
    def expressions(of):
        if isinstance(of, dict):
            yield from [of["expr"]] if isinstance(of.get("expr"), str) else []
        for inner in of.values() if isinstance(of, dict) else of if isinstance(of, list) else []:
            yield from expressions(inner)
    chart = ROOT / "deploy/kubernetes/chart"
    asked = list(expressions(documents((chart / "alerts.yaml").read_text()))) + list(expressions(json.loads((chart / "dashboard.json").read_text())))
    certify(cluster, 3)
    hook = ["--webhook", f"127.0.0.1:{free_port()}", "--webhook-cert", cluster.path / "webhook.pem", "--webhook-key", cluster.path / "webhook.key"]
    with Controller(cluster, extra=hook) as controller:
        types = re.findall(r"^# TYPE (\S+) (\S+)$", controller.admin("metrics"), re.M)
    known = {f"{name}_total" if kind == "counter" else name for name, kind in types}
    for expression in asked:
        promql_parser.parse(expression)
        unknown = set(re.findall(r"portolan_\w+", expression)) - known
        assert not unknown, f"{expression}: no metric {unknown}"
    return f"{len(asked)} expressions"


def rendered():
    return documents((ROOT / "deploy/kubernetes/controller.yaml").read_text())


def role_of(cluster):
    """The controller's role, as it is deployed."""
    return next(d for d in rendered() if d["kind"] == "ClusterRole")

def bind(cluster, role, user, name=""):
    cluster.apply({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": f"test-{user}{name}"},
                   "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                   "subjects": [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}]})


def prepare(cluster):
    crds = subprocess.run([PORTOLAN, "crds", "--output", "json"], check=True, capture_output=True)
    crds = json.loads(crds.stdout)["items"]
    for crd in crds:
        cluster.apply(crd)
    for crd in crds:
        served_by(cluster, crd)
    role = role_of(cluster)
    cluster.apply(role)
    bind(cluster, role["metadata"]["name"], "portolan")
    namespace(cluster, "portolan-system")
    for document in rendered():
        if document["kind"] in ("Role", "RoleBinding"):
            for subject in document.get("subjects", []):
                subject.clear()
                subject.update({"kind": "User", "name": "portolan", "apiGroup": "rbac.authorization.k8s.io"})
            cluster.apply(document)


def served_by(cluster, crd):
    """Waits until the API server serves resources of a CRD."""
    def established():
        conditions = cluster.get(crd).get("status", {}).get("conditions") or []
        odd = [c for c in conditions if c["type"] == "NonStructuralSchema" and c["status"] == "True"]
        assert not odd, odd
        return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)
    until(f"{crd['metadata']['name']} is established", established)
    for version in crd["spec"]["versions"]:
        list_of = f"/apis/{crd['spec']['group']}/{version['name']}/{crd['spec']['names']['plural']}"
        until(f"{list_of} is served", lambda: not version["served"] or served(cluster, list_of))


def served(cluster, path):
    try:
        return cluster.request("GET", path)
    except Refused:
        return False


def main(names):
    unknown = set(names) - {s.__name__ for s in SCENARIOS}
    if unknown:
        sys.exit(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(s.__name__ for s in SCENARIOS)}")
    failed, begin = 0, time.monotonic()
    cluster = Cluster()
    try:
        print(f"the API server is ready after {time.monotonic() - begin:.1f} s", flush=True)
        prepare(cluster)
        for run in SCENARIOS:
            if names and run.__name__ not in names:
                continue
            start = time.monotonic()
            try:
                said = run(cluster)
                print(f"{run.__name__}: ok in {time.monotonic() - start:.1f} s{f': {said}' if said else ''}", flush=True)
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"{run.__name__}: FAILED", flush=True)
    finally:
        cluster.close()
    print(f"{time.monotonic() - begin:.0f} s in all")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
