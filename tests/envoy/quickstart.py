#!/usr/bin/env python3
"""quickstart.py: runs the commands of README.md's section "With Envoy" as they stand there, in a network namespace."""
import pathlib, re, subprocess, sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
section = (ROOT / "README.md").read_text().split("\n## With Envoy\n", 1)[1].split("\n## ", 1)[0]
commands = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
# What the make target in front of this has built already.
commands = re.sub(r"(?m)^make build.*$|^tests/venv.sh.*$", "", commands)
script = f"set -e\nip link set lo up\ntrap 'kill $(jobs -p) 2>/dev/null' EXIT\n{commands}\n"
run = subprocess.run(["unshare", "--net", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=90)
answers = re.findall(r"(?m)^HTTP/1.1 (\d+)", run.stdout)
if run.returncode or answers != ["200", "502"]:
    print(run.stdout, run.stderr[-3000:], sep="\n")
    sys.exit(f"quick start: FAILED: exit status {run.returncode}, answers {answers}")
print("quick start: ok")
