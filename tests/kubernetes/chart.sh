#!/usr/bin/env bash
# chart.sh: the chart as helm sees it, and the rendered manifests beside it.
set -euo pipefail
cd "$(dirname "$0")"
HELM=$(./helm.sh) || { [ $? = 3 ] && { echo "SKIPPED: helm lint: Go is missing, to build helm"; [ "${CI:-}" != true ]; exit; }; exit 1; }
export HELM
deploy=../../deploy/kubernetes
"$HELM" lint --strict --quiet "$deploy/chart"
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
"$deploy/render.sh" "$out"
PATH=$(../venv.sh):$PATH
# By what they say: helm's comments and order are its own.
python - "$deploy" "$out" <<'END'
import pathlib, sys, yaml
def read(path):
    documents = [d for d in yaml.safe_load_all(path.read_text()) if d]
    return sorted(documents, key=lambda d: (d["kind"], d["metadata"]["name"]))
for made in sorted(pathlib.Path(sys.argv[2]).glob("*.yaml")):
    if read(made) != read(pathlib.Path(sys.argv[1]) / made.name):
        sys.exit(f"{made.name} is not what the chart renders: run deploy/kubernetes/render.sh")
END
echo "chart: ok"
