"""Stores with any damage or lie in their files: what opening and reading them may do, case by case.

Owns the seeds and the oracle. A case is known by its number. Opening succeeds or says why not; what is read was once
written under that inode; what was not touched is served; reader, writer and rebuild agree. `python tests/fuzzing.py`
runs many (`make soak-fuzz`). Must not know which mutators there are.

*Concurrency:* one process runs one case at a time; several share nothing but the numbers.
"""

import argparse
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import NamedTuple, ParamSpec, TypeVar

if __name__ == "__main__":  # as pytest has it
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pytest
from crash_model import Clock, Workload
from damage_model import LOST, At, sample_of
from mutations import LIES, PLAIN, STORE, SUPERBLOCK, VOLUMES, Case, Seed, current, number
from parsers import fuzz_parsers
from powercut import SimulatedDisk
from snapshots import Snapshot, assert_same, attributes_of, read_image, snapshot
from stores import abandon
from workloads import random_operations

from imgfs.compact import Keep
from imgfs.errors import ImgfsError
from imgfs.format import VOLUME_HEADER_COPIES, Kind
from imgfs.layout import Word
from imgfs.needed import NEVER_S
from imgfs.opening import LOCK
from imgfs.settings import MIB, Settings
from imgfs.store import ROOT, Store
from imgfs.superblock import Superblock, pack_superblock, unpack_superblock
from imgfs.view import Entry, check_name
from imgfs.volume import Volume

T = TypeVar("T")
P = ParamSpec("P")

SETTINGS = Settings(headroom_bytes=0, checkpoint_needles=6, rest_slots=2)
_VOLUME_BYTES = 16_000  # so that a dozen needles fill one
_SEEDS = 16
_RECLAIMED = 5  # of these have holes, or a volume that replaces others
# A case takes milliseconds of a processor, which may be busy.
CASE_CPU_S = 5.0
CASE_S = 120.0
# What a case may allocate, and what the table of a store with so few images may take.
PRIVATE_BYTES_MAX = 1 << 30
TABLE_BYTES_MAX = 32 * MIB


class Hang(BaseException):
    """A case took too long; no `except Exception` may carry on after it."""


# -- seeds --------------------------------------------------------------------------------------------------------


class _SmallVolumes(Workload):
    """A workload whose volumes hold a dozen needles."""

    def open(self) -> None:
        store_id = unpack_superblock(self.disk.content(SUPERBLOCK)).store_id
        self.disk.set_content(SUPERBLOCK, pack_superblock(Superblock(store_id, _VOLUME_BYTES)))
        super().open()


def reclaim(store: Store) -> None:
    """Punch holes where images were deleted, and compact what is sealed."""
    reclaimer = store.reclaimer()
    reclaimer.punch(everything=True)
    compaction = reclaimer.compaction
    rows = compaction.sealed()
    if rows:
        row = compaction.run(compaction.plan(rows, Keep((), NEVER_S)), 0)
        compaction.remove(row, ())


def _seed(clock: Clock, number: int) -> Seed:
    random = Random(number)
    work = _SmallVolumes(clock, Settings(headroom_bytes=0, checkpoint_needles=6, rest_slots=random.choice((0, 2))))
    random_operations(work, random, random.choice((8, 12, 16, 20)))
    if number >= _SEEDS - _RECLAIMED:
        work.sync()
        reclaim(work.store)
        random_operations(work, random, 4)
    if number % 3:
        work.close()
    else:
        work.sync()
        work.create(b"/mark", b"its header says that all before it is durable")
    sample = sample_of(work)
    if not number % 3:
        abandon(work.store)
    images: dict[int, set[bytes]] = {}
    attributes: dict[int, set[tuple[tuple[bytes, bytes], ...]]] = {}
    names: dict[int, set[bytes]] = {}
    for state in work.history:
        for path, node in state.items():
            images.setdefault(node.inode, set()).add(node.data or b"")
            attributes.setdefault(node.inode, set()).add(node.attributes or ())
            names.setdefault(node.inode, set()).add(path.rpartition(b"/")[2])
    return Seed(
        f"seed {number}",
        {path: sample.disk.content(path) for path in sample.disk.paths()} | {f"{STORE}/{LOCK}": b"1234\n"},
        sample.needles,
        {path: Volume.open(sample.disk, path).header for path in sample.disk.paths() if path.endswith(".vol")},
        sample.wanted,
        {inode: frozenset(each) for inode, each in images.items()},
        {inode: frozenset(each) for inode, each in attributes.items()},
        {inode: frozenset(each) for inode, each in names.items()},
    )


@contextmanager
def seeds() -> Iterator[list[Seed]]:
    """Give the stores that are changed, the same in every run; meanwhile the clock stands still."""
    noise = Random(0)
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        patch.setattr(time, "time_ns", lambda: clock.now_ns)
        with pytest.MonkeyPatch.context() as making:
            making.setattr(os, "urandom", noise.randbytes)
            made = [_seed(clock, number) for number in range(_SEEDS)]
        level = logging.getLogger("imgfs").level
        logging.getLogger("imgfs").setLevel(logging.CRITICAL)
        try:
            yield made
        finally:
            logging.getLogger("imgfs").setLevel(level)


# -- what is seen -------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What could be read of one path; None: an error."""

    inode: int
    kind: Kind
    data: bytes | None


def attempt(do: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> T | None:
    """Return what *do* returns, None if it says that it cannot."""
    try:
        return do(*arguments, **more)
    except ImgfsError:
        return None


def entries(store: Store, directory: int) -> list[Entry]:
    return list(store.list(directory))


def walk(store: Store) -> dict[bytes, Seen]:
    """Return all that can be reached by name; trust nothing."""
    found: dict[bytes, Seen] = {}
    pending = [(b"", ROOT)]
    known = set()
    while pending:
        path, inode = pending.pop()
        attr = attempt(store.attr, inode)
        if attr is None:
            found[path] = Seen(inode, Kind.FREE, None)
            continue
        data: bytes | None = b""
        if attr.kind == Kind.FILE:
            data = attempt(read_image, store, inode)
        elif attr.kind == Kind.SYMLINK:
            data = attempt(store.readlink, inode)
        found[path] = Seen(inode, attr.kind, data)
        if attr.kind == Kind.DIRECTORY and inode not in known:
            known.add(inode)
            for entry in attempt(entries, store, inode) or ():
                check_name(entry.name)
                attempt(store.lookup, inode, entry.name)
                pending.append((path + b"/" + entry.name, entry.inode))
    return found


def poke(store: Store) -> dict[int, bytes]:
    """Ask for everything of every inode there is, named or not; return the images that could be read."""
    images: dict[int, bytes] = {}
    words = store._memory.words
    for slot in range(min(words[Word.SLOTS], 200)):
        inode = slot + 1 | store._table.record(slot).generation << 32
        for ask in (store.attr, store.name, store.locate, store.has_xattrs):
            attempt(ask, inode)
        parent = attempt(store.parent, inode)
        if parent is not None:
            attempt(store.attr, parent)
        attempt(entries, store, inode)
        data = attempt(read_image, store, inode)
        if data is not None:
            images[inode] = data
    attempt(store.counts)
    return images


def ask_strangely(store: Store, random: Random) -> None:
    """Ask for inodes and handles as a stale or made-up file handle of NFS does."""
    for _ in range(3):
        inode = number(random, 64)
        for ask in (
            store.attr,
            store.name,
            store.parent,
            store.readlink,
            store.list_xattrs,
            store.prefetch,
            store.locate,
        ):
            attempt(ask, inode)
        attempt(store.lookup, inode, b"a")
        attempt(entries, store, inode)
        handle = attempt(store.open_image, inode)
        if handle is not None:
            attempt(store.release, handle)
        attempt(store.read, number(random, 64), 0, 10)
        attempt(store.release, number(random, 64))


# -- the oracle ---------------------------------------------------------------------------------------------------


@dataclass
class _Oracle:
    case: Case

    def __post_init__(self) -> None:
        seed, case = self.case.seed, self.case
        # Volumes are replayed in this order; those that were compacted come later only by their names.
        last = max(seed.headers, key=lambda path: (seed.headers[path].first_sequence, path))
        tail = [at for at in seed.needles if at.path == last]
        durable = max((at.needle.durable for at in tail if not case.spoils(at.path, at.offset, at.end)), default=0)
        # Where the log may end early, nothing was promised of what comes after.
        torn = case.spoils(last, durable, 1 << 40)
        self.exact = case.harmless
        self.served: dict[int, bytes] = {}
        if not (case.lying or case.rearranged or torn):
            needed = current(seed.needles)
            gone = [path for path in seed.headers if self._headless(path)]
            for node in seed.wanted.values():
                at = needed.get(node.inode)
                if at and node.kind in (Kind.FILE, Kind.SYMLINK) and at.path not in gone and not self._spoiled(at):
                    self.served[node.inode] = node.data or b""

    def _spoiled(self, at: At) -> bool:
        return self.case.spoils(at.path, at.offset, at.end)

    def _headless(self, path: str) -> bool:
        return all(self.case.spoils(path, start, start + 200) for start in VOLUME_HEADER_COPIES)

    def image(self, inode: int, data: bytes) -> None:
        known = self.case.seed.images.get(inode, frozenset())
        assert data in known or data in self.case.images.get(inode, ()), f"inode {inode:#x}: wrong bytes {data[:20]!r}"

    def attributes(self, store: Store, inode: int) -> None:
        told = attempt(attributes_of, store, inode)
        known = self.case.seed.attributes.get(inode, frozenset())
        assert not told or told in known or told in self.case.attributes.get(inode, ()), f"{inode:#x}: {told}"

    def look(self, store: Store) -> dict[bytes, Seen]:
        """Check all that *store* shows, and return it."""
        case = self.case
        assert store._memory.resident_bytes() < TABLE_BYTES_MAX, "the table takes too much memory"
        if not (case.lying or case.rearranged):
            told = snapshot(store, damaged=True)
            found = {path: Seen(node.inode, node.kind, node.data) for path, node in told.items()}
            self._names(told)
            if self.exact:
                assert_same(told, case.seed.wanted, "volumes that were not changed")
        else:
            found = walk(store)
        images = poke(store) if case.lying or case.rearranged else {}
        for path, (inode, kind, data) in found.items():
            if kind in (Kind.FILE, Kind.SYMLINK) and data is not None:
                images[inode] = data
            assert path.count(b"/") < 100
        for inode, data in images.items():
            self.image(inode, data)
            self.attributes(store, inode)
        for inode, data in self.served.items():
            assert images.get(inode) == data, f"inode {inode:#x} was not touched, and is not served"
        return found

    def _names(self, told: Snapshot) -> None:
        for path, node in told.items():
            name = path.rpartition(b"/")[2]
            known = name in self.case.seed.names.get(node.inode, ()) or name.startswith(LOST)
            assert known or node.inode == ROOT, f"{path!r} was never a name of inode {node.inode:#x}"


def make_case(made: list[Seed], number: int) -> tuple[Case, Random]:
    """Return the case of that *number*."""
    random = Random(number)
    seed = random.choice(made)
    case = Case(seed, {path: bytearray(data) for path, data in seed.files.items()})
    mutators = PLAIN if random.random() < 0.55 else PLAIN | LIES
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        (mutate,) = random.choices(list(mutators), list(mutators.values()))
        mutate(case, random)
    return case, random


def disk_of(case: Case, *, index: bool) -> SimulatedDisk:
    """Return a disk with the files of *case*, without those of the index unless *index*."""
    disk = SimulatedDisk()
    for directory in (STORE, VOLUMES, f"{STORE}/staging"):
        disk.mkdir(directory)
    for path, data in case.files.items():
        if index or not path.endswith((".idx", ".names")):
            disk.set_content(path, bytes(data))
    return disk


class Refused(Exception):
    """The store cannot be opened, and says why."""


@contextmanager
def opened(disk: SimulatedDisk, *, writable: bool) -> Iterator[Store]:
    try:
        store = Store.open(STORE, disk=disk, settings=SETTINGS, writable=writable)
    except ImgfsError as error:
        raise Refused(type(error).__name__) from error
    try:
        yield store
    finally:
        abandon(store)


def check_case(case: Case, random: Random) -> None:
    """Open the store of *case* in some of the ways there are; AssertionError, or any other, if that is not as it must.

    Raises:
        Refused: it cannot be opened.
    """
    oracle = _Oracle(case)
    everything = random.random() < 0.06
    ways = [(index, writable) for index in (True, False) for writable in (False, True)]
    for index, writable in ways if everything else [random.choice(ways)]:
        disk = disk_of(case, index=index)
        with opened(disk, writable=writable) as store:
            seen = oracle.look(store)
            ask_strangely(store, random)
            if everything:
                attempt(lambda: list(store.check()))
        if everything and writable:
            with opened(disk_of(case, index=index), writable=False) as reader:
                assert oracle.look(reader) == seen, "reader and writer disagree"
        if writable and random.random() < 0.2:
            _live_on(case, oracle, disk.after_kill(), seen)


def _live_on(case: Case, oracle: _Oracle, disk: SimulatedDisk, seen: dict[bytes, Seen]) -> None:
    """Check that who opens the store next sees the same, and that it takes images, as ever."""
    with opened(disk, writable=True) as store:
        again = oracle.look(store)
        assert again == seen or case.lying, "the second start disagrees"
        new = attempt(lambda: store.put(ROOT, b"new", b"new data", 8, mode=0o644, uid=1, gid=2, mtime_ns=3))
        assert new is not None or case.lying, "it takes no image"
        moved = attempt(store.mkdir, ROOT, b"new directory", 0o755, 0, 0)
        if new is not None and moved is not None:
            attempt(store.rename, ROOT, b"new", moved, b"moved")
        for path, each in list(again.items())[1:6]:
            name = path.rpartition(b"/")[2]
            parent = attempt(store.resolve, path[: -len(name) - 1])
            if parent is not None:
                attempt(store.rename, parent, name, ROOT, b"renamed")
                attempt(store.rmdir if each.kind == Kind.DIRECTORY else store.unlink, parent, name)
        closed = attempt(lambda: [store.roll_forward(), store._log and store._log.sync(final=True)])
        assert closed or case.lying, "it cannot be closed"
    if new is None or not closed:
        return
    for path in disk.paths():
        if path.endswith((".idx", ".names")) and not case.lying:
            disk.remove(path)
    with opened(disk.after_kill(), writable=False) as store:
        assert read_image(store, new) == b"new data"


def run(made: list[Seed], number: int) -> str:
    """Run the case *number*; return how it ended, or raise."""
    case, random = make_case(made, number)
    try:
        check_case(case, random)
    except Refused as refused:
        if not (case.lying or case.rearranged):
            raise
        return str(refused)
    return "served"


@contextmanager
def bounded() -> Iterator[None]:
    """Let no case take more time or memory than is due."""

    def late(_: int, frame: FrameType | None) -> None:
        raise Hang("too long: " + "".join(traceback.format_stack(frame)[-4:]))

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    before = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_DATA, (PRIVATE_BYTES_MAX, limits[1]))
    try:
        yield
    finally:
        set_timers(0, 0)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        for number, handler in before.items():
            signal.signal(number, handler)


def set_timers(cpu_s: float, real_s: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, real_s)


def run_bounded(made: list[Seed], number: int) -> str:
    """As `run`, within `bounded`, with inputs for the single parsers beside it."""
    set_timers(CASE_CPU_S, CASE_S)
    fuzz_parsers(Random(number))
    return run(made, number)


# -- many ---------------------------------------------------------------------------------------------------------


def _work(numbers: range, results: "multiprocessing.SimpleQueue[tuple[int, int, dict[str, int], list[str]]]") -> None:
    """Run the cases *numbers*; report every few."""
    with seeds() as made, bounded():
        outcomes: dict[str, int] = {}
        failures: list[str] = []
        for count, number in enumerate(numbers, 1):
            try:
                outcome = run_bounded(made, number)
            except (Exception, Hang) as error:
                set_timers(0, 0)
                outcome = "FAILED"
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {str(error)[:300]}"
                failures.append(f"case {number}: {text} [{Path(where.filename).name}:{where.lineno} {where.name}]")
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if count % 200 == 0 or count == len(numbers):
                results.put((number, sum(outcomes.values()), outcomes, failures))
                outcomes, failures = {}, []


def main() -> int:
    parser = argparse.ArgumentParser(description="Open stores with any damage there can be.")
    parser.add_argument("--from", dest="first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1_000_000, help="how many cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many processes")
    parser.add_argument("--case", type=int, help="run this case alone, and say what it does")
    options = parser.parse_args()
    if options.case is not None:
        with seeds() as made, bounded():
            case, _ = make_case(made, options.case)
            print(case.seed.name, *case.log, sep="\n")
            print(run_bounded(made, options.case))
        return 0
    os.nice(19)
    return _run_many(options.first, options.count, options.jobs)


def _run_many(first: int, count: int, jobs: int) -> int:
    results: multiprocessing.SimpleQueue[tuple[int, int, dict[str, int], list[str]]] = multiprocessing.SimpleQueue()
    parts = [range(first + job, first + count, jobs) for job in range(jobs)]
    workers = [multiprocessing.Process(target=_work, args=(part, results), daemon=True) for part in parts if part]
    for worker in workers:
        worker.start()
    started, done, failed, totals, said = time.monotonic(), 0, 0, dict[str, int](), 0.0
    reached = [part.start - jobs for part in parts]
    try:
        while done < count:
            number, ran, outcomes, failures = results.get()
            reached[(number - first) % jobs] = number
            done += ran
            for outcome, times in outcomes.items():
                totals[outcome] = totals.get(outcome, 0) + times
            for line in failures:
                failed += 1
                print(line, flush=True)
            elapsed_s = time.monotonic() - started
            if elapsed_s - said > 10 or done == count:
                said = elapsed_s
                left_s = (count - done) * elapsed_s / done
                told = ", ".join(f"{times} {outcome}" for outcome, times in sorted(totals.items()))
                print(f"{done}/{count} cases, {done / elapsed_s:.0f}/s, {left_s / 60:.0f} min left: {told}", flush=True)
    except KeyboardInterrupt:
        print(f"go on with FROM={min(reached) + jobs}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
