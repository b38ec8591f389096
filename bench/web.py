"""nginx over each system: small images that are in memory, sent with sendfile, with `open_file_cache` and without.

Owns an nginx on the loopback for as long as a turn takes, and the wrk that asks it.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.commands import Failed
from bench.commands import run as run_command
from bench.lineup import Lineup, line_up
from bench.measure import warm_up
from bench.result import Result
from bench.serving import LOOPBACK, Server, free_ports, listens
from bench.site import Site
from bench.systems import System

_IMAGE_BYTES = 5_000
_CONNECTIONS = 16
_CACHES = {"on": "open_file_cache max=100000 inactive=600s; open_file_cache_valid 600s;", "off": "open_file_cache off;"}
_CONFIGURATION = """
user root;
worker_processes 2;
daemon off;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log warn;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {prefix}/body;
    proxy_temp_path {prefix}/proxy;
    fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi;
    scgi_temp_path {prefix}/scgi;
    keepalive_requests 100000000;
    sendfile on;
    tcp_nopush on;
    {cache}
    server {{
        listen {address}:{port} reuseport;
        root {root};
    }}
}}
"""
# Each thread of wrk asks for the images in an order of its own.
_SCRIPT = """
local paths = {{}}
for line in io.lines("{paths}") do paths[#paths + 1] = "/" .. line end
function init(args) math.randomseed(tonumber(tostring({{}}):sub(8), 16) or 1) end
function request() return wrk.format("GET", paths[math.random(#paths)]) end
"""


@dataclass(frozen=True)
class _Size:
    images: int
    rounds: int
    window_s: int
    disk_bytes: int


SIZES = {
    "tiny": _Size(30, 1, 1, 400 << 20),
    "quick": _Size(300, 1, 1, 1 << 30),
    # Short windows and many: two of one system vary by a factor of two.
    "full": _Size(5_000, 9, 1, 4 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    parameters: dict[str, object] = {"images": chosen.images, "window_s": chosen.window_s}
    result = Result("web", "nginx", parameters=parameters)
    if absent := [name for name in ("nginx", "wrk") if not shutil.which(name)]:
        result.note(f"Not measured: {' and '.join(absent)} not installed.")
        return result
    with line_up(site, chosen.disk_bytes, result) as lineup:
        lineup.fill(chosen.images, _IMAGE_BYTES)
        paths, script = site.fresh("paths"), site.fresh("script")
        paths.write_text("\n".join(lineup.names))
        script.write_text(_SCRIPT.format(paths=paths))
        for state, cache in _CACHES.items():
            _measure(site, result, lineup, script, (state, cache), chosen)
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes in random order, two processes of nginx, {_CONNECTIONS} "
        f"connections of wrk on the same cores; windows of {chosen.window_s} s, {chosen.rounds} for each, in turns."
    )
    return result


def _measure(site: Site, result: Result, lineup: Lineup, script: Path, cache: tuple[str, str], chosen: _Size) -> None:
    def serve(system: System, number: int) -> dict[str, float]:
        warm_up(system.directory, lineup.names)
        with _nginx(site, system.directory, cache[1]) as address:
            if cache[0] == "on":
                # Unmeasured: each process opens what it keeps open, in random order until hardly one is missing. Both
                # get connections (reuseport): one that got all of them would leave the other's for what is measured.
                _ask(address, script, 2 * chosen.window_s)
            return {"/s": _ask(address, script, chosen.window_s)}

    samples = lineup.take_turns(chosen.rounds, f"open_file_cache {cache[0]}", serve)["/s"]
    result.add(f"GET, open_file_cache {cache[0]}", "/s", samples)


@contextlib.contextmanager
def _nginx(site: Site, root: Path, cache: str) -> Iterator[str]:
    """Serve what is at *root*; yield the address."""
    prefix = site.fresh("nginx")
    prefix.mkdir()
    (port,) = free_ports(1)
    configuration = prefix / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(prefix=prefix, address=LOOPBACK, port=port, root=root, cache=cache))
    command = ("nginx", "-p", prefix, "-c", configuration, "-e", prefix / "error.log")
    server = Server(prefix / "said", *command)
    try:
        server.wait_until(lambda: listens(port))
        yield f"http://{LOOPBACK}:{port}"
    finally:
        server.stop()
        shutil.rmtree(prefix)


def _ask(address: str, script: Path, seconds: int) -> float:
    """Return how many images wrk gets in a second. Failed if one of them was not an image."""
    said = run_command("wrk", "-t", "1", "-c", str(_CONNECTIONS), "-d", f"{seconds}s", "-s", script, address)
    if re.search(r"Non-2xx|Socket errors: (?!connect 0, read 0, write 0)", said):
        raise Failed(f"nginx did not serve everything: {said}")
    found = re.search(r"Requests/sec:\s*([\d.]+)", said)
    if found is None:
        raise Failed(f"wrk says: {said}")
    return float(found[1])
