"""Giving space back: how fast holes and compaction free it, what stays on the disk, and what readers notice of it.

Latencies are those of single images, opened, read and closed by readers that ask for the next one when they have the
last. Each time a compaction is measured, so are the same readers on the same mount without one, half of the time
before it and half after it: a ratio is of two that ran next to each other.
"""

import contextlib
import ctypes
import functools
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import NamedTuple

from bench.commands import Failed, imgfs
from bench.commands import run as run_command
from bench.measure import read_files, rounds, say, timed, together
from bench.result import OURS, Result
from bench.serving import MountServer
from bench.site import Site, drop_caches
from bench.trees import make_tree
from imgfs import control
from imgfs.options import MountOptions
from imgfs.settings import MIB, Settings
from imgfs.store import Store
from imgfs.volumes import VOLUMES

_IMAGE_BYTES = 20_000
_NEIGHBOURS = 50  # images deleted one after the other, where they are not deleted at random
_READERS = (1, 4)
_HOT_IMAGES = 2_000
_BUFFER_BYTES = 64 << 10
# Faster than any disk.
_UNLIMITED_MIB = 1_000_000
_USUAL_MIB = MountOptions().compact_rate_mib
# The first column is of imgfs as it comes.
_USUAL, _UNLIMITED, _QUIET = OURS, "compact_rate unlimited", "no compaction"
_WINDOW_MAX_S = 120.0
_KEPT, _GONE = "retention=86400,compact=0", "retention=0,compact=0"


@dataclass(frozen=True)
class _Size:
    images: int
    volume_bytes: int
    rounds: int
    quiet_s: float  # without a compaction: before it, and after it
    disk_bytes: int


# Two volumes are sealed, and become one; what is left is in the one that is written to.
SIZES = {
    "tiny": _Size(200, 1_900_000, 1, 0.1, 400 << 20),
    "quick": _Size(1_000, 9 * MIB, 1, 0.2, 1 << 30),
    "full": _Size(10_000, 92 * MIB, 3, 2.0, 4 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("reclaim", "Giving space back", parameters={"images": chosen.images, "rounds": chosen.rounds})
    with site.disk(chosen.disk_bytes) as disk:
        names = make_tree(disk.path / "plain", chosen.images, _IMAGE_BYTES)
        store = site.make_store(disk.path / "whole", Settings(volume_bytes_max=chosen.volume_bytes))
        imgfs("import", "--quiet", disk.path / "plain", store)
        run_command("rm", "-r", disk.path / "plain")
        halves = {"at random": _at_random(names), "in runs": _in_runs(names)}
        punched = {}
        for pattern, deleted in halves.items():
            half = _Half(site, disk.path, store, pattern, [name for name in names if name not in deleted])
            half.delete(sorted(deleted))
            punched[pattern] = half.measure(result, chosen.rounds)
        run_command("rm", "-r", store)
        bench = _Latencies(site, punched["at random"], chosen)
        for number, order in rounds(chosen.rounds, bench.cases()):
            for case in order:
                bench.measure(case, number)
        bench.report(result)
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes in volumes of at most {chosen.volume_bytes >> 20} MiB, "
        f"half of them deleted, at random or {_NEIGHBOURS} neighbours at a time. Holes first, by a process that does "
        "nothing else, then `imgfs compact --live-share 100`, through the mount and not slowed down, where holes have "
        f"left it anything to gain. On the disk per live byte: blocks of the volumes by the {_IMAGE_BYTES:,} bytes of "
        "each image that is left."
    )
    result.notes.append(
        f"Latencies: half deleted at random, holes punched, then compacted through the mount, at {_USUAL_MIB:g} MiB/s "
        "(the default) and without a limit, while readers read: each the next image once it has the last. "
        f"Rounds: {chosen.rounds}, a percentile for each; without a compaction, as long before and after it. Hot: "
        "everything in memory. Cold: caches dropped before; what compaction has read may be in memory."
    )
    load = os.getloadavg()
    result.notes.append(f"Load of the machine at the end, readers and daemon included: {load[0]:.1f}, {load[1]:.1f}.")
    return result


# -- bytes per second -----------------------------------------------------------------------------------------------


def _at_random(names: Sequence[str]) -> set[str]:
    return set(random.Random(1).sample(names, len(names) // 2))


def _in_runs(names: Sequence[str]) -> set[str]:
    return {name for number, name in enumerate(names) if number // _NEIGHBOURS % 2}


def _disk_bytes(store: Path) -> int:
    return sum(file.stat().st_blocks for file in (store / VOLUMES).glob("*.vol")) * 512


def _copy(source: Path, target: Path) -> Path:
    """Copy a store block by block, with its holes, sharing nothing."""
    run_command("cp", "-r", "--reflink=never", "--sparse=auto", source, target)
    return target


def _options(rate_mib: float) -> tuple[str, str]:
    return "-o", f"{_GONE},compact_rate={rate_mib:g}"


def _compact(store: Path, *, dry_run: bool = False) -> int:
    """Let the daemon of *store* compact whatever gains anything, and wait; return the bytes that it copied.

    Holes come before that, so that a dry run is the way to wait for them.
    """
    answer = control.ask(str(store), {"do": "compact", "live_share": 1.0, "dry_run": dry_run})
    if "error" in answer:
        raise Failed(f"no compaction: {answer['error']}")
    copied: int = answer["copied"]
    return copied


@dataclass
class _Half:
    """A store of which half was deleted."""

    site: Site
    directory: Path
    whole: Path
    pattern: str
    live: list[str]

    @property
    def path(self) -> Path:
        return self.directory / f"half {self.pattern}"

    def delete(self, names: Sequence[str]) -> None:
        """Make it: delete *names* through a mount that keeps what was deleted."""
        _copy(self.whole, self.path)
        with self.site.mounted(self.path, "imgfs", "-o", _KEPT) as mounted:
            for name in names:
                os.unlink(mounted.point / name)

    def measure(self, result: Result, count: int) -> "_Half":
        """Add what giving back its space takes; return this store with its holes punched."""
        found: dict[str, list[float]] = {}
        work = self.directory / "work"
        punched = _Half(self.site, self.directory, self.whole, f"{self.pattern}, with holes", self.live)
        for number in range(count):
            _copy(self.path, work)
            os.sync()
            before = _disk_bytes(work)
            seconds = _punch(work)
            holes = _disk_bytes(work)
            if not number:
                _copy(work, punched.path)
            os.sync()
            with self.site.mounted(work, "imgfs", *_options(_UNLIMITED_MIB)):
                _compact(work, dry_run=True)
                start = time.perf_counter()
                copied = _compact(work)
                compact_s = time.perf_counter() - start
            after = _disk_bytes(work)
            figures = {
                "holes: freed, MB/s": (before - holes) / 1e6 / seconds,
                "holes: images a second": (self._dead()) / seconds,
                "compaction: copied, MB/s": copied / 1e6 / compact_s,
                "compaction: freed, MB/s": (holes - after) / 1e6 / compact_s,
                "on the disk per live byte, before": before / self._live_bytes(),
                "on the disk per live byte, with holes": holes / self._live_bytes(),
                "on the disk per live byte, compacted": after / self._live_bytes(),
            }
            for what, figure in figures.items():
                found.setdefault(what, []).append(figure)
            say(f"{self.pattern}: " + ", ".join(f"{what} {figure:,.2f}" for what, figure in figures.items()))
            run_command("rm", "-r", work)
        for what, samples in found.items():
            if not any(samples):
                continue  # holes had left nothing to gain
            name, _, unit = what.partition(", MB")
            result.add(f"deleted {self.pattern}, {name}", f"MB{unit}" if unit else "", samples)
        return punched

    def _live_bytes(self) -> int:
        return len(self.live) * _IMAGE_BYTES

    def _dead(self) -> int:
        return len(self.live)


def _punch(path: Path) -> float:
    """Punch all holes into the store at *path*; return how many seconds that takes, once it is open."""
    with Store.open(str(path)) as store:
        reclaimer = store.reclaimer(retention_s=0)
        return timed(functools.partial(reclaimer.punch, everything=True))


# -- what readers notice --------------------------------------------------------------------------------------------


class _Case(NamedTuple):
    """How a compaction and its readers run."""

    cold: bool
    readers: int
    rate_mib: float

    @property
    def who(self) -> str:
        return f"{'cold' if self.cold else 'hot'}, {self.readers} reader{'s' * (self.readers > 1)}"


_FIGURES: dict[str, Callable[[list[int]], float]] = {
    "p50": lambda times_ns: _percentile(times_ns, 0.5),
    "p99": lambda times_ns: _percentile(times_ns, 0.99),
    "max": lambda times_ns: times_ns[-1] / 1e6,
}


def _percentile(times_ns: list[int], part: float) -> float:
    """Return it in ms; *times_ns* are sorted."""
    return times_ns[int(part * (len(times_ns) - 1))] / 1e6


@dataclass
class _Found:
    """Figures of one case, in ms, round by round."""

    quiet: dict[str, list[float]] = field(default_factory=dict)
    busy: dict[str, list[float]] = field(default_factory=dict)
    mb_per_s: list[float] = field(default_factory=list)


class _Latencies:
    """Readers of the store *half*, with and without a compaction of it."""

    def __init__(self, site: Site, half: _Half, chosen: _Size) -> None:
        self._site = site
        self._half = half
        self._chosen = chosen
        self._found: dict[_Case, _Found] = {}

    def cases(self) -> list[_Case]:
        return [
            _Case(cold, readers, rate)
            for cold in (False, True)
            for readers in _READERS
            for rate in (_USUAL_MIB, _UNLIMITED_MIB)
        ]

    def measure(self, case: _Case, number: int) -> None:
        """Let readers read a fresh copy of the store: without a compaction, with one, and without one again."""
        work = _copy(self._half.path, self._half.directory / "work")
        os.sync()
        with self._site.mounted(work, "imgfs", *_options(case.rate_mib)) as mounted:
            _compact(work, dry_run=True)
            window = functools.partial(self._window, work, mounted, case, number)
            quiet, _, _ = window(compacting=False)
            busy, copied, seconds = window(compacting=True)
            quiet += window(compacting=False)[0]
        run_command("rm", "-r", work)
        found = self._found.setdefault(case, _Found())
        for times_ns, samples in ((sorted(quiet), found.quiet), (sorted(busy), found.busy)):
            for name, figure in _FIGURES.items():
                samples.setdefault(name, []).append(figure(times_ns))
        found.mb_per_s.append(copied / 1e6 / seconds)
        say(
            f"round {number + 1}, {case.who}, {case.rate_mib:g} MiB/s: "
            + ", ".join(f"{name} {found.busy[name][-1]:.2f} / {found.quiet[name][-1]:.2f} ms" for name in _FIGURES)
            + f" of {len(busy):,} / {len(quiet):,} reads; {found.mb_per_s[-1]:.0f} MB/s copied"
        )

    def _window(
        self, store: Path, mounted: MountServer, case: _Case, number: int, *, compacting: bool
    ) -> tuple[list[int], int, float]:
        """Return (ns of each read, bytes that a compaction has copied, seconds)."""
        names = random.Random(number).sample(self._half.live, len(self._half.live))
        if case.cold:
            _forget(store)
        else:
            names = names[:_HOT_IMAGES]
            read_files(mounted.point, names)
        ended = RawValue(ctypes.c_bool, False)
        copied = RawValue(ctypes.c_int64, 0)

        def compact() -> list[int]:
            try:
                copied.value = _compact(store)
            finally:
                ended.value = True
            return []

        def read(reader: int) -> list[int]:
            mine = names[reader :: case.readers]
            window_s = _WINDOW_MAX_S if compacting else self._chosen.quiet_s
            again = functools.partial(_forget, store) if case.cold else lambda: None
            return _read_timed(mounted.point, mine, window_s, lambda: bool(ended.value), again)

        jobs: list[Callable[[], list[int]]] = [functools.partial(read, reader) for reader in range(case.readers)]
        seconds, times = together([*jobs, compact] if compacting else jobs)
        return [each for reader in times for each in reader], copied.value, seconds

    def report(self, result: Result) -> None:
        """Add the rows: ratios first, then what they are made of."""
        for figure in ("p99", "p50"):
            for case, other in self._pairs():
                ratios = [_ratios(self._found[each], figure) for each in (case, other)]
                what = f"{figure} of reads, {case.who}: while compacting / without"
                result.add(what, "x", {_USUAL: ratios[0], _UNLIMITED: ratios[1]}, compared=False)
        for case, other in self._pairs():
            found, at_once = self._found[case], self._found[other]
            for figure in _FIGURES:
                columns = {_USUAL: found.busy[figure], _UNLIMITED: at_once.busy[figure]}
                columns[_QUIET] = found.quiet[figure] + at_once.quiet[figure]
                result.add(f"{figure} of reads, {case.who}", "ms", columns, compared=False)
            what = f"copied meanwhile, {case.who}"
            columns = {_USUAL: found.mb_per_s, _UNLIMITED: at_once.mb_per_s}
            result.add(what, "MB/s", columns, compared=False)

    def _pairs(self) -> list[tuple[_Case, _Case]]:
        """Return each case at the usual rate, and the same without a limit."""
        return [(case, case._replace(rate_mib=_UNLIMITED_MIB)) for case in self.cases() if case.rate_mib == _USUAL_MIB]


def _ratios(found: _Found, figure: str) -> list[float]:
    return [busy / quiet for busy, quiet in zip(found.busy[figure], found.quiet[figure], strict=True)]


def _forget(store: Path) -> None:
    """Let the kernel forget all but the names of the images, which a daemon brings in at its start."""
    drop_caches()
    for path in (store / VOLUMES).glob("*.names"):
        with contextlib.suppress(FileNotFoundError):  # a compaction may remove it
            path.read_bytes()


def _read_timed(
    top: Path, names: Sequence[str], window_s: float, ended: Callable[[], bool], again: Callable[[], None]
) -> list[int]:
    """Open, read and close *names* for so many seconds or until *ended*; return how many ns each one took.

    After the last one comes *again*, whose time does not count, and the first one.
    """
    buffer = bytearray(_BUFFER_BYTES)
    times_ns: list[int] = []
    now_ns = time.perf_counter_ns
    deadline_ns = now_ns() + int(window_s * 1e9)
    while True:
        for name in names:
            start_ns = now_ns()
            file = os.open(f"{top}/{name}", os.O_RDONLY)
            size = os.readv(file, [buffer])
            os.close(file)
            end_ns = now_ns()
            if size != _IMAGE_BYTES:
                raise Failed(f"{name} has {size} bytes, not {_IMAGE_BYTES}")
            times_ns.append(end_ns - start_ns)
            if end_ns > deadline_ns or ended():
                return times_ns
        again()
