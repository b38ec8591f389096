"""Hot reads against the number of workers and of clients, beside other FUSE filesystems and plain XFS."""

import contextlib
import functools
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.measure import read_files, read_for, rounds, say, together
from bench.result import Result
from bench.site import Failed, Site, environment, imgfs
from bench.site import run as run_command
from bench.trees import make_tree

_IMAGE_BYTES = 20_000
_WORKERS = (1, 2, 4)
_CLIENTS = (1, 4)
# Debian ships the example with the headers.
_PASSTHROUGH = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")
_DEADLINE_S = 30.0
_POLL_S = 0.05


@dataclass(frozen=True)
class _Size:
    images: int
    rounds: int
    window_s: float
    disk_bytes: int


SIZES = {
    "tiny": _Size(50, 1, 0.1, 400 << 20),
    "quick": _Size(1_000, 3, 1.0, 512 << 20),
    "full": _Size(5_000, 7, 3.0, 1 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    parameters: dict[str, object] = {"images": chosen.images, "window_s": chosen.window_s}
    result = Result("workers", "Workers and clients", parameters=parameters)
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(site.disk(chosen.disk_bytes))
        plain = disk.path / "plain"
        names = make_tree(plain, chosen.images, _IMAGE_BYTES)
        store = site.make_store(disk.path / "store")
        imgfs("import", "--quiet", plain, store)
        tops = {"xfs": plain}
        for name, neighbour in (("libfuse in C", _passthrough), ("JuiceFS", _juicefs)):
            top = stack.enter_context(neighbour(site, disk.path, plain))
            if top is None:
                result.notes.append(f"{name} is not installed here.")
            else:
                tops[name] = top
        for clients in _CLIENTS:
            _measure(site, result, store, tops, names, clients, chosen)
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes, in random order; windows of {chosen.window_s:g} s, "
        f"{chosen.rounds} for each, in turns. Clients are Python processes on the same cores. libfuse in C is its "
        "example `passthrough_ll -o cache=always` on the XFS; JuiceFS has its objects and SQLite there."
    )
    return result


def _measure(
    site: Site,
    result: Result,
    store: Path,
    tops: dict[str, Path],
    names: list[str],
    clients: int,
    chosen: _Size,
) -> None:
    samples: dict[str, list[float]] = {}
    ours = {f"{workers} workers": workers for workers in _WORKERS}
    for number, order in rounds(chosen.rounds, (*ours, *tops)):
        for what in order:
            with contextlib.ExitStack() as stack:
                if what in ours:
                    workers = str(ours[what])
                    top = stack.enter_context(site.mounted(store, "imgfs", "--workers", workers)).point
                else:
                    top = tops[what]
                read_files(top, names)
                jobs = [
                    functools.partial(read_for, top, names, chosen.window_s, number * clients + client)
                    for client in range(clients)
                ]
                seconds, counts = together(jobs)
            samples.setdefault(what, []).append(sum(counts) / seconds)
            say(f"round {number + 1}, {clients} clients, {what}: {sum(counts) / seconds:,.0f} /s")
    others = {name: samples[name] for name in tops if name != "xfs"}
    for what, count in ours.items():
        who = f"{clients} client{'s' * (clients > 1)}, {count} worker{'s' * (count > 1)}"
        result.add(f"open, read, close, {who}", "/s", samples[what], samples["xfs"], others)


@contextlib.contextmanager
def _passthrough(site: Site, disk: Path, plain: Path) -> Iterator[Path | None]:
    """Show *plain* through the C server of libfuse's examples; None where that cannot be built."""
    if not _PASSTHROUGH.exists() or shutil.which("gcc") is None or shutil.which("pkg-config") is None:
        yield None
        return
    program, point = site.fresh("passthrough"), site.fresh("mnt")
    flags = shlex.split(run_command("pkg-config", "--cflags", "--libs", "fuse3"))
    run_command("gcc", "-O2", "-Wno-all", _PASSTHROUGH, "-o", program, *flags)
    options = f"source={plain},cache=always,timeout=86400"
    with _served(point, program, "-f", "-o", options, point):
        yield point


@contextlib.contextmanager
def _juicefs(site: Site, disk: Path, plain: Path) -> Iterator[Path | None]:
    """A JuiceFS with a copy of *plain*, its objects and its database on the same disk; None where there is none."""
    beside = Path(sys.executable).with_name("juicefs")
    program = str(beside) if beside.exists() else shutil.which("juicefs")
    if program is None:
        yield None
        return
    home, point = disk / "juicefs", site.fresh("mnt")
    home.mkdir()
    database = f"sqlite3://{home}/meta.db"
    run_command(
        program, "format", "--storage", "file", "--bucket", f"{home}/objects/", "--trash-days", "0", database, "bench"
    )
    command = [program, "mount", "--no-usage-report", "--cache-dir", str(home / "cache"), "--attr-cache", "86400"]
    command += ["--entry-cache", "86400", "--dir-entry-cache", "86400", "--open-cache", "86400", database]
    with _served(point, *command, point):
        shutil.copytree(plain, point / "plain")
        yield point / "plain"


@contextlib.contextmanager
def _served(point: Path, *command: str | Path) -> Iterator[None]:
    """Run a server in the foreground until all is done; it mounts at *point*."""
    point.mkdir()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    ) as server:
        try:
            deadline = time.monotonic() + _DEADLINE_S
            while not point.is_mount():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"{command[0]} does not mount")
                time.sleep(_POLL_S)
            yield
        finally:
            subprocess.run(["umount", "--lazy", point], check=False, stderr=subprocess.DEVNULL)
            server.terminate()
            server.wait()
            point.rmdir()
