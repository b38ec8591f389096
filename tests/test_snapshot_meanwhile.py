"""A snapshot is the store as it was at one moment, whatever others do to that meanwhile."""

import itertools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from copied import BOTH, TARGET, filled_store, take, tree_at
from powercut import SimulatedDisk
from stores import PATH, TINY, abandon, abandon_all, disk_of, new_store, put, tree

from imgfs import cloning
from imgfs.cloning import Reflink
from imgfs.errors import Busy
from imgfs.snapshot import UNFINISHED
from imgfs.store import ROOT, Store

ROUNDS = 60
STEPS = 25
BLOCK_BYTES = 256  # smaller than on a real disk, so that every dead image has some


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


@pytest.fixture
def store() -> Store:
    return filled_store()


class SharedDisk(SimulatedDisk):
    """A disk on which somebody else has a turn before each call, when *turn* is set; blocks of zeros are holes."""

    turn: Callable[[], object] | None = None

    def _call(self, method: str, *paths: str) -> None:
        self._have_turn()
        super()._call(method, *paths)

    def write(self, file: int, offset: int, buffers: object) -> None:
        self._have_turn()
        super().write(file, offset, buffers)  # type: ignore[arg-type]

    def next_data(self, file: int, offset: int) -> int:
        return next((at for at, hole in self._blocks(file, offset) if not hole), self.size(file))

    def next_hole(self, file: int, offset: int) -> int:
        return next((at for at, hole in self._blocks(file, offset) if hole), self.size(file))

    def _blocks(self, file: int, offset: int) -> Iterator[tuple[int, bool]]:
        """Yield where each block at or behind *offset* starts, or *offset*, and whether it was freed."""
        data = self._opened(file).file.data
        for start in range(offset // BLOCK_BYTES * BLOCK_BYTES, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            yield max(start, offset), len(block) == BLOCK_BYTES and not any(block)

    def _have_turn(self) -> None:
        turn, self.turn = self.turn, None
        if turn is not None:
            turn()
            self.turn = turn


class Writer:
    """Changes a store step by step, and keeps what it held after each; what is dead is freed as soon as can be."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.disk = SharedDisk()
        self.store = new_store(disk=self.disk)
        self.data: dict[bytes, bytes] = {}
        self.number = 0
        self.history = [self._state()]
        self.steps = 0
        self.eagerness = chance.choice((0.03, 0.1, 0.3))
        for _ in range(20):
            self._put()
        self.history = [self._state()]

    def _state(self) -> dict[bytes, bytes]:
        return dict(self.data)

    def step(self) -> None:
        if self.steps and self.chance.random() < self.eagerness:
            self.steps -= 1
            self.chance.choice((self._put, self._put, self._overwrite, self._delete))()
            self.history.append(self._state())

    def _put(self) -> None:
        self.number += 1
        name = b"%d" % self.number
        self.data[name] = self.chance.randbytes(self.chance.randrange(1, 9000))
        put(self.store, ROOT, name, self.data[name])

    def _overwrite(self) -> None:
        if self.data:
            name = self.chance.choice(sorted(self.data))
            self.data[name] = self.chance.randbytes(self.chance.randrange(1, 9000))
            self._free(name, lambda: put(self.store, ROOT, name, self.data[name]))

    def _delete(self) -> None:
        if self.data:
            # One of the last, whose bytes are in the volume that is written now, or any.
            names = sorted(self.data, key=int)
            name = self.chance.choice(names[-3:] if self.chance.random() < 0.5 else names)
            self._free(name, lambda: self.store.unlink(ROOT, name))
            del self.data[name]

    def _free(self, name: bytes, change: Callable[[], object]) -> None:
        """Let *change* end what *name* has now; then make that durable, and its bytes zeros."""
        where = self.store.locate(self.store.lookup(ROOT, name))
        change()
        self.store.sync()
        file = self.disk.open(f"{PATH}/volumes/{where.volume:08d}.vol", writable=True)
        self.disk.write(file, where.data_offset, [bytes(where.size)])
        self.disk.close(file)


@BOTH
def test_whatever_happens_meanwhile_it_is_one_state_of_the_store(
    reflink: Reflink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloning, "_PIECE_BYTES", 16 * 1024)
    grown = 0
    for seed in range(ROUNDS):
        writer = Writer(Random(seed))
        writer.steps = STEPS
        writer.disk.turn = writer.step
        try:
            take(writer.disk, reflink)
        finally:
            writer.disk.turn = None
        found = {path[1:]: each.data for path, each in tree_at(writer.disk, freed=True).items()}  # type: ignore[attr-defined]
        assert found in writer.history, f"seed {seed}"
        grown += found != writer.history[0]
        assert {path[1:]: each.data for path, each in tree(writer.store).items()} == writer.history[-1]
        abandon(writer.store)
    assert grown > ROUNDS // 2, "hardly anything happened meanwhile"


def test_an_append_that_is_cut_away_while_it_is_copied_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloning, "_PIECE_BYTES", 4096)
    for turn in itertools.count():
        disk = SharedDisk()
        store = new_store(disk=disk)
        put(store, ROOT, b"first", b"1" * 5000)
        states = [tree(store)]
        path = f"{PATH}/volumes/00000001.vol"
        # A writer is within an append that will fail.
        size = len(disk.content(path))
        disk.set_content(path, disk.content(path) + disk.content(path)[8192:14000])
        turns = itertools.count()

        def change(
            store: Store = store, turn: int = turn, turns: Iterator[int] = turns, size: int = size, states: Any = states
        ) -> None:
            if next(turns) == turn:
                store._log.volume.truncate(size)  # type: ignore[union-attr]
                for name, length in ((b"second", 4000), (b"third", 3000), (b"of the next volume", 60_000)):
                    put(store, ROOT, name, name[:1] * length)
                    store.sync()
                    states.append(tree(store))

        disk.turn = change
        take(disk, Reflink.NEVER)
        disk.turn = None
        assert tree_at(disk) in states, f"turn {turn}"
        abandon(store)
        if next(turns) <= turn:
            break
    assert turn > 20


def test_a_volume_that_is_replaced_while_it_is_copied_does_not_come_along(store: Store) -> None:
    """Compaction: a new volume has all that is needed of two others, which then are removed."""
    disk = disk_of(store)
    removed = f"{PATH}/volumes/00000002.vol"
    held = disk.content(removed)
    for turn in itertools.count(step=5):
        shared = SharedDisk()
        shared._tree = disk.copy()._tree
        turns = itertools.count()

        def change(shared: SharedDisk = shared, turn: int = turn, turns: Iterator[int] = turns) -> None:
            if next(turns) == turn:
                shared.set_content(removed.replace("02", "99"), held)
                shared.remove(removed)

        shared.turn = change
        take(shared, Reflink.ALWAYS)
        shared.turn = None
        copies = [path for path in shared.paths() if path.startswith(TARGET) and path.endswith(("02.vol", "99.vol"))]
        assert len(copies) == 1, copies
        happened = next(turns) > turn
        with Store.open(TARGET, disk=shared, settings=TINY) as copy:
            # A volume under another name than its own is left out when the copy is opened.
            assert copy.counts().volumes == store.counts().volumes - copies[0].endswith("99.vol")
        if not happened:
            break
    assert turn > 40


def test_a_store_that_never_stands_still_is_given_up(store: Store) -> None:
    disk = SharedDisk()
    disk._tree = disk_of(store).copy()._tree
    numbers = itertools.count(100)
    held = disk.content(f"{PATH}/volumes/00000001.vol")

    class Restless(SharedDisk):
        def names(self, directory: str) -> list[str]:
            if directory == f"{PATH}/volumes":
                self.set_content(f"{PATH}/volumes/{next(numbers):08d}.vol", held)
            return super().names(directory)

    restless = Restless()
    restless._tree = disk._tree
    with pytest.raises(Busy, match="changes faster than it can be copied"):
        take(restless, Reflink.ALWAYS)
    assert not restless.exists(TARGET)
    assert not restless.exists(TARGET + UNFINISHED)
