"""Many entries at a time are what one by one are, byte for byte; where they might not be, nobody takes them so."""

import dataclasses
import stat
from random import Random

import pytest
from hostile import NAMES
from listings import LARGE, entries, filled, last_position, listed, names_of, of_everything, taken
from stores import disk_of, new_store, open_store, put, reopened

from imgfs import replies
from imgfs.acts import Acts
from imgfs.errors import Damaged, NotADirectory, Stale
from imgfs.format import slot_of
from imgfs.layout import Word
from imgfs.listing import CHILDREN_MIN, Page
from imgfs.store import ROOT

ANSWER_BYTES = 4096


pytestmark = pytest.mark.usefixtures("no_store_stays_open")


@pytest.fixture
def acts() -> Acts:
    return of_everything()


def page_of(acts: Acts, position: int, size: int = ANSWER_BYTES, *, bare: bool = False) -> bytes | None:
    page = acts.page(ROOT, position, size // replies.LISTED_BYTES_MIN)
    if page is None:
        return None
    times = acts._store.access_times
    dots = replies.listing(1, acts.dots(ROOT, position), times, acts.manner.timeout_s, size)[1]
    atimes_ns = times.get_many(page.inodes, page.mtimes_ns)
    entries = replies.entries(page, atimes_ns, acts.manner.timeout_s, bare=bare)
    return b"".join(entries.answer(1, dots, 0, size)[1:])


def one_by_one(acts: Acts, position: int, size: int = ANSWER_BYTES, *, bare: bool = False) -> bytes:
    times = acts._store.access_times
    listing = acts.listing(ROOT, position)
    return b"".join(replies.listing(1, listing, times, acts.manner.timeout_s, size, bare=bare)[1:])


# -- the same -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("size", "answers_min"), [(500, 100), (ANSWER_BYTES, 20), (1 << 20, 1)])
def test_an_answer_has_the_bytes_it_had_one_by_one(acts: Acts, size: int, answers_min: int, bare: bool) -> None:
    position, answers = 0, 0
    while True:
        answer, expected = page_of(acts, position, size, bare=bare), one_by_one(acts, position, size, bare=bare)
        assert answer is not None
        assert expected.startswith(answer)
        if not expected:
            break
        assert answer
        position = last_position(answer)
        answers += 1
    assert position == last_position(one_by_one(acts, 0, 1 << 30))
    assert answers >= answers_min


def test_names_alone_are_all_that_is_said_of_what_is_no_directory(acts: Acts) -> None:
    whole, bare = (listed(one_by_one(acts, 0, 1 << 30, bare=bare)) for bare in (False, True))
    assert len(whole) > 400
    types = set()
    for (fields, name), (bare_fields, bare_name) in zip(whole, bare, strict=True):
        assert (fields[-4:], name) == (bare_fields[-4:], bare_name), "number, position, length and type"
        kind = stat.S_IFMT(fields[-1] << 12)
        assert bare_fields[:-4] == (fields[:-4] if stat.S_ISDIR(kind) else (0,) * (len(fields) - 4))
        types.add(kind)
    assert types == {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFBLK}


def test_from_any_position_the_next_come(acts: Acts) -> None:
    store = acts._store
    listed = list(store.list(ROOT))
    random = Random(6)
    for after in [0, 1, *(random.randrange(1 << 56) for _ in range(100)), listed[-1].key, (1 << 56) - 1]:
        page = store.page(ROOT, after, 20)
        assert page is not None
        expected = [entry for entry in listed if entry.key > after]
        assert page.keys.tolist() == [entry.key for entry in expected[: len(page.keys)]]
        assert len(page.keys) or not expected


@pytest.mark.parametrize("children", [CHILDREN_MIN, CHILDREN_MIN + 1, 16, 63, 64, 65, 1000])
def test_directories_of_each_size(children: int) -> None:
    store = new_store(LARGE)
    for number in range(children):
        put(store, ROOT, b"%d" % number)
    assert entries(store) == list(store.list(ROOT))
    for number in range(children - CHILDREN_MIN):
        store.unlink(ROOT, b"%d" % number)
    assert entries(store) == list(store.list(ROOT))


def test_what_stays_comes_once_whatever_is_added_and_removed() -> None:
    store = new_store(LARGE)
    stay = {b"stays %d" % number for number in range(300)}
    for name in stay:
        put(store, ROOT, name)
    for number in range(300):
        put(store, ROOT, b"goes %d" % number)
    found: list[bytes] = []
    after = 0
    for number in range(300):
        page = store.page(ROOT, after, 5)
        assert page is not None
        if not len(page.keys):
            break
        after = int(page.keys[-1])
        found += names_of(page)
        store.unlink(ROOT, b"goes %d" % number)
        for more in range(5):
            put(store, ROOT, b"comes %d %d" % (number, more))
    else:
        pytest.fail("the listing does not end")
    assert len(found) == len(set(found))
    assert stay <= set(found)


def test_a_store_that_is_only_read_has_names_that_no_file_has() -> None:
    """What the index files lack, a read-only mount keeps in memory."""
    store = new_store(dataclasses.replace(LARGE, checkpoint_needles=40))
    for number in range(100):
        put(store, ROOT, b"%d" % number)
    disk = disk_of(store).after_kill()
    path = next(path for path in disk.paths() if path.endswith(NAMES.rpartition("/")[2]))
    disk.set_content(path, disk.content(path)[:-60])
    reader = open_store(disk, writable=False)
    assert reader._volumes.get(0).names._tail
    assert entries(reader) == list(reader.list(ROOT))
    assert len(entries(reader)) == 100


# -- what is left to who looks at each -----------------------------------------------------------------------------


def test_what_is_being_written_is_looked_at() -> None:
    store = filled()
    assert taken(store) is not None
    _, handle = store.create_image(ROOT, b"new", 0o644, 1, 2)
    assert taken(store) is None
    store.write(handle, 0, b"data")
    store.flush(handle)
    store.release(handle)
    assert taken(store) is not None
    handle = store.open_image(store.lookup(ROOT, b"7"), write=True)
    store.write(handle, 0, b"other")
    assert taken(store) is None


def test_hard_links_are_looked_at() -> None:
    store = filled()
    below = store.mkdir(ROOT, b"below", 0o755, 0, 0)
    store.link(store.lookup(ROOT, b"7"), below, b"another")
    assert taken(store) is None
    store.unlink(below, b"another")
    store.link(store.lookup(ROOT, b"7"), ROOT, b"another")
    store.unlink(ROOT, b"7")
    assert taken(store) is None


def test_a_table_that_changes_meanwhile_does_not_count() -> None:
    store = filled()
    with store._memory.lock():
        store._memory.begin()
        assert store._listing.page(slot_of(ROOT), 0, 1000) is None
        store._memory.end(None)
    assert taken(store) is not None


def test_a_change_between_reading_and_the_end_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    entries_of, tries = store._listing._entries, 0

    def changing(*args: int) -> object:
        nonlocal tries
        tries += 1
        found = entries_of(*args)
        if tries < 3:
            put(store, ROOT, b"more %d" % tries)
        return found

    monkeypatch.setattr(store._listing, "_entries", changing)
    page = taken(store)
    assert page is not None
    assert (tries, len(page.keys)) == (3, 42)


def test_a_directory_that_is_emptied_meanwhile_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(CHILDREN_MIN)
    buckets = store._table.buckets
    children_of = buckets.children

    def emptied(directory: int) -> int:
        monkeypatch.undo()
        before = children_of(directory)
        for name in [entry.name for entry in store.list(ROOT)]:
            store.unlink(ROOT, name)
        return before

    monkeypatch.setattr(buckets, "children", emptied)
    assert taken(store) is None
    assert not list(store.list(ROOT))


@pytest.mark.parametrize("lie", [b"\x01/", b"\x01\0", b"\x01.", b"\x00x", b"\xff5"])
def test_a_name_that_is_none_is_looked_at(lie: bytes) -> None:
    store = filled()
    disk = disk_of(store)
    store = reopened(store)
    path = next(path for path in disk.paths() if path.endswith(".names"))
    names = disk.content(path)
    at = names.rindex(b"\x015")
    disk.set_content(path, names[:at] + lie + names[at + 2 :])
    assert taken(store) is None
    if lie[0] <= 1:
        with pytest.raises(Damaged):
            list(store.list(ROOT))


@pytest.mark.parametrize("left_bytes", [0, 16, 50, -1])
def test_names_that_are_cut_are_looked_at(left_bytes: int) -> None:
    store = filled()
    disk = disk_of(store)
    path = next(path for path in disk.paths() if path.endswith(".names"))
    disk.set_content(path, disk.content(path)[:left_bytes])
    assert taken(store) is None
    with pytest.raises(Damaged):
        list(store.list(ROOT))


def test_no_directory() -> None:
    store = filled()
    with pytest.raises(NotADirectory):
        store.page(store.lookup(ROOT, b"1"), 0, 10)
    gone = store.mkdir(ROOT, b"gone", 0o755, 0, 0)
    held = store.lookup(ROOT, b"gone")
    store.rmdir(ROOT, b"gone")
    assert store.page(gone, 0, 10) is None
    with pytest.raises(Stale):
        store.page(held + (1 << 32), 0, 10)


def test_few_children_are_looked_at() -> None:
    assert taken(filled(CHILDREN_MIN - 1)) is None


def test_the_slot_of_a_directory_may_be_anothers_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    directory = store.mkdir(ROOT, b"directory", 0o755, 0, 0)
    for number in range(CHILDREN_MIN):
        put(store, directory, b"%d" % number)
    page = store._listing.page

    def removed(slot: int, after: int, count: int, *, nowait: bool = False) -> Page | None:
        assert slot == slot_of(directory)
        for number in range(CHILDREN_MIN):
            store.unlink(directory, b"%d" % number)
        store.rmdir(ROOT, b"directory")
        while store._memory.words[Word.SLOTS] and not store._table.record(slot_of(directory)).generation:
            put(store, ROOT, b"again")
            store.unlink(ROOT, b"again")
        return page(slot, after, count, nowait=nowait)

    monkeypatch.setattr(store._listing, "page", removed)
    with pytest.raises(Stale):
        store.page(directory, 0, 10)
