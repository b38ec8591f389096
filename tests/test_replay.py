"""After a crash the end of the log is loaded as a whole as far as it is plain, and must say the same as if replayed."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from snapshots import assert_same, snapshot
from stores import TINY, abandon_all, killed, new_store, put, reopened

from imgfs.store import ROOT, Store

SETTINGS = replace(TINY, volume_bytes_max=1 << 20, checkpoint_needles=1000)
LAST: dict[str, Callable[[Store, int, int], object]] = {
    "nothing": lambda store, album, old: None,
    "the same again": lambda store, album, old: put(store, album, b"new 2", b"again"),
    "unlink": lambda store, album, old: store.unlink(album, b"old"),
    "rename": lambda store, album, old: store.rename(album, b"new 2", ROOT, b"moved"),
    "utimens": lambda store, album, old: store.set_attr(album, mtime_ns=5),
    "link": lambda store, album, old: store.link(old, ROOT, b"further"),
    "xattr": lambda store, album, old: store.set_xattr(old, b"user.a", b"b"),
    "exchange": lambda store, album, old: store.exchange(album, b"new 0", album, b"new 2"),
}


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


@pytest.mark.parametrize("after", range(2))
@pytest.mark.parametrize("last", LAST)
def test_plain_puts_then_one_that_is_not(last: str, after: int) -> None:
    store = new_store(SETTINGS)
    album = store.mkdir(ROOT, b"album", 0o755, 1, 2)
    old = put(store, album, b"old")
    store = reopened(store)
    for number in range(5):
        put(store, (album, ROOT)[number % 2], b"new %d" % number)
    inside = store.mkdir(album, b"inside", 0o700, 3, 4)
    store.symlink(inside, b"link", b"target", 5, 6)
    put(store, inside, b"deep")
    LAST[last](store, album, old)
    for number in range(after):
        put(store, album, b"after %d" % number)
    seen = snapshot(store)
    again = killed(store)
    assert_same(snapshot(again), seen, "after the kill")
    again.unlink(inside, b"deep")
    seen = snapshot(again)
    assert_same(snapshot(reopened(again)), seen, "after a clean stop")


def test_a_slot_that_was_used_before_is_not_taken_for_a_new_one() -> None:
    store = new_store(replace(SETTINGS, rest_slots=0))
    album = store.mkdir(ROOT, b"album", 0o755, 1, 2)
    for number in range(4):
        put(store, album, b"%d" % number)
    store.unlink(album, b"1")
    store = reopened(store)
    for number in range(4, 8):
        put(store, album, b"%d" % number)
    seen = snapshot(store)
    assert_same(snapshot(killed(store)), seen, "after the kill")


def test_what_lies_in_a_directory_that_was_removed_and_made_again() -> None:
    store = new_store(replace(SETTINGS, rest_slots=0))
    store.mkdir(ROOT, b"gone", 0o755, 1, 2)
    store.rmdir(ROOT, b"gone")
    store = reopened(store)
    back = store.mkdir(ROOT, b"back", 0o755, 1, 2)
    put(store, back, b"image")
    put(store, ROOT, b"image")
    seen = snapshot(store)
    assert_same(snapshot(killed(store)), seen, "after the kill")
