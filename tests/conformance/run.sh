#!/usr/bin/env bash
# run.sh KIND...: the recorded cases of these kinds, the differences, the examples and our own cases (gateways, rules), in namespaces: against proxy-host,
# and against a real Envoy with `portolan serve` behind it, two cases at a time.
set -euo pipefail
cd "$(dirname "$0")"
. ../rig-env.sh
rig_env "the conformance cases"
mapfile -t cases < <(python select_cases.py "$@")
failed=0
echo "== proxy-host"
python rig.py check ./sut-proxy-host "${cases[@]}" differences/* examples/* gateways/* rules/* || failed=1
echo "== envoy"
half=$((${#cases[@]} / 2))
python rig.py check ./sut-envoy "${cases[@]:0:half}" examples/* gateways/* & first=$!
python rig.py check ./sut-envoy "${cases[@]:half}" differences/* rules/* || failed=1
wait "$first" || failed=1
exit "$failed"
