#!/usr/bin/env bash
# run.sh: proxy-host with this folder and an origin beside it; one request that a ServiceEntry allows, one that none does.
# ONCE=1 leaves after the two requests. No root; the only network is loopback.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=$here/../../target/debug
proxy=http://127.0.0.1:15080
allowed=http://hello.example.com/
refused=http://forbidden.example.com/

stop() { trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait; }
trap stop EXIT
trap 'exit 0' INT TERM

"$bin/origin" --listen 127.0.0.1:18080 &
"$bin/proxy-host" --config "$here" --log-level warn &
proxy_pid=$!
until (: </dev/tcp/127.0.0.1/15080) 2>/dev/null; do
    kill -0 "$proxy_pid" 2>/dev/null || { echo "proxy-host did not start" >&2; exit 1; }
done

try() { echo; echo "\$ curl -i -x $proxy $1"; curl -sS -i -x "$proxy" "$1"; echo; }
try "$allowed"
try "$refused"
[ "${ONCE:-}" = 1 ] && exit 0

cat <<END

Portolan is running; Ctrl-C stops it. To try:
  curl -i -x $proxy $allowed
  curl -i -x $proxy $refused
  and change $here/config.yaml: the next request follows it.
END
wait
