# Sourced: makes a Go module around istio.io/istio, outside the tree, and goes there. Its first build takes minutes and some GiB.
# Istio pins its API modules to commits that a proxy need not have; those of the releases beside it take their place.
# shellcheck shell=bash
version=${ISTIO_VERSION:-v0.0.0-20260827124520-eed52ebb66ad}
dir=${XDG_CACHE_HOME:-$HOME/.cache}/portolan/istio-$version
istio_module() {
    local istio module replace=(github.com/envoyproxy/go-control-plane/envoy@v1.40.0
        github.com/envoyproxy/go-control-plane/contrib@v1.36.1-0.20260729145720-a2d8c7492908
        istio.io/api@v1.31.1 istio.io/client-go@v1.31.1)
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
}
