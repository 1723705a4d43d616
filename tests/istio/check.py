#!/usr/bin/env python3
"""check.py: what istiod makes of deploy/istio (golden/, written by generate.sh) leaves no way around the filter.

Needs nothing but Python. Each file is one mesh of meshes/, as istiod's own generator renders it for one proxy. Here it is looked over chain by
chain; a manifest that was changed without running generate.sh again is found by the hash of what went in.
"""
import hashlib, json, pathlib, sys

HERE = pathlib.Path(__file__).resolve().parent
DEPLOY = HERE.parents[1] / "deploy/istio"
HCM, TCP = "envoy.filters.network.http_connection_manager", "envoy.filters.network.tcp_proxy"
WASM = {"http": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
        "network": "type.googleapis.com/envoy.extensions.filters.network.wasm.v3.Wasm"}
# Takes what was sent to the proxy's own port, and ends it: with our filter it could go round in circles.
CLOSED = "virtualOutbound-blackhole"
# Destinations that istiod gives to what it does not know.
UNKNOWN = {"PassthroughCluster", "BlackHoleCluster", "InboundPassthroughCluster"}


def plan(name):
    head, _, _ = (HERE / f"meshes/{name}.yaml").read_text().partition("\n")
    return json.loads(head.removeprefix("# "))


def inputs(name, how):
    files = [HERE / f"meshes/{name}.yaml", *(DEPLOY / manifest for manifest in how["manifests"])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class Look:
    def __init__(self, name, how, golden):
        self.name, self.how, self.golden, self.wrong = name, how, golden, []
        self.routes = {route["name"]: route for route in golden["routes"]}
        self.extensions = {e["name"]: e for e in golden["extensions"]}
        self.asked = set()
        self.chains = 0

    def expect(self, holds, what):
        if not holds:
            self.wrong.append(f"{self.name}: {what}")

    def ours(self, filters, kind):
        """Places of our filter, which every time is fetched by the extension discovery service."""
        found = []
        for at, filter in enumerate(filters):
            discovery = filter.get("config_discovery")
            if discovery and WASM[kind] in discovery["type_urls"]:
                self.expect("default_config" not in discovery, f"{filter['name']} has a default to go on with")
                self.expect("ads" in discovery["config_source"], f"{filter['name']} does not come from the agent")
                self.asked.add(filter["name"])
                found.append(at)
        return found

    def matched(self, listener):
        """Envoy does not go back from a transport protocol: what has none of a chain's applications needs a chain with the same rest."""
        matches = [chain.get("filter_chain_match", {}) for chain in listener.get("filter_chains", [])]
        for match in matches:
            rest = {key: value for key, value in match.items() if key != "application_protocols"}
            self.expect(rest in matches or "default_filter_chain" in listener, f"{listener['name']}: no chain for {rest} but {match}")

    def patient(self, listener):
        """Where a server speaks first nobody waits for its client, or not for ever; what looks comes before any other listener."""
        looking = [f for f in listener.get("listener_filters", []) if f["name"].endswith("_inspector")]
        if listener["name"] != "virtualOutbound" or not looking:
            return
        self.expect(listener["listener_filters"][0]["name"].endswith("original_dst"), "virtualOutbound looks before it knows the port")
        self.expect(listener.get("continue_on_listener_filters_timeout"), "virtualOutbound closes connections of silent clients")
        for filter in looking:
            rules = filter.get("filter_disabled", {}).get("or_match", {}).get("rules", [])
            ports = {rule["destination_port_range"]["start"] for rule in rules}
            self.expect(3306 in ports, f"{filter['name']} waits for clients of MySQL")

    def chain(self, listener, chain):
        where = f"{listener['name']} {chain.get('name', '(unnamed chain)')}"
        filters = chain["filters"]
        last = filters[-1]
        self.chains += 1
        if last["name"] == HCM:
            self.manager(where, last["typed_config"])
            if self.how["proxy"] == "gateway":
                self.named(where, chain.get("name", ""), last["typed_config"]["rds"]["route_config_name"])
        elif last["name"] == TCP:
            at, proxy = self.ours(filters, "network"), last["typed_config"]
            if chain.get("name") == CLOSED:
                self.expect(not at and proxy.get("cluster") == "BlackHoleCluster", f"{where} is not closed")
                return
            self.expect(at == [len(filters) - 2], f"{where}: the filter is not before the TCP proxy: {[f['name'] for f in filters]}")
            self.expect("odcds_config" in proxy.get("on_demand", {}), f"{where}: no clusters on demand")
        else:
            self.expect(False, f"{where} ends with {last['name']}")

    def manager(self, where, manager):
        names = [f["name"] for f in manager["http_filters"]]
        at = self.ours(manager["http_filters"], "http")
        self.expect(len(at) == 1, f"{where}: the filter is there {len(at)} times: {names}")
        demand = [i for i, name in enumerate(names) if name == "portolan-on-demand"]
        self.expect(len(demand) == 1, f"{where}: clusters on demand are there {len(demand)} times: {names}")
        self.expect(names[-1] == "envoy.filters.http.router", f"{where} ends with {names[-1]}")
        # Whoever answers or chooses before ours has not been asked by us.
        before = {"istio.metadata_exchange", "istio.alpn", "envoy.filters.http.grpc_stats", "istio.stats"}
        first = at[0] if at else 0
        self.expect(set(names[:first]) <= before, f"{where}: before the filter come {names[:first]}")
        self.expect(at and demand and first < demand[0], f"{where}: the filter is not before clusters on demand: {names}")
        # istiod's mesh configuration says what its own managers log; it does not reach ours.
        self.expect(manager["stat_prefix"] != "portolan" or manager.get("access_log"), f"{where}: refusals leave no trace")
        config = manager.get("route_config") or self.routes.get(manager.get("rds", {}).get("route_config_name"))
        self.expect(config, f"{where} has no routes")
        for host in (config or {}).get("virtual_hosts", []):
            for route in host.get("routes", []):
                self.route(f"{where}: {host['name']}", route, config.get("request_headers_to_remove", []))

    def named(self, where, name, server):
        """The filter knows a gateway's server by its chain's name, or as the port's plain HTTP server."""
        self.expect(server == name or not name and server.startswith("http."), f"{where}: the filter takes it for another than {server}")

    def route(self, where, route, removed):
        if "direct_response" in route:
            self.expect(False, f"{where}: answers what the filter should decide")
            return
        action = route.get("route", {})
        cluster, by = action.get("cluster"), action.get("cluster_header")
        # At a gateway nothing but the filter leads anywhere: its routes are compiled from the same VirtualServices.
        to_service = cluster is not None and cluster.startswith("outbound|") and self.how["proxy"] != "gateway"
        if "redirect" not in route:
            told = "x-portolan-cluster"
            self.expect(told in [*removed, *route.get("request_headers_to_remove", [])], f"{where}: the upstream is told {told}")
        self.expect(by == "x-portolan-cluster" or to_service or "redirect" in route, f"{where}: leads to {cluster or action}")

    def all(self):
        golden = self.golden
        self.expect(golden["inputs"] == inputs(self.name, self.how), "the manifests have changed: run tests/istio/generate.sh")
        if not self.how.get("ours", True):
            text = json.dumps(golden)
            self.expect("portolan" not in text, "there is something of ours where nothing is asked for")
            return
        listeners = [l for l in golden["listeners"] if l.get("traffic_direction") == "OUTBOUND"]
        self.expect(listeners, "no listener")
        for listener in listeners:
            chains = [*listener.get("filter_chains", []), *filter(None, [listener.get("default_filter_chain")])]
            self.expect(chains, f"{listener['name']} has no chain")
            for chain in chains:
                self.chain(listener, chain)
            self.matched(listener)
            self.patient(listener)
            inspectors = [f["name"] for f in listener.get("listener_filters", [])]
            self.expect(len(inspectors) == len(set(inspectors)), f"{listener['name']}: twice the same of {inspectors}")
        names = [e["name"] for e in golden["extensions"]]
        self.expect(len(names) == len(set(names)), f"Envoy refuses extensions of one name: {names}")
        self.expect(self.asked == set(self.extensions), f"asked for {sorted(self.asked)}, there are {sorted(self.extensions)}")
        for name, extension in self.extensions.items():
            config = extension["typed_config"]["config"]
            self.expect(config.get("fail_open", False) is False and config.get("failure_policy", "FAIL_CLOSED") == "FAIL_CLOSED",
                        f"{name} lets through what it cannot judge")
            self.expect("remote" in config["vm_config"]["code"], f"{name}: no module")
            settings = config["configuration"]
            settings = json.loads(settings["value"]) if isinstance(settings.get("value"), str) else settings
            self.expect(settings.get("controller") == "portolan", f"{name}: {settings}")
        controllers = [c for c in golden["clusters"] if c["name"] == "portolan"]
        self.expect(len(controllers) == 1 and controllers[0]["transport_socket"]["name"] == "envoy.transport_sockets.tls",
                    "no way to the controller, or none with TLS")


def main():
    wrong, versions = [], set()
    names = sorted(path.stem for path in (HERE / "meshes").glob("*.yaml"))
    stale = {path.stem for path in (HERE / "golden").glob("*.json")} - set(names)
    if stale:
        wrong.append(f"golden files of no mesh: {sorted(stale)}")
    used = {manifest for name in names for manifest in plan(name)["manifests"]}
    unused = {path.name for path in DEPLOY.glob("*.yaml")} - used
    if unused:
        wrong.append(f"in no mesh: {sorted(unused)}")
    # So that several of them in one pipe are several documents.
    wrong += [f"{path.name} does not begin with ---" for path in DEPLOY.glob("*.yaml") if not path.read_text().startswith("---\n")]
    for name in names:
        path = HERE / f"golden/{name}.json"
        if not path.exists():
            wrong.append(f"{name}: no golden file: run tests/istio/generate.sh")
            continue
        look = Look(name, plan(name), json.loads(path.read_text()))
        look.all()
        versions.add(look.golden["istio"])
        print(f"{name}: {look.chains} chains, {len(look.wrong)} wrong")
        wrong += look.wrong
    if len(versions) > 1:
        wrong.append(f"of several versions of Istio: {sorted(versions)}")
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"istiod {versions.pop()}: no way around the filter in {len(names)} meshes")


if __name__ == "__main__":
    main()
