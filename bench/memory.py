"""Memory: what a store of many images takes, in the table all workers share and in each process by itself.

The stores are those of `stores`: every byte as the format has it, written faster than through the log. Growing by
one image at a time is measured too, on a smaller store, through `Store.put`.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.commands import run as run_command
from bench.measure import all_memory, kernel_memory, private_memory, read_files, say, together
from bench.needles import image_name
from bench.probe import probe
from bench.result import Result
from bench.site import Site, drop_caches
from bench.stores import large_store, large_store_path
from imgfs.store import ROOT, Store

_MANY = 1000
_CLIENTS = 4


@dataclass(frozen=True)
class _Size:
    images: tuple[int, ...]  # the first and the last give the slope
    grown: int
    probed: int  # images read in a process that opened the store by itself
    served: int  # images of the store that is used through a mount: `find` lists all of them
    walked: int  # `ls -lR`
    read: int


SIZES = {
    "tiny": _Size((2_000, 8_000), 2_000, 200, 4_000, 2_000, 200),
    "quick": _Size((50_000, 200_000), 5_000, 2_000, 100_000, 20_000, 2_000),
    "full": _Size((1_000_000, 5_000_000), 100_000, 100_000, 10_000_000, 1_000_000, 1_000_000),
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
        f"{_counts(chosen.images)} images; what does not name another is of the largest."
    )
    result.notes.append(
        "All of the daemon: what its processes have resident, code and libraries too, shared memory once; not the page "
        "cache, which has the names, nor what the kernel keeps about files it was asked for. "
        "The table is shared memory: it is there once, however many processes serve. The stores were loaded from their "
        "index files; their volumes and indexes were written past the log, byte for byte in its format, with 55,000 "
        "needles to a volume, as many as there are of images of 20 KB in 1 GiB."
    )
    return result


def _load(site: Site, result: Result, chosen: _Size, directories: int, empty: dict[str, float]) -> None:
    kind = f"{directories:,} directories" if directories > 1 else "one directory"
    tables, found, used = [], empty, None
    for images in chosen.images:
        # Listing takes minutes for millions: the mount below does that for all.
        use = chosen.probed if directories > 1 and images == chosen.images[0] else 0
        with large_store(site, images, directories) as store:
            found = probe(store, use=use)
        used = found if use else used
        tables.append(found["table"])
        say(f"{images:,} images, {kind}: {found['table'] / images:.2f} bytes each, opened in {found['seconds']:.2f} s")
    images = chosen.images[-1]
    result.add(f"table, {kind}", "bytes per image", (tables[-1] - tables[0]) / (images - chosen.images[0]))
    result.add(f"private memory more than without images, {kind}", "MiB", _mib(found["RssAnon"] - empty["RssAnon"]))
    if used:
        more = _mib(used["anon_used"] - used["RssAnon"])
        what = f"once all of {chosen.images[0]:,} were listed and {chosen.probed:,} read"
        result.add(f"private memory more, {what}, {kind}", "MiB", more)
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
    """List and read through a mount, and see what the daemon has then."""
    images = chosen.served
    with large_store(site, images, _MANY) as store, site.mounted(store) as mounted:
        before = private_memory(mounted.pid)
        directories = sorted(mounted.point.iterdir())
        drop_caches()
        kept = kernel_memory()
        _walk(directories, "find")
        kept = kernel_memory() - kept
        say(f"`find` over {images:,} images is done; the kernel keeps {kept >> 20} MiB more")
        _walk(directories[: -(-chosen.walked * _MANY // images)], "ls", "-lR")
        say(f"`ls -lR` over {chosen.walked:,} of them is done")
        jobs = [
            functools.partial(_read_some, mounted.point, images, chosen.read // _CLIENTS, n) for n in range(_CLIENTS)
        ]
        together(jobs)
        more = private_memory(mounted.pid) - before
        whole = all_memory(mounted.pid)
    done = f"after `find` over {images:,} images, `ls -lR` over {chosen.walked:,} and {chosen.read:,} reads"
    say(f"all of the daemon has {more >> 10} KiB more, {whole / images:.1f} bytes per image in all, {done}")
    result.add(f"kernel: more after `find` over {images:,} images", "bytes per image", kept / images)
    result.add(f"daemon: private memory more {done}", "MiB", _mib(more))
    result.add(f"all of the daemon, {done}", "bytes per image", whole / images)


def _walk(directories: Sequence[Path], *command: str) -> None:
    """Run a command on these directories, some at a time: one alone would take minutes."""

    def walk(part: Sequence[Path]) -> None:
        run_command(*command, *part, quietly=True)

    parts = [directories[n::_CLIENTS] for n in range(_CLIENTS)]
    together([functools.partial(walk, part) for part in parts if part])


def _read_some(top: Path, images: int, count: int, seed: int) -> int:
    chance = random.Random(seed)
    return read_files(top, [large_store_path(chance.randrange(images), _MANY) for _ in range(count)])


def _mib(size_bytes: float) -> float:
    return size_bytes / (1 << 20)


def _counts(images: tuple[int, ...]) -> str:
    return ", ".join(f"{count:,}" for count in images)
