"""Nobody stays awake for the next request where others have work for the processor."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgfs.processors import _ANSWERS_EACH, Processors

COUNT = os.cpu_count() or 1
DEADLINE_S = 20


class Load:
    """A file as /proc/loadavg, and who reads it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.set(1)
        self.processors = Processors(str(path))

    def set(self, running: int) -> None:
        self._path.write_text(f"3.20 1.18 0.12 {running}/80 11206\n")


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    load = Load(tmp_path / "loadavg")
    yield load
    load.processors.close()


def test_one_is_to_spare_while_no_more_threads_can_run_than_there_are(load: Load) -> None:
    for running in (1, COUNT):
        load.set(running)
        assert [load.processors.spare() for _ in range(_ANSWERS_EACH)] == [True] * _ANSWERS_EACH
    load.set(COUNT + 1)
    assert not load.processors.spare()


def test_an_answer_is_given_again_a_few_times(load: Load) -> None:
    assert load.processors.spare()
    load.set(COUNT + 1)
    answers = [load.processors.spare() for _ in range(2 * _ANSWERS_EACH)]
    assert answers == [True] * (_ANSWERS_EACH - 1) + [False] * (_ANSWERS_EACH + 1)


def test_who_may_use_a_part_of_them_never_stays_awake(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    assert len(allowed) > 1, "this test needs two processors"
    os.sched_setaffinity(0, {min(allowed)})
    try:
        processors = Load(tmp_path / "loadavg").processors
        assert not processors.spare()
        processors.close()
    finally:
        os.sched_setaffinity(0, allowed)


def test_on_a_busy_machine_none_is_to_spare() -> None:
    processors = Processors()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(COUNT + 1)]
    try:
        deadline = time.monotonic() + DEADLINE_S
        while processors.spare():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        for process in busy:
            process.kill()
            process.wait()
        processors.close()
