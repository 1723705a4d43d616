# Sourced by what runs in network namespaces: installs or names what is missing, and puts .venv first in PATH.
# SKIPPED, and under CI=true a failure, where the machine does not let us.
# shellcheck shell=bash
rig_env() {
    local here tools=(ip iptables openssl ss setpriv unshare python3 curl) tool missing=()
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    have_all() { for tool in "${tools[@]}"; do command -v "$tool" >/dev/null || return 1; done; }
    if ! have_all && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y iproute2 iptables openssl util-linux python3-venv curl >/dev/null
    fi
    for tool in "${tools[@]}"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
    if [ "$(id -u)" != 0 ] || [ ${#missing[@]} != 0 ]; then
        echo "SKIPPED: $1 needs root and ${tools[*]}; missing: ${missing[*]:-root}"
        [ "${CI:-}" = true ] && exit 1
        exit 0
    fi
    PATH=$("$here/venv.sh"):$PATH
}
