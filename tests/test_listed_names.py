"""The names of a listing are read once for many entries, kept while it goes on, and are those of no other images."""

import errno
import threading
from collections.abc import Sequence

import pytest
from compacted import compact
from listings import LARGE, entries, filled, of_everything, taken
from stores import TINY, disk_of, new_store, put, write_image

from imgfs.disk import Buffer, WouldBlock
from imgfs.errors import DiskFailure, Stale
from imgfs.index import Names, index_paths
from imgfs.layout import Word
from imgfs.listing import _Stretch
from imgfs.store import ROOT, Store
from imgfs.volumes import OpenVolume

DEADLINE_S = 60


pytestmark = pytest.mark.usefixtures("no_store_stays_open")


class Reads:
    """What is read of `.names`."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        names = store._volumes.get(0).names
        self.sizes: list[int] = []
        read = names.stretch

        def counted(offset: int, size: int, *, nowait: bool = False) -> bytes:
            self.sizes.append(size)
            if nowait:
                raise WouldBlock
            return read(offset, size)

        monkeypatch.setattr(names, "stretch", counted)


def test_names_are_read_once_and_forgotten_when_the_listing_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(LARGE)
    for number in range(3000):
        put(store, ROOT, b"%0200d" % number)
    reads = Reads(store, monkeypatch)
    assert len(entries(store)) == 3000
    assert reads.sizes == [store._memory.words[Word.NAMES_END]]
    assert not store.forget_listings()  # of what was listed since the last time, nothing
    store.page(ROOT, 0, 10)
    assert len(reads.sizes) == 1
    assert not store.forget_listings()
    assert store.forget_listings()
    assert not store.forget_listings()  # there is nothing
    store.page(ROOT, 0, 10)
    assert len(reads.sizes) == 2


def test_many_who_wait_for_the_same_names_read_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    names = store._volumes.get(0).names
    read, reads, began, go_on = names.stretch, 0, threading.Event(), threading.Event()

    def slow(offset: int, size: int, *, nowait: bool = False) -> bytes:
        nonlocal reads
        reads += 1
        began.set()
        assert go_on.wait(DEADLINE_S)
        return read(offset, size, nowait=nowait)

    monkeypatch.setattr(names, "stretch", slow)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(entries(store)))) for _ in range(4)]
    threads[0].start()
    assert began.wait(DEADLINE_S)
    kept_of, looked = store._listing._kept, threading.Semaphore(0)

    def looks(names: Names, first: int, last: int) -> _Stretch | None:
        kept = kept_of(names, first, last)
        looked.release()
        return kept

    monkeypatch.setattr(store._listing, "_kept", looks)
    for thread in threads[1:]:
        thread.start()
        assert looked.acquire(timeout=DEADLINE_S)
    go_on.set()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert found == [40] * 4
    assert reads == 1


def test_who_must_not_wait_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    Reads(store, monkeypatch)
    with pytest.raises(WouldBlock):
        store.page(ROOT, 0, 10, nowait=True)


def test_names_that_came_since_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    assert len(entries(store)) == 40
    write_image(store, ROOT, b"one more")
    assert b"one more" in {name for *_, name in entries(store)}
    assert entries(store) == list(store.list(ROOT))


def test_a_name_whose_append_failed_is_not_that_of_what_comes_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    disk = disk_of(store)
    write = disk.write

    def fail_behind_the_name(file: int, offset: int, buffers: Sequence[Buffer]) -> None:
        write(file, offset, buffers)
        if bytes(buffers[0]) == b"\x05wrong":
            assert len(entries(store)) == 40
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "write", fail_behind_the_name)
    with pytest.raises(DiskFailure):
        put(store, ROOT, b"wrong")
    put(store, ROOT, b"right")
    assert entries(store) == list(store.list(ROOT))
    assert b"right" in {name for *_, name in entries(store)}


def test_names_far_from_each_other_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(LARGE)
    directory = store.mkdir(ROOT, b"directory", 0o755, 0, 0)
    for number in range(40):
        put(store, directory, b"%d" % number)
        for other in range(20):
            put(store, ROOT, b"%0250d" % (20 * number + other))
    reads = Reads(store, monkeypatch)
    assert entries(store, directory) == list(store.list(directory))
    assert not reads.sizes
    assert len(entries(store)) == 801
    assert reads.sizes


def test_of_many_volumes_no_more_names_are_kept_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    store = of_everything()._store
    monkeypatch.setattr("imgfs.listing._STRETCHES_BYTES_MAX", 15_000)
    listed = [(entry.key, entry.inode, entry.name) for entry in store.list(ROOT)]
    assert entries(store) == listed
    kept = [len(stretch.content) for stretch in store._listing._stretches.values()]
    assert len(store._volumes.rows()) > len(kept) > 0
    assert sum(kept) <= 15_000


def test_a_volume_that_is_gone_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compaction has moved the needles, and removed the volume, between table and names."""
    store = filled()

    def stale(row: int) -> None:
        raise Stale("the volume is removed")

    monkeypatch.setattr(store._volumes, "get", stale)
    assert taken(store) is None


@pytest.mark.parametrize("cut", [False, True])
def test_the_row_of_a_volume_may_be_anothers_meanwhile(monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    """It was compacted between table and names, and the store went on in its row."""
    store = new_store()
    directory = store.mkdir(ROOT, b"directory", 0o755, 0, 0)
    for number in range(40):
        put(store, directory, b"%02d" % number)
    put(store, ROOT, b"fills", bytes(TINY.volume_bytes_max - 20_000))
    put(store, ROOT, b"in the next", bytes(30_000))
    before = entries(store, directory)
    store.forget_listings()
    store.forget_listings()
    get = store._volumes.get

    def compacted(row: int) -> OpenVolume:
        monkeypatch.setattr(store._volumes, "get", get)
        assert store._volumes.rows(sealed=True) == [row]
        compact(store, [row])
        while store._memory.words[Word.ACTIVE] != row:
            put(store, ROOT, b"fills", bytes(30_000))
        for number in range(100):
            put(store, ROOT, b"of others %d" % number, b"")
        assert store._memory.words[Word.ACTIVE] == row
        if cut:  # they are read one by one, and none is found
            monkeypatch.setattr("imgfs.listing._STRETCHES_BYTES_MAX", 0)
            disk_of(store).set_content(index_paths(get(row).volume.path).names, b"")
        return get(row)

    monkeypatch.setattr(store._volumes, "get", compacted)
    assert store.page(directory, 0, 100) is None
    monkeypatch.undo()
    assert entries(store, directory) == before == list(store.list(directory))
