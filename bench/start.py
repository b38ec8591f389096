"""Start: how long it takes to open a store, cleanly, and with nothing but its volumes."""

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.commands import run as run_command
from bench.measure import say, timed
from bench.probe import probe, probe_killed
from bench.result import OURS, Result
from bench.site import Site, drop_caches, touch_memory
from bench.stores import large_store
from imgfs.rebuild import remove_index
from imgfs.saved_table import saved_paths
from imgfs.store import ROOT, Store
from imgfs.volumes import VOLUMES

_DIRECTORIES = 1000
DISK = "the disk, read in order"


@dataclass(frozen=True)
class _Size:
    images: tuple[int, ...]
    rounds: int
    crashed: int  # images that are put and not synced before the process dies
    rebuilt: int  # tiny images: needles per second
    rebuilt_photos: int  # of 20 KB: bytes per second


SIZES = {
    "tiny": _Size((3_000,), 1, 100, 1_000, 200),
    "quick": _Size((200_000,), 2, 2_000, 20_000, 2_000),
    "full": _Size((1_000_000, 10_000_000), 5, 60_000, 500_000, 50_000),
}
_PHOTO_BYTES = 20_000


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("start", "Start", parameters={"rounds": chosen.rounds, "crashed": chosen.crashed})
    for images in chosen.images:
        with large_store(site, images, _DIRECTORIES) as store:
            _starts(result, store, images, chosen)
    _rebuild_tiny(site, result, chosen)
    _rebuild_photos(site, result, chosen)
    result.notes.append(
        f"Each start is a process of its own; {_DIRECTORIES:,} directories; the store lies on the file system of the "
        "scratch directory. No kept table: as when another release starts. After a crash: "
        f"{chosen.crashed:,} images were put, and not synced, by a process that was killed. "
        "`From volumes alone`: every .idx and .names deleted, caches dropped. The disk: `cat` of the volumes, before."
    )
    return result


def _starts(result: Result, store: Path, images: int, chosen: _Size) -> None:
    rounds = range(chosen.rounds)
    made = [_without_table(store)["seconds"] for _ in rounds]
    stops = [_warm(store) for _ in rounds]
    warm = [found["seconds"] for found in stops]
    cold = [_cold(store)["seconds"] for _ in rounds]
    crashed = [_after_crash(store, chosen.crashed) for _ in rounds]
    for text, seconds in (
        ("clean start, {}, index in the page cache", warm),
        ("clean start, {}, everything from the disk", cold),
        ("start of {} with no kept table, index in the page cache", made),
        ("start after a crash, {}, everything from the disk", crashed),
        ("clean stop, {}", [found["close_seconds"] for found in stops]),
    ):
        result.add(text.format(f"{images:,} images"), "s", seconds)
    medians = ", ".join(f"{statistics.median(each):.2f} s" for each in (warm, cold, made, crashed))
    say(f"{images:,} images: clean, from the disk, with no kept table, after a crash: {medians}")


def _cold(store: Path) -> dict[str, float]:
    drop_caches()
    return probe(store)


def _warm(store: Path) -> dict[str, float]:
    touch_memory()
    return probe(store)


def _without_table(store: Path) -> dict[str, float]:
    for path in saved_paths(str(store)):
        Path(path).unlink(missing_ok=True)
    return _warm(store)


def _after_crash(store: Path, images: int) -> float:
    """Kill a process that has put *images* and has not closed the store; return the seconds of the next start."""
    probe_killed(store, images)
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
    volumes = sorted((path / VOLUMES).glob("*.vol"))
    megabytes = sum(file.stat().st_size for file in volumes) / 1e6
    opened_s, disk_s = [], []
    for _ in range(chosen.rounds):
        remove_index(str(path))
        drop_caches()
        # As fast as the disk gives them: one volume after the other, and nothing done with the bytes.
        disk_s.append(timed(lambda: run_command("cat", *volumes, quietly=True)))
        opened_s.append(_cold(path)["seconds"])
        both = f"{opened_s[-1]:.2f} s, `cat` {disk_s[-1]:.2f} s"
        say(f"{chosen.rebuilt_photos:,} images of 20 KB from volumes alone: {both}")
    speeds = {OURS: [megabytes / seconds for seconds in opened_s], DISK: [megabytes / seconds for seconds in disk_s]}
    result.add("from volumes alone, images of 20 KB", "MB/s", speeds)
    counts = [chosen.rebuilt_photos / seconds for seconds in opened_s]
    result.add("from volumes alone, images of 20 KB, counted", "needles/s", counts)
    shutil.rmtree(path)
