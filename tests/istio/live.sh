#!/usr/bin/env bash
# live.sh: deploy/istio in a mesh of istiod, agents and Envoys that lives while this runs, in a network of its own. Builds istiod
# and its agent first, which takes minutes once. Not part of `make test`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../rig-env.sh"
rig_env "the living mesh"
skip() { echo "SKIPPED: the living mesh: $1"; [ "${CI:-}" = true ] && exit 1; exit 0; }
for tool in go jq etcd nsenter; do command -v "$tool" >/dev/null || skip "$tool is missing"; done
KUBE_APISERVER=$("$here/../kubernetes/build.sh")
. "$here/module.sh"
(istio_module; GOFLAGS=-mod=mod go build -o . istio.io/istio/pilot/cmd/pilot-agent istio.io/istio/pilot/cmd/pilot-discovery)
ISTIO_SOURCE=$(cd "$dir" && GOFLAGS=-mod=mod go list -m -f '{{.Dir}}' istio.io/istio)
export KUBE_APISERVER ISTIO_SOURCE ISTIO_BUILT=$dir ISTIO_VERSION=$version
exec unshare --net --mount --pid --fork --kill-child --mount-proc python "$here/live.py" "$@"
