#!/usr/bin/env bash
# h2spec.sh: builds h2spec 2.6.0 from the Go module proxy, unless it is there already; prints its path.
# Status 3: there is no Go.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
version=v0.0.0-20200804131034-70ac22940108               # the commit of 2.6.0, whose tag is no module version
folder=$root/target/h2spec/$version
mkdir -p "$folder"
exec 9>"$folder/.lock"; flock 9                          # several test runs may come here at a time
if [ ! -x "$folder/h2spec" ]; then
    command -v go >/dev/null || exit 3
    GOBIN=$folder GOFLAGS=-mod=mod go install "github.com/summerwind/h2spec/cmd/h2spec@$version" >&2
fi
echo "$folder/h2spec"
