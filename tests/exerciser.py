"""Steps that are taken at the same time on a mount, on another file system beside it, and on a model of both.

Owns the comparison of outcomes, and the processes that take many steps at once: run as a program, this is one of them.
Must not know what the steps do; that is file_model.py and tree_model.py.

*Concurrency:* a model belongs to one process. Several processes work in directories of their own, on one mount.
"""

import contextlib
import errno
import importlib
import os
import random
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

T = TypeVar("T")

# What is run at length instead of in seconds, see the Makefile.
SOAK = int(os.environ.get("IMGFS_SOAK", "0"))
# Arguments of steps are numbers below this; each step makes of them what it needs.
NUMBERS = 1 << 20
# Looking at everything costs as much as some dozens of steps.
STEPS_BETWEEN_CHECKS = 50
# Of what led to a failure, this much is shown.
STEPS_SHOWN = 60
AT_ONCE = 4


class Step(NamedTuple):
    """One thing to do, and what it picks its arguments by."""

    name: str
    a: int
    b: int
    c: int


class Pair(NamedTuple, Generic[T]):
    """The same on the mount and beside it."""

    mount: T
    twin: T


class Model(Protocol):
    """What a program sees of a directory on the mount, as it must be."""

    # The names of the steps; what stands here more often is done more often.
    STEPS: ClassVar[Sequence[str]]

    def __init__(self, directories: Pair[Path]) -> None:
        """Work in *directories*, which are empty."""

    def take(self, step: Step) -> None:
        """Do *step* everywhere, and compare what comes of it."""

    def check(self) -> None:
        """Compare all that can be seen."""

    def let_go(self) -> None:
        """Close everything, so that the mount can be taken away; what was there stays."""


class Failed(NamedTuple):
    """How a system call failed."""

    error: str


def both(call: Callable[..., T], *arguments: Pair[Any], same: bool = True) -> Pair[T] | None:
    """Make *call* with the first of each of *arguments*, then with the second; None if both fail in the same way.

    What they return must be the same too, unless it is not *same*.
    """
    pair = Pair(_outcome(call, *(pair.mount for pair in arguments)), _outcome(call, *(pair.twin for pair in arguments)))
    mount, twin = pair
    if isinstance(mount, Failed) or isinstance(twin, Failed):
        assert mount == twin, f"{mount} on the mount, {twin} beside it"
        return None
    assert not same or mount == twin
    return Pair(mount, twin)


def _outcome(call: Callable[..., T], *arguments: Any) -> T | Failed:
    try:
        return call(*arguments)
    except OSError as error:
        return Failed(errno.errorcode[error.errno or 0])


def pick(items: Sequence[T], number: int) -> T:
    """Return one of *items*."""
    return items[number % len(items)]


# -- at random, without Hypothesis ------------------------------------------------------------------------------------


def exercise(model: Model, seed: int, steps: int) -> None:
    """Take *steps* steps; if one fails, the last ones before it are told."""
    chance = random.Random(seed)
    taken: deque[Step] = deque(maxlen=STEPS_SHOWN)
    number = 0
    try:
        for number in range(steps):
            numbers = (chance.randrange(NUMBERS) for _ in range(3))
            taken.append(Step(chance.choice(model.STEPS), *numbers))
            model.take(taken[-1])
            if not number % STEPS_BETWEEN_CHECKS:
                model.check()
        model.check()
    except BaseException as error:
        error.add_note(f"at step {number} of seed {seed}, after:\n" + "\n".join(map(str, taken)))
        raise


def main(module: str, name: str, mount: str, twin: str, seed: str, steps: str) -> None:
    """Exercise a model; then say so, and check once more when told to."""
    model: Model = getattr(importlib.import_module(module), name)(Pair(Path(mount), Path(twin)))
    exercise(model, int(seed), int(steps))
    model.let_go()
    print("ready", flush=True)
    sys.stdin.readline()
    model.check()
    model.let_go()


class Exercisers:
    """Processes that exercise a model each, in directories of their own."""

    def __init__(self, model: type[Model], directories: Pair[Path], seeds: Sequence[int], steps: int) -> None:
        self._processes = []
        for seed in seeds:
            own = Pair(directories.mount / f"{seed}", directories.twin / f"{seed}")
            own.mount.mkdir()
            own.twin.mkdir()
            numbers = (str(seed), str(steps))
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, model.__module__, model.__name__, *map(str, own), *numbers],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd="/",
                )
            )

    def wait(self, deadline_s: float) -> None:
        """Return when all have taken their steps and closed what they had open."""
        end = time.monotonic() + deadline_s
        for process in self._processes:
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            assert readable, f"not done within {deadline_s:g} s"
            if not process.stdout.readline():
                raise AssertionError(process.communicate(timeout=deadline_s)[1].decode())

    def finish(self, deadline_s: float) -> None:
        """Let all check once more what they left, and end."""
        for process in self._processes:
            said = process.communicate(b"\n", timeout=deadline_s)[1]
            assert process.returncode == 0, said.decode()

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@contextlib.contextmanager
def exercisers(model: type[Model], directories: Pair[Path], steps: int) -> Iterator[Exercisers]:
    """Some processes at work until the end of the block, whatever happens in it; at length, with steps ever new."""
    seeds = random.sample(range(1 << 30), AT_ONCE) if SOAK else range(AT_ONCE)
    running = Exercisers(model, directories, seeds, steps)
    try:
        yield running
    finally:
        running.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
