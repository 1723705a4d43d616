#!/usr/bin/env bash
# render.sh [FOLDER]: the chart as plain manifests, into FOLDER or beside this file. HELM names the helm to use.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}
render() {      # FILE TEMPLATE... -- SETTING...
    local file=$1 shown=(); shift
    while [ "${1:-}" != -- ]; do shown+=(-s "templates/$1"); shift; done
    shift
    { echo "# Rendered from the chart by render.sh."
      "${HELM:-helm}" template portolan "$here/chart" --namespace portolan-system --kube-version 1.33.0 "${shown[@]}" "$@"
    } > "$out/$file"
}
render controller.yaml namespace.yaml controller.yaml webhook.yaml -- --set createNamespace=true
render egress-gateway.yaml egress-gateway.yaml -- --set egressGateway.enabled=true
render monitoring.yaml monitoring.yaml -- --set monitoring.serviceMonitor=true,monitoring.alerts=true,monitoring.dashboard=true
