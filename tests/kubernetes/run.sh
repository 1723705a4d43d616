#!/usr/bin/env bash
# run.sh [NAME...]: the scenarios with a real kube-apiserver and etcd, on loopback. No root, but to install etcd.
set -euo pipefail
cd "$(dirname "$0")"
skip() { echo "SKIPPED: the scenarios with a Kubernetes API server: $1"; [ "${CI:-}" = true ] && exit 1; exit 0; }
tools=(etcd:etcd-server jq:jq openssl:openssl python3:python3-venv)
install=()
for tool in "${tools[@]}"; do command -v "${tool%%:*}" >/dev/null || install+=("${tool#*:}"); done
if [ ${#install[@]} != 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # Debian starts an etcd of its own with the package; nobody asked for one.
    { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "${install[@]}"; } >/dev/null || true
fi
for tool in "${tools[@]}"; do command -v "${tool%%:*}" >/dev/null || skip "${tool%%:*} is missing (Debian's ${tool#*:})"; done
KUBE_APISERVER=$(./build.sh) || { [ $? = 3 ] && skip "Go is missing, to build kube-apiserver"; exit 1; }
export KUBE_APISERVER
MONITORING_CRDS=$(./monitoring.sh) || { [ $? = 3 ] && skip "Go is missing, for the CRDs of the Prometheus operator"; exit 1; }
export MONITORING_CRDS
PATH=$(../venv.sh):$PATH
exec python scenarios.py "$@"
