"""Cold reads: images in random order, none of them in memory, counted at the block device.

imgfs and plain XFS lie on the same XFS and hold the same images; both read the same ones in each round, one after the
other. imgfs is mounted anew after the caches were dropped: the daemon reads the names in at its start (they are what
must be resident), and the count begins when they are there.
"""

import functools
import mmap
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import per_system, read_files, rounds, say, together
from bench.result import Result
from bench.site import Failed, Site, XfsDisk, drop_caches, imgfs
from bench.trees import make_tree
from imgfs.volumes import VOLUMES

_IMAGE_BYTES = 20_000
_READERS = (1, 4)
_DEADLINE_S = 60.0


@dataclass(frozen=True)
class _Size:
    images: int
    per_turn: int  # images that one system reads in one turn
    rounds: int
    disk_bytes: int


SIZES = {
    "tiny": _Size(200, 40, 1, 400 << 20),
    "quick": _Size(5_000, 1_250, 2, 1 << 30),
    "full": _Size(200_000, 40_000, 3, 14 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    parameters = {"images": chosen.images, "image_bytes": _IMAGE_BYTES, "per_turn": chosen.per_turn}
    result = Result("cold", "Cold reads", parameters=dict(parameters))
    with site.disk(chosen.disk_bytes) as disk:
        say(f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes, as files and in a store")
        names = make_tree(disk.path / "plain", chosen.images, _IMAGE_BYTES)
        store = site.make_store(disk.path / "store")
        imgfs("import", "--quiet", disk.path / "plain", store)
        bench = _Bench(site, disk, store, names, chosen)
        for readers in _READERS:
            bench.measure(result, readers)
        sizes = {kind: sum(file.stat().st_size for file in (store / VOLUMES).glob(f"*.{kind}")) for kind in _KINDS}
    per_image = ", ".join(f"{_KINDS[kind]} {total / chosen.images:,.1f}" for kind, total in sizes.items())
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes in {-(-chosen.images // 1000)} directories, each turn "
        f"{chosen.per_turn:,} others in random order; XFS on a loop device with direct I/O."
    )
    result.notes.append(f"Bytes per image on the disk: {per_image}. Of these only the names have to be resident.")
    return result


_KINDS = {"vol": "volumes", "idx": "index", "names": "names"}


class _Bench:
    """One disk with both systems on it."""

    def __init__(self, site: Site, disk: XfsDisk, store: Path, names: Sequence[str], chosen: _Size) -> None:
        self._site = site
        self._disk = disk
        self._store = store
        self._chosen = chosen
        self._order = random.Random(3).sample(names, len(names))
        self._next = 0

    def _slice(self) -> list[str]:
        """Return the next images in the random order, from the start again after the last."""
        start, self._next = self._next, self._next + self._chosen.per_turn
        return [self._order[number % len(self._order)] for number in range(start, self._next)]

    def measure(self, result: Result, readers: int) -> None:
        """Let both systems read, in turns."""
        speeds: dict[str, list[float]] = {"imgfs": [], "xfs": []}
        reads: dict[str, list[float]] = {"imgfs": [], "xfs": []}
        kilobytes: dict[str, list[float]] = {"imgfs": [], "xfs": []}
        for number, order in rounds(self._chosen.rounds, ("imgfs", "xfs")):
            names = self._slice()
            for system in order:
                seconds, done, read_bytes = self._turn(system, names, readers)
                speeds[system].append(len(names) / seconds)
                reads[system].append(done / len(names))
                kilobytes[system].append(read_bytes / len(names) / 1000)
                say(
                    f"round {number + 1}, {readers} readers, {system}: "
                    f"{done / len(names):.3f} reads per image, {len(names) / seconds:,.0f} images/s"
                )
        who = f"{readers} reader" + ("s" if readers > 1 else "")
        result.add(f"images per second, {who}", "/s", *per_system(speeds))
        result.add(f"disk reads per image, {who}", "", *per_system(reads))
        result.add(f"read from the disk per image, {who}", "kB", *per_system(kilobytes))

    def _turn(self, system: str, names: list[str], readers: int) -> tuple[float, int, int]:
        """Return (seconds, disk reads, bytes they read)."""
        drop_caches()
        if system == "xfs":
            return self._read(self._disk.path / "plain", names, readers)
        with self._site.mounted(self._store) as mounted:
            for path in (self._store / VOLUMES).glob("*.names"):
                _wait_until_resident(path)
            return self._read(mounted.point, names, readers)

    def _read(self, top: Path, names: list[str], readers: int) -> tuple[float, int, int]:
        jobs = [functools.partial(read_files, top, names[number::readers]) for number in range(readers)]
        before = self._disk.reads()
        seconds, sizes = together(jobs)
        after = self._disk.reads()
        if sum(sizes) != len(names) * _IMAGE_BYTES:
            raise Failed(f"{sum(sizes)} bytes were read, not {len(names)} x {_IMAGE_BYTES}")
        return seconds, after[0] - before[0], after[1] - before[1]


def _wait_until_resident(path: Path) -> None:
    """Wait until the daemon's prefetch has brought the whole file at *path* into the page cache."""
    deadline = time.monotonic() + _DEADLINE_S
    page = bytearray(1)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                os.preadv(file.fileno(), [page], at, os.RWF_NOWAIT)
                at += mmap.PAGESIZE
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Failed(f"{path.name} is not in the page cache: the daemon did not prefetch it") from None
                time.sleep(0.005)
