"""What it gives imgfs that it keeps processors from halting, and what others would have of it."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.commands import run as run_command
from bench.lineup import Lineup, line_up
from bench.measure import reads_per_second, timed
from bench.result import OURS, Result
from bench.site import Site
from bench.systems import Bindfs, Imgfs, ImgfsNoawake, Passthrough, System, Xfs
from bench.trees import make_tree
from imgfs.awake import DEVICE

_IMAGE_BYTES = 20_000
_READ, _COPIED, _REMOVED = "open, read, close, 1 client", "`cp -r` in", "`rm -rf`"
_UNITS = {_READ: "/s", _COPIED: "images/s", _REMOVED: "images/s"}
_KEPT = ", processors kept awake for all"


@dataclass(frozen=True)
class _Size:
    images: int
    rounds: int
    window_s: float
    disk_bytes: int


SIZES = {
    "tiny": _Size(40, 1, 0.1, 400 << 20),
    "quick": _Size(300, 2, 0.3, 1 << 30),
    "full": _Size(4_000, 5, 1.5, 8 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("awake", "Processors that halt", parameters={"images": chosen.images, "window_s": chosen.window_s})
    source = site.fresh("source")
    make_tree(source, chosen.images, _IMAGE_BYTES)
    with line_up(site, chosen.disk_bytes, result, (Imgfs, ImgfsNoawake, Xfs, Bindfs, Passthrough)) as lineup:
        lineup.fill(chosen.images, _IMAGE_BYTES)
        found = lineup.take_turns(chosen.rounds, "turn", functools.partial(_turn, lineup, source, chosen))
    for what, unit in _UNITS.items():
        theirs = dict(found[what])
        asleep = theirs.pop(ImgfsNoawake.name)
        ours = theirs.pop(Imgfs.name)
        result.add(what, unit, {OURS: ours, **theirs})
        result.add(f"{what}, imgfs with `noawake`", unit, {OURS: asleep, **theirs})
        if kept := dict(found.get(what + _KEPT, {})):
            kept.pop(ImgfsNoawake.name)
            result.add(what + _KEPT, unit, {OURS: kept.pop(Imgfs.name), **kept})
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes, read in random order for {chosen.window_s:g} s, copied "
        f"in, removed again; {chosen.rounds} rounds. Kept awake for all: the bench holds {DEVICE} at 0 meanwhile."
    )
    return result


def _turn(lineup: Lineup, source: Path, chosen: _Size, system: System, number: int) -> dict[str, float]:
    """Do everything as the machine is, and with processors that do not halt."""
    if isinstance(system, Xfs):
        return {}
    figures: dict[str, float] = {}
    for kept in (False, True) if os.path.exists(DEVICE) else (False,):
        system.settle()
        tree = system.directory / f"tree{number}"
        with _kept_awake() if kept else contextlib.nullcontext():
            for what, figure in _figures(lineup, source, tree, chosen, system, number):
                figures[what + _KEPT * kept] = figure()
    return figures


def _figures(
    lineup: Lineup, source: Path, tree: Path, chosen: _Size, system: System, number: int
) -> Iterator[tuple[str, Callable[[], float]]]:
    yield _READ, lambda: reads_per_second(system.directory, lineup.names, chosen.window_s, 1, number)
    yield _COPIED, lambda: chosen.images / timed(lambda: run_command("cp", "-r", source, tree))
    yield _REMOVED, lambda: chosen.images / timed(lambda: run_command("rm", "-rf", tree))


@contextlib.contextmanager
def _kept_awake() -> Iterator[None]:
    with open(DEVICE, "wb", buffering=0) as device:
        device.write(bytes(4))
        yield
