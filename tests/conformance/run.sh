#!/usr/bin/env bash
# run.sh KIND...: the recorded cases of these kinds, the differences and the examples, against proxy-host in a namespace.
set -euo pipefail
cd "$(dirname "$0")"
venv=../../.venv

has() { for tool in "$@"; do command -v "$tool" >/dev/null || return 1; done; }
tools=(ip iptables openssl ss setpriv python3)
if ! has "${tools[@]}" && [ "$(id -u)" = 0 ] && has apt-get; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y iproute2 iptables openssl util-linux python3-venv >/dev/null
fi
if ! has "${tools[@]}" || [ "$(id -u)" != 0 ]; then
    echo "SKIPPED: the conformance cases need root and ${tools[*]}"
    [ "${CI:-}" = true ] && exit 1
    exit 0
fi
if ! "$venv/bin/python" -c 'import yaml, h2' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q pyyaml h2
fi
PATH=$(cd "$venv/bin" && pwd):$PATH
mapfile -t cases < <(python select_cases.py "$@")
exec python rig.py check ./sut-proxy-host "${cases[@]}" differences/* examples/*
