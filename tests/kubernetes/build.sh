#!/usr/bin/env bash
# build.sh: builds a real kube-apiserver from the Go module proxy, unless it is there already; prints its path. Takes
# minutes once; the binary is kept outside the tree. Status 3: there is no Go, or no jq.
# k8s.io/kubernetes pins its staging modules to v0.0.0 by replace directives, so a module around it replaces each with
# the matching v0.x.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
version=${KUBE_VERSION:-1.36.3}; staging=v0.${version#1.}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/portolan
out=$cache/kube-apiserver-$version
mkdir -p "$cache"
exec 9>"$out.lock"; flock 9                              # several test runs may come here at a time
if [ ! -x "$out" ]; then
    command -v go >/dev/null && command -v jq >/dev/null || exit 3
    dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
    cp "$here/kube-apiserver/main.go" "$dir/"; cd "$dir"
    gomod=$(go mod download -json "k8s.io/kubernetes@v$version" | jq -r .GoMod)
    printf 'module kube-apiserver\ngo 1.26.0\nrequire k8s.io/kubernetes v%s\n' "$version" > go.mod
    grep -E '^[[:space:]]*k8s.io/[a-z-]+ v0.0.0$' "$gomod" | awk '{print $1}' | sort -u |
        while read -r m; do echo "replace $m => $m $staging" >> go.mod; done
    GOFLAGS=-mod=mod go build -ldflags="-s -w" -o kube-apiserver . >&2
    mv kube-apiserver "$out"
fi
echo "$out"
