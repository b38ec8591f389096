"""What takes something away, before and after the volumes that hold it, or its end, are compacted: it stays away."""

import itertools
from collections.abc import Callable, Iterator

import pytest
from compacted import assert_sound, assert_tidy, compact, rows_of
from crash_model import Clock
from snapshots import assert_same, snapshot
from stores import abandon_all, killed, new_store, put, rebuilt, reopened

from imgfs.layout import Word
from imgfs.store import ROOT, Store

SECOND_NS = 10**9
OLD, NEW = b"old" * 1000, b"new" * 1100


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


def unlink(store: Store) -> None:
    store.unlink(ROOT, b"a")


def unlink_with_attributes(store: Store) -> None:
    store.unlink(ROOT, b"attributed")


def unlink_both_names(store: Store) -> None:
    store.unlink(ROOT, b"linked")
    store.unlink(ROOT, b"link")


def unlink_the_own_name(store: Store) -> None:
    store.unlink(ROOT, b"linked")


def unlink_a_link(store: Store) -> None:
    store.unlink(ROOT, b"link")


def unlink_and_make_again(store: Store) -> None:
    store.unlink(ROOT, b"a")
    put(store, ROOT, b"a", NEW)


def overwrite(store: Store) -> None:
    put(store, ROOT, b"a", NEW)


def overwrite_a_link(store: Store) -> None:
    put(store, ROOT, b"link", NEW)


def rename(store: Store) -> None:
    store.rename(ROOT, b"a", store.resolve(b"d"), b"moved")


def rename_over(store: Store) -> None:
    store.rename(ROOT, b"a", ROOT, b"b")


def rename_over_a_link(store: Store) -> None:
    store.rename(ROOT, b"a", ROOT, b"link")


def rename_away_and_back(store: Store) -> None:
    store.rename(ROOT, b"a", ROOT, b"there")
    store.rename(ROOT, b"there", ROOT, b"a")


def exchange(store: Store) -> None:
    store.exchange(ROOT, b"a", ROOT, b"linked")


def remove_attributes(store: Store) -> None:
    store.remove_xattr(store.resolve(b"attributed"), b"user.a")


def remove_directory(store: Store) -> None:
    store.unlink(store.resolve(b"d"), b"in it")
    store.rmdir(ROOT, b"d")


def rename_a_directory_over_another(store: Store) -> None:
    store.rename(ROOT, b"d", ROOT, b"empty")


def change_the_mode(store: Store) -> None:
    store.set_attr(store.resolve(b"a"), mode=0o600, mtime_ns=77)
    store.set_attr(store.resolve(b"d"), mode=0o700)


CHANGES = (
    unlink,
    unlink_with_attributes,
    unlink_both_names,
    unlink_the_own_name,
    unlink_a_link,
    unlink_and_make_again,
    overwrite,
    overwrite_a_link,
    rename,
    rename_over,
    rename_over_a_link,
    rename_away_and_back,
    exchange,
    remove_attributes,
    remove_directory,
    rename_a_directory_over_another,
    change_the_mode,
)
# What is compacted, in this order, and when the change comes: the volume it undoes, the one it lies in, or all at once.
ORDERS = (
    ("put", "change"),
    ("change", "put"),
    ("change", "needle"),
    ("change", "put", "needle"),
    ("change", "needle", "put"),
    ("change", "all"),
    ("put", "change", "put", "needle"),
    ("put", "change", "needle", "put", "all"),
)


class Volumes:
    """A store of which each part is in a volume of its own, and which of them is where by now."""

    def __init__(self) -> None:
        self.store = new_store()
        self._filler = 0
        self._ids: dict[str, int] = {}
        store = self.store
        for name in (b"a", b"b", b"linked", b"attributed"):
            put(store, ROOT, name, OLD)
        store.set_xattr(store.resolve(b"attributed"), b"user.a", b"value" * 50)
        store.link(store.resolve(b"linked"), ROOT, b"link")
        put(store, store.mkdir(ROOT, b"d", 0o755, 1, 1), b"in it", OLD)
        store.mkdir(ROOT, b"empty", 0o755, 1, 1)
        self._seal("put")
        self._seal("between")

    def _active(self) -> int:
        return self.store._table.volume(self.store._memory.words[Word.ACTIVE]).volume_id

    def _seal(self, what: str) -> None:
        """Fill the active volume up, and remember it as *what*."""
        self._ids[what] = active = self._active()
        while self._active() == active:
            self._filler += 1
            put(self.store, ROOT, b"filler%d" % self._filler, bytes(20_000))
            if self._filler % 2:
                self.store.unlink(ROOT, b"filler%d" % self._filler)

    def change(self, change: Callable[[Store], None]) -> None:
        change(self.store)
        self._seal("needle")
        self._seal("after")

    def compact(self, what: str) -> None:
        rows = rows_of(self.store)
        names = ["put", "between", "needle"] if what == "all" else [what]
        row = compact(self.store, [rows[volume_id] for volume_id in dict.fromkeys(map(self._ids.__getitem__, names))])
        for name in names:
            self._ids[name] = self.store._table.volume(row).volume_id


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_gone_stays_away(change: Callable[[Store], None]) -> None:
    again = itertools.cycle([killed, rebuilt, reopened, lambda store: store])
    for order in ORDERS:
        volumes = Volumes()
        for step in order:
            where = f"{step} of {order}"
            if step == "change":
                volumes.change(change)
                wanted = snapshot(volumes.store)
            else:
                wanted = snapshot(volumes.store)
                volumes.compact(step)
            volumes.store = next(again)(volumes.store)
            assert_same(snapshot(volumes.store), wanted, f"{where}, opened again")
        volumes.store = rebuilt(volumes.store)
        assert_same(snapshot(volumes.store), wanted, f"{order}, from the volumes alone")
        assert_tidy(volumes.store)
        assert_sound(volumes.store)
        abandon_all()


def test_since_when_there_are_no_attributes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the needle that says so knows the time, and no older one is left that it would have to undo."""
    clock = Clock(monkeypatch)
    volumes = Volumes()
    clock.now_ns += 5 * SECOND_NS
    changed_ns = clock.now_ns
    volumes.change(remove_attributes)
    clock.now_ns += 5 * SECOND_NS
    wanted = snapshot(volumes.store)
    for _ in range(2):
        volumes.compact("all")
        volumes.store = rebuilt(volumes.store)
        assert_same(snapshot(volumes.store), wanted, "compacted, and from the volumes alone")
    inode = volumes.store.resolve(b"attributed")
    assert volumes.store.list_xattrs(inode) == []
    assert volumes.store.attr(inode).ctime_ns // SECOND_NS == changed_ns // SECOND_NS
