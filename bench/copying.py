"""Copying in and removing whole trees: `cp -r` and `rm -rf` through each system, and `imgfs import` past the mount."""

import functools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.commands import run as run_command
from bench.lineup import Lineup, line_up
from bench.measure import rounds, say, timed
from bench.result import OURS, Result
from bench.site import Site
from bench.systems import System, Xfs
from bench.trees import PER_DIRECTORY, make_tree

_IMAGE_BYTES = 20_000
_REMOVED_BYTES = 1_000
_IMPORTED, _COPIED, _SYNCED = "`imgfs import`", "XFS: `cp -r`", "XFS: `cp -r; sync -f`"


@dataclass(frozen=True)
class _Size:
    images: int
    few: int  # for systems that are slow to fill
    removed: int
    rounds: int
    remove_rounds: int
    import_rounds: int
    disk_bytes: int


SIZES = {
    "tiny": _Size(40, 20, 60, 1, 1, 1, 400 << 20),
    "quick": _Size(300, 200, 1_000, 1, 1, 1, 1 << 30),
    "full": _Size(20_000, 2_000, 100_000, 5, 1, 9, 20 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("copying", "Copying in, removing", parameters={"images": chosen.images, "removed": chosen.removed})
    source, small = site.fresh("source"), site.fresh("small")
    make_tree(source, chosen.images, _IMAGE_BYTES)
    make_tree(small, chosen.removed, _REMOVED_BYTES)
    with line_up(site, chosen.disk_bytes, result) as lineup:
        _copy(result, lineup, source, chosen)
        _remove(result, lineup, small, chosen)
        _bring_in(site, result, lineup, source, chosen)
        counts = {system.name: _count(_part_for(system, source, chosen), chosen) for system in lineup.systems}
    slow = ", ".join(system.name for system in lineup.systems if system.is_slow)
    fewer = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count < chosen.images)
    result.notes.append(
        f"`cp -r`: {chosen.images:,} images of {_IMAGE_BYTES:,} bytes, the source in the page cache, {chosen.rounds} "
        f"rounds; the data is left in the page cache by all. Import, {chosen.import_rounds} rounds, ends with all "
        "of it durable, and is held against `cp -r` to XFS without and with `sync -f` behind it."
        + (f" Fewer go into what is slow, or cannot have as many files open: {fewer}." if fewer else "")
    )
    result.notes.append(
        f"`rm -rf`: {chosen.removed:,} images of {_REMOVED_BYTES:,} bytes"
        + (f"; {slow}: what was copied in, for they take long to fill." if slow else ".")
    )
    shutil.rmtree(source)
    shutil.rmtree(small)
    return result


def _part_for(system: System, source: Path, chosen: _Size) -> list[Path]:
    """Return the directories of *source* that are copied into *system*."""
    most = min(chosen.few if system.is_slow else chosen.images, system.files_max() or chosen.images)
    return sorted(source.iterdir())[: max(1, most // PER_DIRECTORY)]


def _count(part: Sequence[Path], chosen: _Size) -> int:
    """Return how many images these directories have."""
    return min(chosen.images, len(part) * PER_DIRECTORY)


def _copy(result: Result, lineup: Lineup, source: Path, chosen: _Size) -> None:
    """Copy the tree in; what is slow to fill keeps it, to be removed, in its last round."""

    def copy(system: System, number: int) -> dict[str, float]:
        system.settle()
        part = _part_for(system, source, chosen)
        images = _count(part, chosen)
        tree = system.directory / f"tree{number}"
        tree.mkdir()
        figures = {"`cp -r` in": images / timed(lambda: run_command("cp", "-r", "-t", tree, *part))}
        if system.is_slow:
            system.settle()
            tree = system.directory / tree.name
            figures["`rm -rf`"] = images / timed(lambda: run_command("rm", "-rf", tree))
        return figures

    found = lineup.take_turns(chosen.rounds, "in and out", copy)
    result.add("`cp -r` in", "images/s", found["`cp -r` in"])
    result.parameters["removed slowly"] = found.get("`rm -rf`", {})


def _remove(result: Result, lineup: Lineup, small: Path, chosen: _Size) -> None:
    """Remove a larger tree, from those that are filled quickly."""

    def remove(system: System, number: int) -> dict[str, float]:
        if system.is_slow:
            return {}
        system.load(small)
        system.settle()
        trees = sorted(system.directory.glob("d*"))
        return {"images/s": chosen.removed / timed(lambda: run_command("rm", "-rf", *trees))}

    samples = lineup.take_turns(chosen.remove_rounds, "`rm -rf`", remove)["images/s"]
    slow = result.parameters.pop("removed slowly")
    assert isinstance(slow, dict)
    result.add("`rm -rf`", "images/s", samples | slow)


def _bring_in(site: Site, result: Result, lineup: Lineup, source: Path, chosen: _Size) -> None:
    """Bring the tree in past the mount, against what a file system needs for the same."""
    xfs = next(system for system in lineup.systems if isinstance(system, Xfs))
    store, plain = lineup.disk.path / "imported", xfs.directory / "copied"
    found: dict[str, list[float]] = {name: [] for name in (_IMPORTED, _COPIED, _SYNCED)}
    for number, order in rounds(chosen.import_rounds, (_IMPORTED, _COPIED)):
        for what in order:
            if what == _IMPORTED:
                site.make_store(store)
                command = (sys.executable, "-m", "imgfs", "import", "--quiet", source, store)
                xfs.settle()
                found[_IMPORTED].append(chosen.images / timed(functools.partial(run_command, *command)))
                shutil.rmtree(store)
            else:
                xfs.settle()
                seconds = timed(lambda: run_command("cp", "-r", source, plain))
                found[_COPIED].append(chosen.images / seconds)
                seconds += timed(lambda: run_command("sync", "-f", plain))
                found[_SYNCED].append(chosen.images / seconds)
                shutil.rmtree(plain)
        say(f"round {number + 1}: " + ", ".join(f"{what} {rates[-1]:,.0f} images/s" for what, rates in found.items()))
    for copied in (_COPIED, _SYNCED):
        result.add(f"{_IMPORTED} / {copied}", "images/s", {OURS: found[_IMPORTED], Xfs.name: found[copied]})
