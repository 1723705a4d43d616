# Sourced by what runs in network namespaces: installs or names what is missing, and puts .venv first in PATH.
# SKIPPED, and under CI=true a failure, where the machine does not let us.
# shellcheck shell=bash
rig_env() {
    local here tools=(ip iptables openssl ss setpriv unshare python3 curl) tool missing=()
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    "$here/packages.sh" ip:iproute2 iptables:iptables openssl:openssl ss:iproute2 setpriv:util-linux unshare:util-linux python3:python3-venv curl:curl
    for tool in "${tools[@]}"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
    if [ "$(id -u)" != 0 ] || [ ${#missing[@]} != 0 ]; then
        echo "SKIPPED: $1 needs root and ${tools[*]}; missing: ${missing[*]:-root}"
        [ "${CI:-}" = true ] && exit 1
        exit 0
    fi
    PATH=$("$here/venv.sh"):$PATH
}
