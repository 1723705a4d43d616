#!/usr/bin/env python3
"""build.py: target/deployed/proxy-host and target/deployed/portolan, as they are to be deployed (`make release`).

proxy-host is built twice, with all crates it is made of: the second time after what the first one saw of some seconds of
requests, so that the code which runs for each request is laid out for it. portolan is built as by `cargo build --release`: what
it computes has no such few paths. Needs rustup, which brings LLVM's tool for profiles (the component llvm-tools) if it is not
there yet.
"""
import os, re, shutil, subprocess, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEEN, DEPLOYED = ROOT / "target/pgo", ROOT / "target/deployed"
SECONDS = "3"
# Entries beside those that are asked for, so that reading them counts as something that happens.
OTHERS = 2000


def step(number, text):
    print(f"make release, {number} of 5, {time.strftime('%H:%M:%S')}: {text}", flush=True)


def said(*command):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def profdata(host):
    """LLVM's tool for profiles, of the compiler's own version."""
    tool = Path(said("rustc", "--print=sysroot").strip(), "lib/rustlib", host, "bin/llvm-profdata")
    if not tool.exists():
        subprocess.run(["rustup", "component", "add", "llvm-tools"], cwd=ROOT, check=True)
    return tool


def build(*what, env=None):
    subprocess.run(["cargo", "build", "--locked", "--release", *what], cwd=ROOT, env=env, check=True)


def build_for(host, flag, *what):
    """With a flag for all crates of the programs, and not for those that run while they are built: those have no `--target`."""
    flags = [*os.environ.get("RUSTFLAGS", "").split(), flag]
    build("--target", host, *what, env={**os.environ, "CARGO_ENCODED_RUSTFLAGS": "\x1f".join(flags)})
    return ROOT / "target" / host / "release"


def entry(name, protocol, port):
    return f"""apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: default}}
spec:
  hosts: [{name}.example.com]
  ports: [{{number: 80, name: p, protocol: {protocol}, targetPort: {port}}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1}}]
---
"""


def watch(folder):
    """Requests of each kind through the program that counts."""
    load = folder / "load"
    config = SEEN / "config"
    config.mkdir()
    # The clients and the origin count too; it is not their time that matters.
    silent = {**os.environ, "LLVM_PROFILE_FILE": os.devnull}
    origin = subprocess.Popen([load, "origin"], env=silent, stdout=subprocess.PIPE, text=True)
    proxy = None
    try:
        http1, http2, _ = (address.rpartition(":")[2] for address in origin.stdout.readline().split())
        (config / "entries.yaml").write_text(entry("bench", "HTTP", http1) + entry("bench2", "HTTP2", http2))
        (config / "others.yaml").write_text("".join(entry(f"other-{number}", "HTTP", 80) for number in range(OTHERS)))
        proxy = subprocess.Popen([folder / "proxy-host", "--config", config, "--http-proxy", "127.0.0.1:0", "--threads", "1", "--access-log=false"],
                                 env={**os.environ, "LLVM_PROFILE_FILE": str(SEEN / "%p.profraw")}, stderr=subprocess.PIPE, text=True)
        ready = next((line for line in proxy.stderr if "ready after" in line), None)
        if ready is None:
            raise SystemExit("the proxy-host that counts does not start")
        address = re.search(r"HTTP proxy on ([0-9.:]+)", ready)[1]
        for command in (["http1"], ["http2"], ["http2", "--host", "bench2.example.com"], ["connections", "--concurrency", "8"]):
            subprocess.run([load, *command, "--proxy", address, "--pid", str(proxy.pid), "--warm", "0", "--seconds", SECONDS],
                           env=silent, check=True)
    finally:
        for process in filter(None, (proxy, origin)):
            process.terminate()
        # Counts are written at the end.
        if proxy:
            proxy.communicate(timeout=60)
        origin.wait(10)


def main():
    # What is left of an interrupted run must not be taken for a result.
    for folder in (SEEN, DEPLOYED):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    host = re.search(r"^host: (.*)$", said("rustc", "-vV"), re.M)[1]
    tool = profdata(host)
    step(1, "a proxy-host that counts what runs (some minutes)")
    folder = build_for(host, f"-Cprofile-generate={SEEN}", "--package=portolan-proxy-host", "--package=portolan-tests", "--bin=proxy-host", "--bin=load")
    step(2, f"requests through it, four kinds for {SECONDS} seconds each")
    watch(folder)
    counts = list(SEEN.glob("*.profraw"))
    if not counts:
        raise SystemExit(f"the proxy-host that counts left no counts in {SEEN}")
    merged = SEEN / "merged.profdata"
    subprocess.run([tool, "merge", "--output", merged, *counts], check=True)
    step(3, "proxy-host after these counts (some minutes)")
    folder = build_for(host, f"-Cprofile-use={merged}", "--package=portolan-proxy-host", "--bin=proxy-host")
    shutil.copy2(folder / "proxy-host", DEPLOYED)
    step(4, "portolan (some minutes)")
    build("--package=portolan-controller", "--bin=portolan")
    shutil.copy2(ROOT / "target/release/portolan", DEPLOYED)
    step(5, f"done: {DEPLOYED}/proxy-host, {DEPLOYED}/portolan")


main()
