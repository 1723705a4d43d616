#!/usr/bin/env bash
# venv.sh: makes .venv with what requirements.txt names, unless it is there already; prints its bin directory.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/../.venv
exec 9>"$here/../target/.venv.lock"; flock 9          # several test runs may come here at a time
if ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt" >&2
    cp "$here/requirements.txt" "$venv/requirements.txt"
fi
(cd "$venv/bin" && pwd)
