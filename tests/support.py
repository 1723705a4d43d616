"""What the tests in Python share: where the programs are, ports, and waiting for what is going to be true."""
import http.client, os, pathlib, socket, time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PORTOLAN = os.environ.get("PORTOLAN", ROOT / "target/debug/portolan")
PROXY_HOST = os.environ.get("PROXY_HOST", ROOT / "target/debug/proxy-host")
WASM = os.environ.get("FILTER_WASM", ROOT / "target/filter/wasm32-wasip1/wasm/portolan_filter.wasm")
ENVOY = os.environ.get("ENVOY", ROOT / ".venv/bin/envoy")
PATIENCE = 30


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(what, function, limit=PATIENCE, pause=0.02, done=bool):
    """Calls function until what it says is done, by itself something true; the event is awaited, not slept for."""
    end, last = time.monotonic() + limit, None
    while time.monotonic() < end:
        try:
            last = function()
            if done(last):
                return last
        except (OSError, ValueError, http.client.HTTPException) as error:
            last = error
        time.sleep(pause)
    raise AssertionError(f"{what}: not within {limit} s, last {last!r}")
