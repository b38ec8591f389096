"""Memory: what a store of many images takes, in the table all workers share and in each process by itself.

The stores are those of `stores`: every byte as the format has it, written faster than through the log. Growing by
one image at a time is measured too, on a smaller store, through `Store.put`.
"""

import functools
import os
import random
from dataclasses import dataclass
from pathlib import Path

from bench.measure import private_memory, say
from bench.needles import image_name
from bench.probe import probe
from bench.result import Result
from bench.site import Mounted, Site
from bench.stores import large_store
from imgfs.store import ROOT, Store

_MANY = 1000


@dataclass(frozen=True)
class _Size:
    images: tuple[int, ...]  # the first and the last give the slope
    grown: int
    walked: int  # entries of the mount that are listed
    read: int


SIZES = {
    "tiny": _Size((2_000, 8_000), 2_000, 2_000, 200),
    "quick": _Size((200_000, 1_000_000), 20_000, 20_000, 5_000),
    "full": _Size((1_000_000, 5_000_000, 10_000_000), 200_000, 1_000_000, 100_000),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("memory", "Memory", parameters={"images": chosen.images})
    empty = probe(site.make_store(site.fresh("empty")))
    for directories in (_MANY, 1):
        _load(site, result, chosen, directories, empty)
    result.add("a process without images, private (RssAnon)", "MiB", _mib(empty["RssAnon"]))
    result.add("a process without images, code and libraries (RssFile)", "MiB", _mib(empty["RssFile"]))
    result.add("a table without images", "MiB", _mib(empty["table"]))
    _grow(site, result, chosen.grown)
    _serve(site, result, chosen)
    result.notes.append(
        "The table's bytes per image are slopes between the smallest and the largest of the stores, which have "
        f"{_counts(chosen.images)} images; all else is of the largest."
    )
    result.notes.append(
        "The table is shared memory: it is there once, however many processes serve. The stores were loaded from their "
        "index files; their volumes and indexes were written past the log, byte for byte in its format, with 55,000 "
        "needles to a volume, as many as there are of images of 20 KB in 1 GiB."
    )
    return result


def _load(site: Site, result: Result, chosen: _Size, directories: int, empty: dict[str, float]) -> None:
    kind = f"{directories:,} directories" if directories > 1 else "one directory"
    tables, found = [], empty
    for images in chosen.images:
        # Listing ten million entries takes minutes: once is enough.
        use = chosen.read if directories > 1 and images == chosen.images[-1] else 0
        with large_store(site, images, directories) as store:
            found = probe(store, use=use)
        tables.append(found["table"])
        say(f"{images:,} images, {kind}: {found['table'] / images:.2f} bytes each, opened in {found['seconds']:.2f} s")
    images = chosen.images[-1]
    result.add(f"table, {kind}", "bytes per image", (tables[-1] - tables[0]) / (images - chosen.images[0]))
    result.add(f"private memory more than without images, {kind}", "MiB", _mib(found["RssAnon"] - empty["RssAnon"]))
    if "anon_used" in found:
        more = _mib(found["anon_used"] - found["RssAnon"])
        result.add(f"private memory more, once all was listed and {chosen.read:,} read, {kind}", "MiB", more)
    peak = (found["anon_peak"] - empty["RssAnon"]) / images
    result.add(f"private memory at its peak while opening, {kind}", "bytes per image", peak)
    result.add(f"all memory of the process at its peak, {kind}", "MiB", _mib(found["VmHWM"]))


def _grow(site: Site, result: Result, images: int) -> None:
    """Put images one by one, as a mount does: what bucket regions leave behind when they double counts here."""
    with Store.open(str(site.make_store(site.fresh("grown")))) as store:
        half = 0
        for number in range(images):
            if number == images // 2:
                half = store.counts().memory_bytes
            name, data = image_name(number), b"x"
            store.put(ROOT, name, data, len(data), mode=0o644, uid=0, gid=0, mtime_ns=number)
        slope = (store.counts().memory_bytes - half) / (images - images // 2)
    say(f"{images:,} images put one by one: {slope:.2f} bytes each")
    result.add(f"table, grown by {images:,} single puts into one directory", "bytes per image", slope)


def _serve(site: Site, result: Result, chosen: _Size) -> None:
    """List and read through a mount, and see what the daemon takes more afterwards."""
    images = chosen.walked
    with large_store(site, images, _MANY) as store, site.mounted(store) as mounted:
        before = private_memory(mounted.pid)
        _walk(mounted.point)
        _read_some(mounted, images, chosen.read)
        after = private_memory(mounted.pid)
    more = after - before
    say(f"all of the daemon has {more >> 10} KiB more after {images:,} entries listed, {chosen.read:,} images read")
    what = f"daemon: private memory more after `find` over {images:,} images and {chosen.read:,} reads"
    result.add(what, "MiB", _mib(more))


def _walk(top: Path) -> None:
    with os.scandir(top) as entries:
        for entry in entries:
            if entry.is_dir():
                _walk(Path(entry.path))
            else:
                entry.stat()


def _read_some(mounted: Mounted, images: int, count: int) -> None:
    chance = random.Random(2)
    directory = functools.partial("d{:06}".format)
    for _ in range(count):
        number = chance.randrange(images)
        name = os.fsdecode(image_name(number))
        (mounted.point / directory(number % _MANY + ROOT + 1) / name).read_bytes()


def _mib(size_bytes: float) -> float:
    return size_bytes / (1 << 20)


def _counts(images: tuple[int, ...]) -> str:
    return ", ".join(f"{count:,}" for count in images)
