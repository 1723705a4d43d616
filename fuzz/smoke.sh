#!/usr/bin/env bash
# smoke.sh SECONDS [TARGET...]: runs each fuzz target for so long, two at a time. Does without cargo-fuzz and nightly: the
# flags are those that `cargo fuzz run --sanitizer none` gives.
set -euo pipefail
cd "$(dirname "$0")"
seconds=$1
shift
host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions"
if ! command -v c++ >/dev/null; then
    echo "SKIPPED: libFuzzer needs a C++ compiler"
    [ "${CI:-}" = true ] && exit 1
    exit 0
fi
cargo build --target "$host"
export out=target/$host/debug seconds RUST_BACKTRACE=0
# New inputs are kept under target/, so that a run leaves the tree as it was.
one() {
    mkdir -p "target/corpus/$1" artifacts
    "$out/$1" -max_total_time="$seconds" -rss_limit_mb=1024 -artifact_prefix="artifacts/$1-" \
        "target/corpus/$1" "corpus/$1" >"target/$1.log" 2>&1 || { tail -40 "target/$1.log"; echo "$1: FAILED"; exit 1; }
    echo "$1: $(tail -1 "target/$1.log")"
}
export -f one
[ $# -gt 0 ] || set -- $(ls fuzz_targets | sed 's/\.rs$//')
printf '%s\n' "$@" | xargs -P 2 -I {} bash -c 'one {}'
