"""Caps the reads per second of a disk for this process and all that it starts from then on: with control groups.

Owns one group, for as long as the cap holds. Knows both kinds of control groups: `io.max` of the unified ones and the
throttle of `blkio`.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bench.commands import Failed

_GROUPS = Path("/sys/fs/cgroup")
_DEADLINE_S = 30.0


def _cap() -> tuple[Path, str, str]:
    """Return where groups are made, the file that caps and the text for it. Failed where there is neither kind."""
    blkio = _GROUPS / "blkio"
    if (blkio / "blkio.throttle.read_iops_device").exists():
        return blkio, "blkio.throttle.read_iops_device", "{device} {reads}"
    if "io" in _read(_GROUPS / "cgroup.subtree_control").split():
        return _GROUPS, "io.max", "{device} riops={reads}"
    offered = _read(_GROUPS / "cgroup.controllers").strip() or _read(_GROUPS / "unified/cgroup.controllers").strip()
    raise Failed(f"no control group caps reads here: no blkio throttle, and the controllers are: {offered or 'none'}")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def no_cap(device: str) -> str:
    """Return why the reads of *device* cannot be capped here, nothing if they can."""
    try:
        with capped(device, 1_000_000):
            return ""
    except Failed as error:
        return str(error)


@contextlib.contextmanager
def capped(device: str, reads_per_s: int) -> Iterator[None]:
    """Let everything that this process starts, and itself, read no more often from *device*.

    What it has started before goes on as it did. Failed where that cannot be had.
    """
    top, file, text = _cap()
    number = os.stat(device).st_rdev
    group = top / f"imgfs-bench-{os.getpid()}"
    before = _current(top)
    try:
        group.mkdir(exist_ok=True)
    except OSError as error:
        raise Failed(f"no control group can be made here: {error}") from error
    try:
        cap = text.format(device=f"{os.major(number)}:{os.minor(number)}", reads=reads_per_s)
        try:
            (group / file).write_text(cap)
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            raise Failed(f"the cap on reads is refused here: {error}") from error
        yield
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        _remove(group, before)


def _current(top: Path) -> Path:
    """Return the group that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (controllers == "" and top == _GROUPS) or "blkio" in controllers.split(","):
            return top / path.lstrip("/")
    return top


def _remove(group: Path, other: Path) -> None:
    """Remove *group* once it is empty; whoever is still in it goes on in *other*."""
    deadline = time.monotonic() + _DEADLINE_S
    while True:
        for pid in _read(group / "cgroup.procs").split():
            with contextlib.suppress(OSError):
                (other / "cgroup.procs").write_text(pid)
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
