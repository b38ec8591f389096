"""Cold reads: images in random order, none of them in memory, counted at the block device.

All systems lie on the same XFS and hold the same images. Before each turn a system is taken down, the caches are
dropped, and it is mounted anew: imgfs reads the names in at its start (they are what must be resident), and the count
begins when they are there. Then the same with the reads of the disk capped, with directories far down, and for imgfs
with as many images as it is made for.
"""

import functools
import mmap
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.commands import Failed
from bench.lineup import Lineup, line_up
from bench.measure import read_files, say, together
from bench.needles import DATA_BYTES
from bench.result import OURS, Result
from bench.site import Site, XfsDisk
from bench.stores import large_store_path
from bench.systems import Bindfs, Imgfs, Passthrough, System, Xfs
from bench.throttle import capped, no_cap
from imgfs.volumes import VOLUMES

_IMAGE_BYTES = 20_000
_READERS = (1, 4)
_CAP = 3_000
_DEPTH, _PER_DEEP_DIRECTORY = 16, 20
_MANY_DIRECTORIES = 1_000


@dataclass(frozen=True)
class _Size:
    images: int
    few: int  # for systems that are slow to fill
    per_turn: int  # images that one system reads in one turn: few of many, so that no two have much in common
    many_per_turn: int  # so many of them that they share directory blocks and inode clusters
    rounds: int
    deep: int
    many: int
    disk_bytes: int


SIZES = {
    "tiny": _Size(80, 0, 30, 60, 1, 40, 3_000, 400 << 20),
    "quick": _Size(3_000, 300, 300, 1_500, 1, 200, 200_000, 1 << 30),
    "full": _Size(200_000, 10_000, 2_000, 40_000, 3, 5_000, 10_000_000, 16 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    parameters: dict[str, object] = {"images": chosen.images, "per_turn": chosen.per_turn, "many": chosen.many}
    result = Result("cold", "Cold reads", parameters=parameters)
    with line_up(site, chosen.disk_bytes, result) as lineup:
        lineup.fill(chosen.images, _IMAGE_BYTES, few=chosen.few)
        order = _Order()
        for readers in _READERS:
            _measure(result, lineup, order, _who(readers), readers, chosen.per_turn, chosen.rounds)
        who = f"{_who(1)}, {chosen.many_per_turn:,} at once"
        # Who passes on to XFS has the reads of XFS.
        _measure(result, lineup, order, who, 1, chosen.many_per_turn, 1, (Imgfs, Xfs))
        _measure_capped(result, lineup, order, chosen)
        _note_index(result, lineup, chosen.images)
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes in {-(-chosen.images // 1000)} directories, each turn "
        f"{chosen.per_turn:,} others in random order; XFS on a loop device with direct I/O. What XFS reads beside the "
        "image is directory blocks, and inodes, 32 in one read: the more images are read from one mount to the next, "
        f"the more of them share these reads, as those of the row with {chosen.many_per_turn:,} do."
    )
    result.notes.append(
        "Nothing but one read: as many bytes as an image takes, at random places of the volumes, by processes that "
        "open no image. What needs one read for each cannot be faster; XFS beside it is that of the rows above."
    )
    _measure_deep(site, result, chosen)
    _measure_many(site, result, chosen)
    return result


class _Order:
    """Deals out what is read: other images in each round, the same ones to all that have as many."""

    def __init__(self) -> None:
        self._dealt: dict[int, list[str]] = {}

    def deal(self, names: Sequence[str], turn: int, count: int) -> list[str]:
        """Return the images of a turn, from the start again after the last."""
        order = self._dealt.setdefault(len(names), random.Random(3).sample(names, len(names)))
        return [order[number % len(order)] for number in range(turn * count, (turn + 1) * count)]


def _who(readers: int) -> str:
    return f"{readers} reader" + ("s" if readers > 1 else "")


def _measure(
    result: Result,
    lineup: Lineup,
    order: _Order,
    who: str,
    readers: int,
    per_turn: int,
    rounds: int,
    kinds: tuple[type[System], ...] = (System,),
    before: int = 0,
) -> None:
    """Let all systems of these kinds read, in turns, each after so many reads of anything as *before*."""

    def read(system: System, number: int) -> dict[str, float]:
        if not isinstance(system, kinds):
            return {}
        names = order.deal(lineup.names_in(system), number + readers * rounds, per_turn)
        system.drop_caches()
        _read_anything(lineup.disk.device, before)
        seconds, reads, read_bytes = read_cold(lineup.disk, system.directory, names, readers, _IMAGE_BYTES)
        figures = {"reads": reads / len(names), "kB": read_bytes / len(names) / 1000}
        figures["images/s"] = len(names) / seconds
        if isinstance(system, Imgfs) and not before:
            system.drop_caches()
            figures["bare reads/s"] = _read_bare(system, readers, per_turn, number)
        return figures

    found = lineup.take_turns(rounds, who, read)
    result.add(f"images per second, {who}", "/s", found["images/s"])
    if "bare reads/s" in found:
        bare = {**found["bare reads/s"], Xfs.name: found["images/s"][Xfs.name]}
        result.add(f"nothing but one read for each, {who}", "/s", bare)
    result.add(f"disk reads per image, {who}", "", found["reads"])
    result.add(f"read from the disk per image, {who}", "kB", found["kB"])


def _measure_capped(result: Result, lineup: Lineup, order: _Order, chosen: _Size) -> None:
    """The same, from a disk that does no more than so many reads a second."""
    if missing := no_cap(lineup.disk.device):
        result.note(f"Not with the reads of the disk capped: {missing}.")
        return
    # What passes on to XFS has the reads of XFS; the others are slow to start.
    lineup.drop_out(lambda system: not isinstance(system, Imgfs | Xfs))
    at_once = _CAP // 10
    with capped(lineup.disk.device, _CAP):
        for readers in _READERS:
            who = f"{_who(readers)}, capped at {_CAP:,} reads/s"
            _measure(result, lineup, order, who, readers, chosen.per_turn, chosen.rounds, before=at_once)
        # What was started under the cap goes with it.
        lineup.each(lambda system: system.unmount())
    result.note(
        f"Capped: the kernel lets the first {_CAP // 10:,} reads through at once, and then so many a second. So "
        f"{at_once:,} blocks of the disk are read before each turn, past all caches, which do not count."
    )


def read_cold(disk: XfsDisk, top: Path, names: Sequence[str], readers: int, image_bytes: int) -> tuple[float, int, int]:
    """Read *names* by so many readers; return (seconds, disk reads, bytes they read)."""
    jobs = [functools.partial(read_files, top, names[number::readers]) for number in range(readers)]
    before = disk.reads()
    seconds, sizes = together(jobs)
    after = disk.reads()
    if sum(sizes) != len(names) * image_bytes:
        raise Failed(f"{sum(sizes)} bytes were read, not {len(names)} x {image_bytes}")
    return seconds, after[0] - before[0], after[1] - before[1]


def _read_anything(device: str, count: int) -> None:
    """Read *count* blocks of *device*; no cache has any of them afterwards."""
    file = os.open(device, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, mmap.PAGESIZE) as buffer:
        for number in range(count):
            os.preadv(file, [buffer], number * mmap.PAGESIZE)
    os.close(file)


def _read_bare(system: Imgfs, readers: int, count: int, seed: int) -> float:
    """Read *count* times from the volumes what an image takes, and do nothing else; return how many reads a second.

    No file system that needs one read for an image can be faster.
    """
    blocks = -(-_IMAGE_BYTES // mmap.PAGESIZE) + 1  # an image begins anywhere in the first of them
    chance = random.Random(seed)
    places = [
        (path, offset)
        for path in sorted((system.store / VOLUMES).glob("*.vol"))
        for offset in range(0, path.stat().st_size - blocks * mmap.PAGESIZE, blocks * mmap.PAGESIZE)
    ]
    chosen = [chance.choice(places) for _ in range(count)]

    def read(mine: Sequence[tuple[Path, int]]) -> None:
        files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in dict(mine)}
        with mmap.mmap(-1, blocks * mmap.PAGESIZE) as buffer:
            for path, offset in mine:
                os.preadv(files[path], [buffer], offset)
        for file in files.values():
            os.close(file)

    seconds, _ = together([functools.partial(read, chosen[number::readers]) for number in range(readers)])
    return count / seconds


def _note_index(result: Result, lineup: Lineup, images: int) -> None:
    store = next(system for system in lineup.systems if isinstance(system, Imgfs)).store
    kinds = {"vol": "volumes", "idx": "index", "names": "names"}
    sizes = {kind: sum(file.stat().st_size for file in (store / VOLUMES).glob(f"*.{kind}")) for kind in kinds}
    per_image = ", ".join(f"{kinds[kind]} {total / images:,.1f}" for kind, total in sizes.items())
    result.notes.append(f"Bytes per image on the disk: {per_image}. Of these only the names have to be resident.")


def _measure_deep(site: Site, result: Result, chosen: _Size) -> None:
    """Images with many directories above them, hardly two in the same."""
    with line_up(site, chosen.disk_bytes, result, (Imgfs, Xfs, Bindfs, Passthrough)) as lineup:
        lineup.fill(chosen.deep, _IMAGE_BYTES, per_directory=_PER_DEEP_DIRECTORY, depth=_DEPTH)
        order = _Order()

        def read(system: System, number: int) -> dict[str, float]:
            # One of each directory: nothing above it was met before.
            names = order.deal(lineup.names_in(system)[number::_PER_DEEP_DIRECTORY], 0, chosen.deep // 20)
            system.drop_caches()
            _, reads, _ = read_cold(lineup.disk, system.directory, names, 1, _IMAGE_BYTES)
            return {"reads": reads / len(names)}

        samples = lineup.take_turns(chosen.rounds, f"{_DEPTH} directories down", read)["reads"]
    result.add(f"disk reads per image, {_DEPTH} directories down", "", samples)


def _measure_many(site: Site, result: Result, chosen: _Size) -> None:
    """As many images as a store is made for, so small that they can be made here."""
    samples = []
    count = chosen.per_turn // 2
    with line_up(site, chosen.disk_bytes, result, (Imgfs,)) as lineup:
        (system,) = lineup.systems
        assert isinstance(system, Imgfs)
        system.load_names(chosen.many, _MANY_DIRECTORIES)
        names_bytes = sum(file.stat().st_size for file in (system.store / VOLUMES).glob("*.names"))
        for number in range(chosen.rounds):
            chosen_images = random.Random(number).sample(range(chosen.many), count)
            names = [large_store_path(image, _MANY_DIRECTORIES) for image in chosen_images]
            system.drop_caches()
            _, reads, _ = read_cold(lineup.disk, system.directory, names, 1, DATA_BYTES)
            samples.append(reads / count)
            say(f"round {number + 1}, {chosen.many:,} images: {samples[-1]:.3f} reads per image")
    result.add(f"disk reads per image of {chosen.many:,}", "", {OURS: samples})
    result.notes.append(
        f"{chosen.many:,} images: of {DATA_BYTES} bytes, in {_MANY_DIRECTORIES:,} directories, their names resident: "
        f"{names_bytes / chosen.many:.1f} bytes each, {names_bytes / (1 << 20):,.0f} MiB."
    )
