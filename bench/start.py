"""Start: how long it takes to open a store, cleanly, and with nothing but its volumes."""

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.commands import run as run_command
from bench.measure import say, timed
from bench.probe import probe, probe_killed
from bench.result import OURS, Result
from bench.site import Site, drop_caches
from bench.stores import large_store
from imgfs.rebuild import remove_index
from imgfs.store import ROOT, Store
from imgfs.volumes import VOLUMES

_DIRECTORIES = 1000
DISK = "the disk, read in order"
_PUT_BEFORE_CRASH = 1000


@dataclass(frozen=True)
class _Size:
    images: tuple[int, ...]
    rounds: int
    rebuilt: int  # tiny images: needles per second
    rebuilt_photos: int  # of 20 KB: bytes per second


SIZES = {
    "tiny": _Size((3_000,), 1, 1_000, 200),
    "quick": _Size((200_000,), 2, 20_000, 2_000),
    "full": _Size((1_000_000, 10_000_000), 5, 500_000, 50_000),
}
_PHOTO_BYTES = 20_000


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("start", "Start", parameters={"rounds": chosen.rounds})
    for images in chosen.images:
        with large_store(site, images, _DIRECTORIES) as store:
            warm = [probe(store)["seconds"] for _ in range(chosen.rounds)]
            cold = [_cold(store)["seconds"] for _ in range(chosen.rounds)]
            crashed = [_after_crash(store) for _ in range(chosen.rounds)]
        say(f"{images:,} images: {statistics.median(warm):.2f} s, from the disk {statistics.median(cold):.2f} s")
        result.add(f"clean start, {images:,} images, index in the page cache", "s", warm)
        result.add(f"clean start, {images:,} images, everything from the disk", "s", cold)
        result.add(f"start after a crash, {images:,} images, everything from the disk", "s", crashed)
    _rebuild_tiny(site, result, chosen)
    _rebuild_photos(site, result, chosen)
    result.notes.append(
        f"Each start is a process of its own; {_DIRECTORIES:,} directories; the store lies on the file system of the "
        f"scratch directory. After a crash: {_PUT_BEFORE_CRASH:,} images were put by a process that was killed. "
        "`From volumes alone`: every .idx and .names deleted, caches dropped. The disk: `cat` of the volumes, before."
    )
    return result


def _cold(store: Path) -> dict[str, float]:
    drop_caches()
    return probe(store)


def _after_crash(store: Path) -> float:
    """Kill a process that has put images and has not closed the store; return the seconds of the next start."""
    probe_killed(store, _PUT_BEFORE_CRASH)
    return _cold(store)["seconds"]


def _rebuild_tiny(site: Site, result: Result, chosen: _Size) -> None:
    with large_store(site, chosen.rebuilt, _DIRECTORIES) as store:
        remove_index(str(store))
        found = _cold(store)
    say(f"{chosen.rebuilt:,} tiny images from volumes alone: {found['seconds']:.2f} s")
    result.add("from volumes alone, tiny images", "needles/s", chosen.rebuilt / found["seconds"])
    peak = (found["anon_peak"] - found["RssAnon"]) / chosen.rebuilt
    result.add("private memory at its peak meanwhile", "bytes per needle of a volume", peak)


def _rebuild_photos(site: Site, result: Result, chosen: _Size) -> None:
    path = site.make_store(site.fresh("photos"))
    data = bytes(range(250)) * (_PHOTO_BYTES // 250)
    with Store.open(str(path)) as store:
        for number in range(chosen.rebuilt_photos):
            store.put(ROOT, b"%08d" % number, data, len(data), mode=0o644, uid=0, gid=0, mtime_ns=number)
    remove_index(str(path))
    volume_bytes = sum(file.stat().st_size for file in (path / VOLUMES).glob("*.vol"))
    drop_caches()
    # As fast as the disk gives them: one volume after the other, and nothing done with the bytes.
    disk_s = timed(lambda: run_command("cat", *sorted((path / VOLUMES).glob("*.vol")), quietly=True))
    found = _cold(path)
    say(f"{chosen.rebuilt_photos:,} images of 20 KB from volumes alone: {found['seconds']:.2f} s")
    speeds = {OURS: [volume_bytes / 1e6 / found["seconds"]], DISK: [volume_bytes / 1e6 / disk_s]}
    result.add("from volumes alone, images of 20 KB", "MB/s", speeds)
    result.add("from volumes alone, images of 20 KB, counted", "needles/s", chosen.rebuilt_photos / found["seconds"])
    shutil.rmtree(path)
