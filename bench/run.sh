#!/usr/bin/env bash
# Every benchmark; each checks its answer before it times. bench/RESULTS.md holds the last numbers.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo bench --locked -p portolan-registry --bench lookup
cargo bench --locked -p portolan-registry --bench routes
echo "the same with huge pages"
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 cargo bench --locked -p portolan-registry --bench lookup -- 1000000
cargo bench --locked -p portolan-tests --bench filter
cargo build --locked --release -p portolan-proxy-host -p portolan-tests --bins
# What is deployed, if it is there and of these sources.
proxy_host=target/release/proxy-host
deployed=target/deployed/proxy-host
if [ -e $deployed ] && [ -z "$(find Cargo.toml Cargo.lock ./*/src ./*/Cargo.toml -newer $deployed -print -quit)" ]; then
    proxy_host=$deployed
fi
echo "proxy-host is $proxy_host"
for entries in 10 100000; do
    python3 bench/serving.py "$proxy_host" target/release/origin $entries
done
cargo build --locked --release -p portolan-controller --bins --examples
venv=$(tests/venv.sh)
[ -e target/filter/wasm32-wasip1/wasm/portolan_filter.wasm ] || make wasm
# Captured connections have no loopback destination: in a namespace of its own, where that may be made.
alone=()
if [ "$(id -u)" = 0 ]; then
    alone=(unshare --net sh -c 'ip link set lo up && ip addr add 198.18.0.1/32 dev lo && ADDRESS=198.18.0.1 exec "$@"' sh)
fi
for entries in 10000 100000; do
    SOAK=$([ "$entries" = 10000 ] && echo 10000 || echo 0) SUBSCRIBERS=target/release/examples/subscribers \
        "${alone[@]}" python3 bench/envoy.py target/release/portolan target/release/origin \
        target/filter/wasm32-wasip1/wasm/portolan_filter.wasm "$venv/envoy" "$entries"
done
# A cluster of its own, where Go and etcd are there to have one.
if KUBE_APISERVER=$(tests/kubernetes/build.sh) && command -v etcd >/dev/null; then
    KUBE_APISERVER=$KUBE_APISERVER "$venv/python" bench/kubernetes.py target/release/portolan "$proxy_host"
fi
python3 bench/routes.py "$proxy_host" target/release/portolan target/release/origin \
    target/filter/wasm32-wasip1/wasm/portolan_filter.wasm "$venv/envoy"
if command -v valgrind >/dev/null; then
    python3 bench/untouched.py "$proxy_host"
else
    echo "SKIPPED: bench/untouched.py needs valgrind"
fi
python3 bench/traffic.py "$proxy_host" target/release/load "$venv/envoy"
python3 bench/floods.py "$proxy_host" target/release/load
ls -l target/filter/wasm32-wasip1/wasm/portolan_filter.wasm 2>/dev/null || make wasm
