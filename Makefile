# Portolan. `make run` shows the main job, `make test` runs every test and installs what it needs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help toolchain build build-tests release run wasm oci test test-unit h2spec conformance test-envoy test-istio test-mesh test-kubernetes lint check-wasm fuzz-smoke bench gen gen-istio ci

# Kinds of resources that Portolan serves; the recorded cases that hold only these must agree.
KINDS := ServiceEntry WorkloadEntry VirtualService DestinationRule Sidecar Gateway

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# rustup brings what rust-toolchain.toml names by itself, unless it is told not to (RUSTUP_AUTO_INSTALL=0).
toolchain:
	@! command -v rustup >/dev/null || rustup target list --installed 2>/dev/null | grep -q wasm32-unknown-unknown || rustup toolchain install --no-self-update

build: toolchain  ## everything, dev profile
	cargo build --workspace --locked

release: toolchain  ## target/deployed/proxy-host and portolan, as they are to be deployed: the first guided by a profile; takes a while
	deploy/pgo/build.py

# Tests have features of dependencies that products have not (tokio's test-util): after `build` half of them were built anew.
build-tests: toolchain
	cargo test --workspace --locked --no-run

run: build  ## a proxy with examples/quickstart and an origin beside it; ONCE=1 leaves after the first two requests
	@examples/quickstart/run.sh

wasm: toolchain  ## filter.wasm, as proxy-host carries it: target/filter/wasm32-wasip1/wasm/portolan_filter.wasm
	cargo build --locked -p portolan-filter --lib --profile wasm --target wasm32-wasip1 --target-dir target/filter

oci: wasm  ## filter.wasm as an OCI image layout in target/oci, for Istio's WasmPlugin; prints the digest
	@rm -rf target/oci
	@deploy/wasm-image.py target/filter/wasm32-wasip1/wasm/portolan_filter.wasm target/oci

test: lint check-wasm test-unit test-istio conformance test-envoy test-kubernetes fuzz-smoke  ## all of these
	@echo "make test: all passed"

test-unit: build-tests  ## cargo test of every crate
	-tests/venv.sh
	@tests/packages.sh ip:iproute2 iptables:iptables nft:nftables
	cargo test --workspace --locked --no-fail-fast

h2spec: toolchain  ## conformance of proxy-host's HTTP/2 side; part of test-unit (needs Go)
	cargo test --locked -p portolan-proxy-host --test it h2spec -- --nocapture

conformance: build-tests  ## recorded answers, our differences and the examples, through proxy-host and a real Envoy (root)
	tests/conformance/run.sh $(KINDS)

test-envoy: build-tests  ## a real Envoy, and proxy-host, while things change or fail; the quick start (root)
	tests/envoy/run.sh

test-istio:  ## what istiod makes of deploy/istio leaves no way around the filter (recorded; gen-istio records anew)
	tests/istio/check.py

test-mesh: build wasm  ## deploy/istio in a mesh that lives: istiod, agents, Envoys; not in `make test` (root, Go: minutes at first)
	tests/istio/live.sh

test-kubernetes: build-tests  ## a real API server and etcd (needs Go once, to build them); the chart with helm
	tests/kubernetes/run.sh
	tests/kubernetes/chart.sh

lint: toolchain  ## formatting and clippy; warnings are errors
	cargo fmt --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

check-wasm: toolchain  ## the registry crate builds for both wasm targets
	cargo check --locked -p portolan-registry --target wasm32-wasip1
	cargo check --locked -p portolan-registry --target wasm32-unknown-unknown

fuzz-smoke: toolchain  ## each fuzz target for 10 seconds
	fuzz/smoke.sh 10

bench: toolchain  ## the numbers in bench/RESULTS.md
	bench/run.sh

gen: toolchain  ## generated protobuf code, written anew
	UPDATE=1 cargo test -p portolan-proto

gen-istio:  ## tests/istio/golden, by istiod's own generator (needs Go; its first build takes minutes)
	tests/istio/generate.sh

ci:  ## what .ci/run does: nothing may be skipped
	CI=true $(MAKE) test
