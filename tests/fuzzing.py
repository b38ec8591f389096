"""Stores with any damage or lie in their files: what opening and reading them may do, case by case.

Owns how a case is made, opened and bounded. A case is known by its number. Opening succeeds or says why not; what is
read is as oracle.py has it; reader, writer and rebuild agree. `python tests/fuzzing.py` runs many (`make soak-fuzz`).
Must not know which mutators there are.

*Concurrency:* one process runs one case at a time; several share nothing but the numbers.
"""

import argparse
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType

if __name__ == "__main__":  # as pytest has it
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from cases import STORE, VOLUMES, Case, Seed
from lies import LIES
from mutations import PLAIN
from oracle import Oracle, Seen, ask_strangely, attempt
from parsers import fuzz_parsers
from powercut import SimulatedDisk
from seeds import seeds
from snapshots import read_image
from stores import abandon

from imgfs.errors import ImgfsError
from imgfs.format import Kind
from imgfs.settings import Settings
from imgfs.store import ROOT, Store

SETTINGS = Settings(headroom_bytes=0, checkpoint_needles=6, rest_slots=2)
# A case takes milliseconds of a processor, which may be busy.
CASE_CPU_S = 5.0
CASE_S = 120.0
PRIVATE_BYTES_MAX = 1 << 30  # what a case may allocate


class Hang(BaseException):
    """A case took too long; no `except Exception` may carry on after it."""


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
    oracle = Oracle(case)
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


def _live_on(case: Case, oracle: Oracle, disk: SimulatedDisk, seen: dict[bytes, Seen]) -> None:
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
