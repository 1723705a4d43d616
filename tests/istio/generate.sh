#!/usr/bin/env bash
# generate.sh: writes golden/ anew, by istiod's own generator from the Go module proxy.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/module.sh"
command -v go >/dev/null && command -v jq >/dev/null || { echo "generate.sh: needs Go and jq"; exit 1; }
istio_module
cmp -s "$here/generate.go" main.go || cp "$here/generate.go" main.go
GOFLAGS=-mod=mod go build -o generate .
mkdir -p "$here/golden"
./generate "$here/../../deploy/istio" "$here/meshes" "$here/golden" > log 2>&1 || { tail -5 log; exit 1; }
python3 "$here/check.py"
