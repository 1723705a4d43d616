#!/usr/bin/env bash
# run.sh [NAME...]: the scenarios with a real kube-apiserver and etcd, on loopback. No root, but to install etcd.
set -euo pipefail
cd "$(dirname "$0")"
skip() { echo "SKIPPED: the scenarios with a Kubernetes API server: $1"; [ "${CI:-}" = true ] && exit 1; exit 0; }
tools=(etcd:etcd-server jq:jq openssl:openssl python3:python3-venv)
../packages.sh "${tools[@]}"
for tool in "${tools[@]}"; do command -v "${tool%%:*}" >/dev/null || skip "${tool%%:*} is missing (Debian's ${tool#*:})"; done
KUBE_APISERVER=$(./build.sh) || { [ $? = 3 ] && skip "Go is missing, to build kube-apiserver"; exit 1; }
export KUBE_APISERVER
MONITORING_CRDS=$(./monitoring.sh) || { [ $? = 3 ] && skip "Go is missing, for the CRDs of the Prometheus operator"; exit 1; }
export MONITORING_CRDS
PATH=$(../venv.sh):$PATH
exec python scenarios.py "$@"
