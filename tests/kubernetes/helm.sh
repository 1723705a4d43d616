#!/usr/bin/env bash
# helm.sh: builds helm from the Go module proxy, unless it is there already; prints its path. Status 3: there is no Go.
set -euo pipefail
version=v3.22.0
folder=${XDG_CACHE_HOME:-$HOME/.cache}/portolan/helm-$version
mkdir -p "$folder"
exec 9>"$folder.lock"; flock 9                           # several test runs may come here at a time
if [ ! -x "$folder/helm" ]; then
    command -v go >/dev/null || exit 3
    GOBIN=$folder GOFLAGS=-mod=mod go install "helm.sh/helm/v3/cmd/helm@$version" >&2
fi
echo "$folder/helm"
