#!/usr/bin/env bash
# packages.sh COMMAND:PACKAGE...: as root of a Debian, installs the packages whose commands are not there. What is missing after
# that is said by the test that needs it.
set -euo pipefail
install=()
for tool; do command -v "${tool%%:*}" >/dev/null || install+=("${tool#*:}"); done
[ ${#install[@]} != 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0
# Some packages start a service of their own; nobody asked for one.
{ apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "${install[@]}"; } >/dev/null ||
    echo "packages.sh: cannot install ${install[*]}" >&2
