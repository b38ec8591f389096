"""Copying in, listing and removing whole trees: cp, ls and rm through the mount and on plain XFS, and `imgfs import`.

All of a round happens on one XFS: each step is done by one system, then by the other.
"""

import functools
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import per_system, rounds, say, timed
from bench.result import Result
from bench.site import Site, XfsDisk, drop_caches
from bench.site import run as run_command
from bench.trees import make_tree

_IMAGE_BYTES = 20_000

_IMPORT = "`imgfs import` / XFS: `cp -r`"
_IMPORT_DURABLE = "`imgfs import` / XFS: `cp -r; sync -f`"


@dataclass(frozen=True)
class _Size:
    images: int
    rounds: int
    disk_bytes: int


SIZES = {
    "tiny": _Size(40, 1, 400 << 20),
    "quick": _Size(2_000, 3, 1 << 30),
    "full": _Size(20_000, 5, 8 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("copying", "Copying, listing, removing", parameters={"images": chosen.images})
    found: dict[str, dict[str, list[float]]] = {}
    source = site.fresh("source")
    make_tree(source, chosen.images, _IMAGE_BYTES)
    with site.disk(chosen.disk_bytes) as disk:
        for number, order in rounds(chosen.rounds, ("imgfs", "xfs")):
            one = _Round(site, disk, source, chosen.images, found)
            one.copy_list_remove(order)
            one.bring_in(order)
            say(f"round {number + 1}: " + ", ".join(f"{what} {_last(rates)}" for what, rates in found.items()))
    for what, rates in found.items():
        result.add(what, "images/s", *per_system(rates))
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes, the source in the page cache, {chosen.rounds} rounds. "
        "`cp` leaves its data in the page cache on both; import ends with all of it durable, and is held against "
        "`cp -r` to XFS without and with `sync -f` behind it."
    )
    return result


class _Round:
    """One round on one disk: every step by each system in turn."""

    def __init__(
        self, site: Site, disk: XfsDisk, source: Path, images: int, found: dict[str, dict[str, list[float]]]
    ) -> None:
        self._site = site
        self._disk = disk
        self._source = source
        self._images = images
        self._found = found

    def _time(self, what: str, system: str, *command: str | Path) -> float:
        """Run *command*, with nothing left to write from before; note how many images it did per second."""
        os.sync()
        seconds = timed(functools.partial(run_command, *command))
        self._note(what, system, seconds)
        return seconds

    def _note(self, what: str, system: str, seconds: float) -> None:
        self._found.setdefault(what, {"imgfs": [], "xfs": []})[system].append(self._images / seconds)

    def copy_list_remove(self, order: Sequence[str]) -> None:
        """Copy a tree into a mounted store and into a directory, list both, remove both."""
        store = self._site.make_store(self._disk.path / "mounted")
        plain = self._disk.path / "plain"
        plain.mkdir()
        with self._site.mounted(store) as mounted:
            tops = {"imgfs": mounted.point, "xfs": plain}
            for system in order:
                self._time("`cp -r` in", system, "cp", "-r", self._source, tops[system] / "tree")
            for system in order:
                self._time("`ls -lR` just after", system, "ls", "-lR", tops[system])
            for system in order:
                drop_caches()
                self._time("`ls -lR`, caches dropped", system, "ls", "-lR", tops[system])
            for system in order:
                self._time("`rm -rf`", system, "rm", "-rf", tops[system] / "tree")
        shutil.rmtree(store)
        shutil.rmtree(plain)

    def bring_in(self, order: Sequence[str]) -> None:
        """Bring the tree in past the mount, against what a file system needs for the same."""
        store, plain = self._site.make_store(self._disk.path / "imported"), self._disk.path / "plain"
        command = (sys.executable, "-m", "imgfs", "import", "--quiet", self._source, store)
        for system in order:
            if system == "imgfs":
                seconds = self._time(_IMPORT, system, *command)
                self._note(_IMPORT_DURABLE, system, seconds)
            else:
                seconds = self._time(_IMPORT, system, "cp", "-r", self._source, plain)
                seconds += timed(functools.partial(run_command, "sync", "-f", plain))
                self._note(_IMPORT_DURABLE, system, seconds)
        shutil.rmtree(store)
        shutil.rmtree(plain)


def _last(rates: dict[str, list[float]]) -> str:
    return f"{rates['imgfs'][-1]:,.0f} ({rates['imgfs'][-1] / rates['xfs'][-1]:.2f} x XFS)"
