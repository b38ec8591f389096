"""A mount with room, and beside it a directory of the XFS below: where steps are taken on both.

Owns their making and taking down. Must not know what is done there. Its fixture is registered in `conftest.py`.
"""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mounted
import pytest
from exerciser import NUMBERS, SOAK, Model, Pair, Step
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mounted import Mounted, XfsDisk, imgfs

from imgfs.settings import MIB, Settings
from imgfs.store import make_store

# Every close and every fsync of a changed image stores all of it again, and nothing of that is given back.
ROOM_BYTES = (48 if SOAK else 4) << 30
SETTINGS = Settings(volume_bytes_max=16 * MIB)
STEPS_MIN, STEPS_MAX = 5, 120
OPTIONS = "allow_other,xattr"
# At length, one daemon works for so long, and `imgfs check` has some 20 GB to read.
SOAK_S = 3500.0
SOAK_DEADLINE_S = 300.0


@dataclass
class Ground:
    """The mount, and two directories to work in."""

    mounted: Mounted
    directories: Pair[Path]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def mount_again(self, *, kill: bool = False) -> None:
        """End the daemon and start another; with *kill*, the first has no time to say anything."""
        if kill:
            self.mounted.kill()
        else:
            self.mounted.stop()
        self.mounted.start(OPTIONS)

    def new_directories(self) -> Pair[Path]:
        name = f"example{next(self._numbers)}"
        pair = Pair(self.directories.mount / name, self.directories.twin / name)
        for directory in pair:
            directory.mkdir()
        return pair


@pytest.fixture
def ground(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    """An empty store that is mounted, and an empty directory on the XFS that holds it."""
    monkeypatch.setattr(mounted, "XFS_BYTES", ROOM_BYTES)
    if SOAK:
        monkeypatch.setattr(mounted, "WATCHDOG_S", SOAK_S)
        monkeypatch.setattr(mounted, "DEADLINE_S", SOAK_DEADLINE_S)
    directory = site / "ground"
    with contextlib.ExitStack() as stack:
        directory.mkdir()
        stack.callback(directory.rmdir)
        disk = XfsDisk(directory)
        stack.callback(disk.remove)
        store, twin, point = disk.path / "store", disk.path / "twin", directory / "point"
        twin.mkdir()
        stack.callback(shutil.rmtree, twin)
        point.mkdir()
        make_store(str(store), SETTINGS, uid=0, gid=0)
        stack.callback(shutil.rmtree, store)
        there = Mounted(store, point)
        stack.callback(lambda: imgfs("check", store, code=there.check_code))
        stack.callback(there.tear_down)
        there.start(OPTIONS)
        yield Ground(there, Pair(point, twin))


def try_steps(
    ground: Ground, model: type[Model], examples: int, after: Callable[[Model], None] = lambda model: model.check()
) -> list[Model]:
    """Let Hypothesis find steps after which *model* does not hold; return the models of the steps it tried.

    *after* is done at the end of each example, when all is closed.
    """
    held: list[Model] = []
    number = st.integers(0, NUMBERS - 1)
    step = st.builds(Step, st.sampled_from(model.STEPS), number, number, number)

    # No shrinking: it takes minutes. Add Phase.shrink to hunt for a bug.
    @settings(max_examples=examples, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
    @given(steps=st.lists(step, min_size=STEPS_MIN, max_size=STEPS_MAX))
    def take(steps: list[Step]) -> None:
        trying = model(ground.new_directories())
        try:
            for step in steps:
                trying.take(step)
            trying.check()
        finally:
            trying.let_go()
        after(trying)
        held.append(trying)

    take()
    return held
