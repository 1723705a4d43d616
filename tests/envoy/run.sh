#!/usr/bin/env bash
# run.sh: the scenarios with a real Envoy and with proxy-host, both with a controller of their own, the way out by an
# egress gateway, its certificates and those of clients, the quick start, and istiod's own egress gateway with our filter in it.
set -euo pipefail
cd "$(dirname "$0")"
. ../rig-env.sh
rig_env "the scenarios with Envoy"
failed=0
python scenarios.py envoy & first=$!
python scenarios.py proxy-host || failed=1
wait "$first" || failed=1
python two_hop.py proxy-host envoy || failed=1
python gateway_files.py proxy-host envoy || failed=1
python client_files.py proxy-host envoy || failed=1
python quickstart.py || failed=1
python ../istio/gateway.py || failed=1
exit "$failed"
