#!/usr/bin/env bash
# generate.sh: writes golden/ anew, by istiod's own generator from the Go module proxy. Its first build takes minutes
# and some GiB, and is kept outside the tree.
# Istio pins its API modules to commits that a proxy need not have; those of the releases beside it take their place.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
version=${ISTIO_VERSION:-v0.0.0-20260827124520-eed52ebb66ad}
replace=(github.com/envoyproxy/go-control-plane/envoy@v1.40.0
    github.com/envoyproxy/go-control-plane/contrib@v1.36.1-0.20260729145720-a2d8c7492908
    istio.io/api@v1.31.1 istio.io/client-go@v1.31.1)
dir=${XDG_CACHE_HOME:-$HOME/.cache}/portolan/istio-$version
command -v go >/dev/null && command -v jq >/dev/null || { echo "generate.sh: needs Go and jq"; exit 1; }
mkdir -p "$dir"
exec 9>"$dir.lock"; flock 9
cd "$dir"
if [ ! -e go.mod ]; then
    istio=$(go mod download -json "istio.io/istio@$version" | jq -r .Dir)
    install -m 644 "$istio/go.sum" go.sum
    sed 's|^module .*|module portolan.io/tests/istio|' "$istio/go.mod" > go.mod.new
    echo "require istio.io/istio $version" >> go.mod.new
    for module in "${replace[@]}"; do echo "replace ${module%@*} => ${module%@*} ${module#*@}" >> go.mod.new; done
    mv go.mod.new go.mod
fi
cmp -s "$here/generate.go" main.go || cp "$here/generate.go" main.go
GOFLAGS=-mod=mod go build -o generate .
mkdir -p "$here/golden"
./generate "$here/../../deploy/istio" "$here/meshes" "$here/golden" > log 2>&1 || { tail -5 log; exit 1; }
python3 "$here/check.py"
