#!/usr/bin/env python3
"""gen.py [--check]: writes sidecars.yaml and gateways.yaml, which say the same of two kinds of proxies."""
import pathlib, sys

import yaml

V3 = "type.googleapis.com/envoy.extensions"
HERE = pathlib.Path(__file__).resolve().parent


def wasm(kind, root, name):
    """The module for a filter that istiod does not place itself; the agent fetches it as it does a WasmPlugin's."""
    return {"name": name, "typed_config": {
        "@type": f"{V3}.filters.{kind}.wasm.v3.Wasm",
        "config": {
            "name": root, "root_id": root, "fail_open": False,
            "configuration": {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": '{"controller": "portolan"}'},
            "vm_config": {"runtime": "envoy.wasm.runtime.v8", "code": {"remote": {"http_uri": {
                "uri": "oci://registry.example.com/portolan/filter@sha256:DIGEST", "cluster": "_", "timeout": "30s"}}}},
        }}}


def discovered(kind, name):
    return {"name": name, "config_discovery": {
        "config_source": {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"},
        "type_urls": [f"{V3}.filters.{kind}.wasm.v3.Wasm"]}}


def on_stream():
    return {"resource_api_version": "V3", "api_config_source": {"api_type": "DELTA_GRPC", "transport_api_version": "V3",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "portolan"}}]}}


def on_demand():
    return {"name": "portolan-on-demand", "typed_config": {
        "@type": f"{V3}.filters.http.on_demand.v3.OnDemand", "odcds": {"source": on_stream(), "timeout": "2s"}}}


def secret(name):
    return {"name": name, "sds_config": {"resource_api_version": "V3", "initial_fetch_timeout": "0s", "api_config_source": {
        "api_type": "GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": True,
        "grpc_services": [{"envoy_grpc": {"cluster_name": "sds-grpc"}}]}}}


def controller():
    """The controller's Service, with the certificates that the mesh has given to both sides."""
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        "name": "portolan", "type": "STRICT_DNS", "connect_timeout": "2s",
        "typed_extension_protocol_options": {options: {"@type": f"type.googleapis.com/{options}", "explicit_http_config": {
            "http2_protocol_options": {"connection_keepalive": {"interval": "30s", "timeout": "10s"}}}}},
        "load_assignment": {"cluster_name": "portolan", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {
            "socket_address": {"address": "portolan.portolan-system.svc.cluster.local", "port_value": 15012}}}}]}]},
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
            "@type": f"{V3}.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_certificate_sds_secret_configs": [secret("default")],
                "combined_validation_context": {
                    "default_validation_context": {"match_typed_subject_alt_names": [
                        {"san_type": "URI", "matcher": {"exact": "spiffe://cluster.local/ns/portolan-system/sa/portolan"}}]},
                    "validation_context_sds_secret_config": secret("ROOTCA")}}}}}


def patch(apply_to, context, operation, value, **match):
    change = {"operation": operation} if value is None else {"operation": operation, "value": value}
    return {"applyTo": apply_to, "match": {"context": context, **match}, "patch": change}


HCM = "envoy.filters.network.http_connection_manager"
TCP_PROXY = {"listener": {"filterChain": {"filter": {"name": "envoy.filters.network.tcp_proxy"}}}}
ROUTER = {"listener": {"filterChain": {"filter": {"name": HCM, "subFilter": {"name": "envoy.filters.http.router"}}}}}
# What the filter orders, and no upstream need know. The hash is asked for again with each attempt: the clusters that balance by it
# remove it.
OURS = ["x-portolan-cluster", "x-portolan-destination", "x-portolan-retry", "x-portolan-mirror", "x-envoy-fault-delay-request"]
BY_HEADER = {"request_headers_to_remove": OURS, "route": {"cluster_header": "x-portolan-cluster"}}


# istiod gives a proxy the extension configurations of every EnvoyFilter that selects it, whatever their context, and Envoy refuses
# them all when a name is there twice: sidecars.yaml in the root namespace selects gateways too.
TCP_FILTER = {"SIDECAR_OUTBOUND": "portolan-tcp", "GATEWAY": "portolan-gateway-tcp"}


def common(context):
    """What a proxy of either kind needs: the controller, the module for connections, and clusters on demand."""
    return [
        patch("CLUSTER", context, "ADD", controller()),
        patch("EXTENSION_CONFIG", context, "ADD", wasm("network", "portolan_tcp", TCP_FILTER[context])),
        patch("HTTP_FILTER", context, "INSERT_BEFORE", on_demand(), **ROUTER),
    ]


def tcp_proxy(**more):
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": f"{V3}.filters.network.tcp_proxy.v3.TcpProxy", **more,
        "on_demand": {"odcds_config": on_stream(), "timeout": "2s"}}}


def tcp(context):
    """Every TCP proxy asks the filter first: those of virtualOutbound, and those that take what is no HTTP on an HTTP port
    (PassthroughFilterChain), which would otherwise be a way around it."""
    proxy = tcp_proxy()
    return [patch("NETWORK_FILTER", context, "INSERT_BEFORE", discovered("network", TCP_FILTER[context]), **TCP_PROXY),
            patch("NETWORK_FILTER", context, "MERGE", proxy, **TCP_PROXY)]


def closed():
    """What was sent to the proxy's own port istiod ends; the filter could send it round in circles."""
    chain = {"name": "virtualOutbound-blackhole", "filter": {"name": TCP_FILTER["SIDECAR_OUTBOUND"]}}
    return [patch("NETWORK_FILTER", "SIDECAR_OUTBOUND", "REMOVE", None, listener={"name": "virtualOutbound", "filterChain": chain})]


def unknown():
    """Hosts that istiod does not know: in place of what its outbound traffic policy makes of them. Those that it knows keep their
    route; the filter decides about them as well, and its headers go no further."""
    return [patch("ROUTE_CONFIGURATION", "SIDECAR_OUTBOUND", "MERGE", {"request_headers_to_remove": OURS}, routeConfiguration={}),
            *(patch("HTTP_ROUTE", "SIDECAR_OUTBOUND", "MERGE", {"route": BY_HEADER["route"]}, routeConfiguration={"vhost": {"name": name}})
              for name in ("allow_any", "allow_any_dynamic_dns", "block_all"))]


def refusals():
    """An access log in Istio's format of what the filter refuses: istiod's own log, which names it as well, is not in a chain of ours."""
    line = ("[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% %RESPONSE_FLAGS% "
            "%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% "
            "%DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" "
            "\"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% "
            "%DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n")
    return {"name": "envoy.access_loggers.file",
            "filter": {"extension_filter": {"name": "envoy.access_loggers.extension_filters.cel", "typed_config": {
                "@type": f"{V3}.access_loggers.filters.cel.v3.ExpressionFilter",
                "expression": "response.code_details.startsWith('portolan_')"}}},
            "typed_config": {"@type": f"{V3}.access_loggers.file.v3.FileAccessLog", "path": "/dev/stdout",
                             "log_format": {"text_format_source": {"inline_string": line}}}}


# What virtualOutbound looks at it looks at before any listener of istiod's gets the connection. So on the ports where istiod never looks
# (pkg/config/kube), as the server may speak first, nobody looks; on others a silent client is taken for no HTTP after a while.
UNSEEN, WAIT = (25, 53, 3306, 27017), "5s"


def sniffed():
    """Ports that istiod has no listener for: HTTP, and plain bytes."""
    manager = {
        "@type": f"{V3}.filters.network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": "portolan",
        "access_log": [refusals()], "normalize_path": True, "stream_idle_timeout": "0s", "upgrade_configs": [{"upgrade_type": "websocket"}],
        "route_config": {"name": "portolan", "virtual_hosts": [{"name": "portolan", "domains": ["*"], "routes": [
            {"match": {"prefix": "/"}, **BY_HEADER}]}]},
        "http_filters": [discovered("http", "portolan-http"), on_demand(), {"name": "envoy.filters.http.router", "typed_config": {
            "@type": f"{V3}.filters.http.router.v3.Router"}}]}
    chain = {"name": "portolan-http", "filter_chain_match": {"transport_protocol": "raw_buffer", "application_protocols": ["http/1.1", "h2c"]},
             "filters": [{"name": HCM, "typed_config": manager}]}
    # Envoy does not go back to istiod's catch-all once a chain has taken plain bytes: what is no HTTP has one of its own.
    there, context = {"listener": {"name": "virtualOutbound"}}, "SIDECAR_OUTBOUND"
    plain = {"name": "portolan-tcp", "filter_chain_match": {"transport_protocol": "raw_buffer"}, "filters": [
        discovered("network", TCP_FILTER[context]), tcp_proxy(stat_prefix="portolan", cluster="BlackHoleCluster")]}

    unseen = {"or_match": {"rules": [{"destination_port_range": {"start": port, "end": port + 1}} for port in UNSEEN]}}

    def instead(kind, message, **more):
        """One of them, whether istiod has put one there or not."""
        name = f"envoy.filters.listener.{kind}"
        own = {"listener": {"name": "virtualOutbound", "listenerFilter": name}}
        filter = {"name": name, "typed_config": {"@type": f"{V3}.filters.listener.{kind}.v3.{message}"}, **more}
        return [patch("LISTENER_FILTER", context, "REMOVE", None, **own), patch("LISTENER_FILTER", context, "INSERT_FIRST", filter, **there)]
    # Under ALLOW_ANY_DYNAMIC_DNS istiod has such a chain, whose routes lead past the filter's choice.
    own = {"listener": {"name": "virtualOutbound", "filterChain": {"name": "virtualOutbound-catchall-tcp-http"}}}
    return [patch("EXTENSION_CONFIG", context, "ADD", wasm("http", "portolan_http", "portolan-http")),
            patch("FILTER_CHAIN", context, "REMOVE", None, **own), patch("FILTER_CHAIN", context, "ADD", chain, **there),
            patch("FILTER_CHAIN", context, "ADD", plain, **there),
            *instead("http_inspector", "HttpInspector", filter_disabled=unseen), *instead("tls_inspector", "TlsInspector", filter_disabled=unseen),
            # First, for the ports to be those that clients asked for: use_original_dst alone restores them last.
            *instead("original_dst", "OriginalDst"),
            patch("LISTENER", context, "MERGE", {"listener_filters_timeout": WAIT, "continue_on_listener_filters_timeout": True}, **there)]


def served():
    """Every request to a gateway goes where the filter says. It knows Gateways and VirtualServices itself; with istiod's routes
    in force as well, paths and headers would be changed twice, and a request be judged by what the filter has made of it."""
    route = {"match": {"prefix": "/"}, "request_headers_to_remove": OURS, "route": {
        "cluster_header": "x-portolan-cluster", "timeout": "0s",
        "hash_policy": [{"filter_state": {"key": "envoy.hashable_string"}}],
        "retry_policy": {"retry_on": "connect-failure,refused-stream,unavailable,cancelled", "num_retries": 2,
                         "host_selection_retry_max_attempts": 5, "retry_host_predicate": [
                             {"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": {
                                 "@type": f"{V3}.retry.host.previous_hosts.v3.PreviousHostsPredicate"}}]}}}
    host = {"name": "portolan", "domains": ["*"], "include_request_attempt_count": True, "routes": [route]}
    return [patch("VIRTUAL_HOST", "GATEWAY", "REMOVE", None, routeConfiguration={}),
            patch("VIRTUAL_HOST", "GATEWAY", "ADD", host, routeConfiguration={})]


def envoy_filter(head, name, patches, **spec):
    text = yaml.safe_dump({"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
                           "metadata": {"name": name, "namespace": "istio-system"},
                           "spec": {**spec, "configPatches": patches}}, sort_keys=False, width=110, default_flow_style=False)
    return f"---\n# {head}\n# Written by gen.py.\n{text}"


def files():
    sidecar = "SIDECAR_OUTBOUND"
    return {
        "sidecars.yaml": envoy_filter("Sidecars: what the filter says becomes where the connection goes.", "portolan",
                                      common(sidecar) + unknown() + sniffed() + tcp(sidecar) + closed()),
        "gateways.yaml": envoy_filter("Egress gateways: what the filter says becomes where requests and connections go.", "portolan-gateway",
                                      common("GATEWAY") + served() + tcp("GATEWAY"), workloadSelector={"labels": {"istio": "egressgateway"}}),
    }


if __name__ == "__main__":
    yaml.SafeDumper.ignore_aliases = lambda *_: True
    for name, text in files().items():
        if sys.argv[1:] != ["--check"]:
            (HERE / name).write_text(text)
        elif (HERE / name).read_text() != text:
            sys.exit(f"{name} is not what gen.py writes")
