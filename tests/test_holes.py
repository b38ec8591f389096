"""When volumes are looked at for what is dead in them: once after something died, and when its time is over."""

import time
from collections.abc import Iterator

import pytest
from powercut import SimulatedDisk
from stores import PATH, TINY, abandon_all, content, new_store, put

from imgfs.layout import Word
from imgfs.reclaim import Reclaimer
from imgfs.retention import empty
from imgfs.settings import Settings
from imgfs.store import ROOT, Store

DAY_S = 86_400.0
LARGE = bytes(20_000)


class CountingDisk(SimulatedDisk):
    """Counts the indexes that are opened, which is to read them."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def open(self, path: str, *, writable: bool = False, create: bool = False, exclusive: bool = False) -> int:
        if path.endswith(".idx"):
            self.opened.append(path)
        return super().open(path, writable=writable, create=create, exclusive=exclusive)

    def indexes_read(self) -> int:
        """Return how many were read since this was asked."""
        count = len(self.opened)
        self.opened.clear()
        return count


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


def many_volumes(settings: Settings = TINY) -> tuple[Store, CountingDisk]:
    """Return a store of some ten volumes, of each of which about half lives, and its disk."""
    disk = CountingDisk()
    store = new_store(settings, disk)
    for number in range(40):
        put(store, ROOT, b"%d" % number, LARGE)
    for number in range(0, 40, 2):
        store.unlink(ROOT, b"%d" % number)
    assert store._memory.words[Word.VOLUMES] > 9
    return store, disk


def idle(reclaimer: Reclaimer, disk: CountingDisk) -> int:
    """Return how many indexes it costs to look again and again."""
    reclaimer.punch()  # holes need a checkpoint, which is appended
    disk.indexes_read()
    for _ in range(5):
        assert reclaimer.punch().holes == 0
    return disk.indexes_read()


@pytest.mark.parametrize("retention_s", [0.0, DAY_S])
def test_an_idle_store_reads_no_index(retention_s: float) -> None:
    store, disk = many_volumes()
    reclaimer = store.reclaimer(retention_s=retention_s)
    disk.indexes_read()
    freed = reclaimer.punch()
    assert (freed.holes > 0) == (retention_s == 0)
    assert disk.indexes_read() >= store._memory.words[Word.VOLUMES]
    assert idle(reclaimer, disk) == 0


def test_only_the_volume_of_what_died_is_looked_at() -> None:
    store, disk = many_volumes()
    reclaimer = store.reclaimer()
    reclaimer.punch()
    assert idle(reclaimer, disk) == 0
    store.unlink(ROOT, b"1")
    assert reclaimer.punch().hole_bytes > 4096
    assert disk.indexes_read() <= 2, "its volume, and the one in which it is deleted"
    assert idle(reclaimer, disk) == 0


def test_what_is_open_is_looked_at_when_it_is_closed() -> None:
    store, disk = many_volumes()
    reclaimer = store.reclaimer()
    inode = store.resolve(b"1")
    handle = store.open_image(inode)
    store.unlink(ROOT, b"1")
    reclaimer.punch()
    assert idle(reclaimer, disk) == 0
    assert content(store, inode) == LARGE
    store.release(handle)
    assert reclaimer.punch().hole_bytes > 16_000
    assert idle(reclaimer, disk) == 0


def test_attributes_go_with_what_they_were_of() -> None:
    store, _ = many_volumes()
    inode = store.resolve(b"1")
    put(store, ROOT, b"before", LARGE)
    store.set_xattr(inode, b"user.a", bytes(30_000))
    put(store, ROOT, b"behind", LARGE)
    reclaimer = store.reclaimer()
    reclaimer.punch()
    store.set_xattr(inode, b"user.a", bytes(29_000))
    assert reclaimer.punch().hole_bytes > 24_000
    store.unlink(ROOT, b"1")
    assert reclaimer.punch().hole_bytes > len(LARGE) + 20_000


def test_emptying_the_trash_frees_at_once() -> None:
    store, disk = many_volumes()
    reclaimer = store.reclaimer(retention_s=DAY_S)
    assert reclaimer.punch().holes == 0
    empty(disk, PATH, time.time_ns() + 2 * 10**9)
    assert reclaimer.punch().hole_bytes > 10 * 16_000
    assert idle(reclaimer, disk) == 0


def test_what_waits_is_freed_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    store, disk = many_volumes()
    reclaimer = store.reclaimer(retention_s=DAY_S)
    now_s = time.time()
    reclaimer.punch()
    monkeypatch.setattr("imgfs.reclaim.time.time", lambda: now_s + DAY_S - 10)
    assert idle(reclaimer, disk) == 0
    monkeypatch.setattr("imgfs.reclaim.time.time", lambda: now_s + DAY_S + 10)
    assert reclaimer.punch().hole_bytes > 10 * 16_000
    assert idle(reclaimer, disk) == 0


def test_requests_that_take_long_only_put_it_off() -> None:
    store, _ = many_volumes()
    settled = [True, False, False]
    reclaimer = store.reclaimer(settle=settled.pop)
    assert [reclaimer.punch().holes > 0 for _ in range(3)] == [False, False, True]


def test_what_is_counted_are_the_volumes_that_are_there() -> None:
    store, _ = many_volumes()
    before = store.counts()
    reclaimer = store.reclaimer()
    reclaimer.punch()
    holes = store.counts()
    assert before.volume_bytes <= holes.volume_bytes < before.volume_bytes + 1000, "and a checkpoint"
    while groups := reclaimer.worthwhile(reclaimer.survey()):
        assert reclaimer.compact(groups[0]).volumes
    assert store.counts().volumes == len(store._volumes.rows()) < before.volumes
