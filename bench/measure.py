"""How benches measure: clients that start together, systems that take turns within each round.

*Concurrency:* clients are forked processes; each runs one job and sends back what it returns.
"""

import functools
import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from bench.commands import Failed
from imgfs.child import die_with

T = TypeVar("T")

# More than any image of a bench has; below what malloc would map anew for each read.
_BUFFER_BYTES = 64 << 10
# Between two looks at the clock.
_BURST = 50
_START_S = time.monotonic()


def say(text: str) -> None:
    """Show how far a bench is, and after how long."""
    print(f"    {time.monotonic() - _START_S:4.0f} s  {text}", flush=True)


def rounds(count: int, systems: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    """Yield the number of each round and the order in which the systems take their turns in it.

    The order alternates, so that what slowly changes on a shared machine favours none.
    """
    for number in range(count):
        yield number, systems if number % 2 == 0 else list(reversed(systems))


def together(jobs: Sequence[Callable[[], T]]) -> tuple[float, list[T]]:
    """Run each job in a process of its own, all from the same moment; return (seconds to the last, what they return).

    Failed if one of them raises.
    """
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(jobs) + 1)
    queue = context.SimpleQueue()

    parent = os.getpid()

    def client(job: Callable[[], T]) -> None:
        # Whoever kills the bench does not want its clients to wait for it for ever.
        die_with(parent)
        barrier.wait()
        try:
            queue.put(job())
        except BaseException as error:
            queue.put(repr(error))

    processes = [context.Process(target=client, args=(job,), daemon=True) for job in jobs]
    try:
        for process in processes:
            process.start()
        barrier.wait()
        start = time.perf_counter()
        results = [queue.get() for _ in processes]
        seconds = time.perf_counter() - start
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    failures = [result for result in results if isinstance(result, str)]
    if failures:
        raise Failed(f"a client failed: {failures[0]}")
    return seconds, results


def read_files(top: Path, names: Sequence[str]) -> int:
    """Open, read and close each of the files *names* below *top*; return the sum of their bytes."""
    buffer = bytearray(_BUFFER_BYTES)
    total = 0
    for name in names:
        file = os.open(f"{top}/{name}", os.O_RDONLY)
        total += os.readv(file, [buffer])
        os.close(file)
    return total


def warm_up(top: Path, names: Sequence[str]) -> None:
    """Read all of them once, by a process of its own: nothing may stay open here if it is interrupted."""
    together([functools.partial(read_files, top, names)])


def read_for(top: Path, names: Sequence[str], seconds: float, seed: int) -> int:
    """As `read_files`, in random order, for so many *seconds*; return how many files were read."""
    order = random.Random(seed).sample(names, len(names))
    deadline = time.perf_counter() + seconds
    done = 0
    while time.perf_counter() < deadline:
        burst = [order[(done + number) % len(order)] for number in range(_BURST)]
        read_files(top, burst)
        done += _BURST
    return done


def reads_per_second(top: Path, names: Sequence[str], seconds: float, clients: int, number: int) -> float:
    """Return how many of the files *names* so many *clients* read in a second, all in memory: round *number*."""
    warm_up(top, names)
    jobs = [functools.partial(read_for, top, names, seconds, number * clients + client) for client in range(clients)]
    taken, counts = together(jobs)
    return sum(counts) / taken


def timed(call: Callable[[], object]) -> float:
    """Return how many seconds *call* takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def process_memory(pid: int | str = "self") -> dict[str, int]:
    """Return the resident memory of a process, by what it is, in bytes; `VmHWM` is the most it ever had."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem", "VmHWM", "VmRSS"):
            found[name] = int(value.split()[0]) << 10
    return found


def kernel_memory() -> int:
    """Return the bytes of what the kernel keeps about files and all else of its own, of the whole machine."""
    found = re.search(r"^Slab:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def private_memory(pid: int) -> int:
    """Return the bytes that the process *pid* and its children have for themselves; what they share counts once."""
    return _proportional(pid, "Pss_Anon:")


def all_memory(pid: int) -> int:
    """Return all bytes that are resident in the process *pid* and its children; what they share counts once."""
    return _proportional(pid, "Pss:")


def _proportional(pid: int, kind: str) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0
    for process in (pid, *children):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith(kind):
                total += int(line.split()[1]) << 10
    return total
