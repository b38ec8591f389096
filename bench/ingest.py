"""Durable ingest: writers that each write an image, fsync it and close it, and go on with the next one."""

import functools
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from bench.lineup import Lineup, line_up
from bench.measure import together
from bench.result import Result
from bench.site import Site
from bench.systems import System

_IMAGE_BYTES = 20_000
_WRITERS = (4, 16)


@dataclass(frozen=True)
class _Size:
    rounds: int
    window_s: float
    disk_bytes: int


SIZES = {
    "tiny": _Size(1, 0.1, 400 << 20),
    "quick": _Size(2, 0.3, 2 << 30),
    "full": _Size(9, 1.2, 12 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("ingest", "Durable ingest", parameters={"window_s": chosen.window_s})
    with line_up(site, chosen.disk_bytes, result) as lineup:
        for writers in _WRITERS:
            _measure(result, lineup, writers, chosen)
    result.notes.append(
        f"Images of {_IMAGE_BYTES:,} bytes, each created, written, fsynced and closed, every writer in a directory of "
        f"its own; windows of {chosen.window_s:g} s, {chosen.rounds} for each system, in turns."
    )
    return result


def _measure(result: Result, lineup: Lineup, writers: int, chosen: _Size) -> None:
    def write(system: System, number: int) -> dict[str, float]:
        system.settle()
        directories = [system.directory / f"by{writers}-{number}-{writer}" for writer in range(writers)]
        for directory in directories:
            directory.mkdir()
        seconds, counts = together([functools.partial(write_for, path, chosen.window_s) for path in directories])
        return {"/s": sum(counts) / seconds}

    samples = lineup.take_turns(chosen.rounds, f"{writers} writers", write)["/s"]
    result.add(f"create, write, fsync, close, {writers} writers", "images/s", samples)


def write_for(directory: Path, seconds: float) -> int:
    """Write durable images into *directory* for so many *seconds*; return how many."""
    data = random.randbytes(_IMAGE_BYTES)
    deadline = time.perf_counter() + seconds
    done = 0
    while time.perf_counter() < deadline:
        file = os.open(f"{directory}/img_{done:08}.jpg", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(file, data)
        os.fsync(file)
        os.close(file)
        done += 1
    return done
