"""What may be done to names, inodes and attributes of a store."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from stores import (
    TINY,
    abandon,
    abandon_all,
    content,
    disk_of,
    killed,
    names,
    new_store,
    open_store,
    put,
    read_all,
    reopened,
    tree,
    write_image,
)

from imgfs.errors import (
    Exists,
    ImgfsError,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NotADirectory,
    NotEmpty,
    NotFound,
    Stale,
)
from imgfs.format import Kind
from imgfs.store import ROOT, Store


@pytest.fixture
def store() -> Store:
    return new_store()


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


# -- names --------------------------------------------------------------------------------------------------------


def test_an_empty_store(store: Store) -> None:
    attr = store.attr(ROOT)
    assert (attr.kind, attr.mode, attr.nlink) == (Kind.DIRECTORY, 0o755, 2)
    assert tree(store) == {}
    assert store.parent(ROOT) == ROOT
    assert (store.counts().images, store.counts().directories, store.space().images) == (0, 1, 1)


@pytest.mark.parametrize("name", [b"n" * 255, b"\xff\x01 \n", "é".encode() * 127, b"...", b"-"])
def test_a_name_is_any_255_bytes(store: Store, name: bytes) -> None:
    inode = put(store, ROOT, name)
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    store.rename(ROOT, name, directory, name)
    assert store.lookup(directory, name) == inode
    store = killed(store)
    assert store.resolve(b"d/" + name) == inode
    assert store.name(inode) == name
    store.close()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (b"n" * 256, NameTooLong),
        (b"", InvalidArgument),
        (b".", InvalidArgument),
        (b"..", InvalidArgument),
        (b"a/b", InvalidArgument),
        (b"a\0b", InvalidArgument),
    ],
)
def test_other_names_are_refused_everywhere(store: Store, name: bytes, error: type[ImgfsError]) -> None:
    put(store, ROOT, b"a")
    calls: list[Callable[[], object]] = [
        lambda: store.lookup(ROOT, name),
        lambda: store.mkdir(ROOT, name, 0, 0, 0),
        lambda: store.symlink(ROOT, name, b"x", 0, 0),
        lambda: put(store, ROOT, name),
        lambda: store.create_image(ROOT, name, 0, 0, 0),
        lambda: store.unlink(ROOT, name),
        lambda: store.rmdir(ROOT, name),
        lambda: store.rename(ROOT, b"a", ROOT, name),
        lambda: store.rename(ROOT, name, ROOT, b"b"),
    ]
    for call in calls:
        with pytest.raises(error):
            call()
    assert names(store) == {b"a"}


def test_a_taken_name_is_refused(store: Store) -> None:
    for make in (
        lambda name: store.mkdir(ROOT, name, 0, 0, 0),
        lambda name: store.symlink(ROOT, name, b"x", 0, 0),
        lambda name: store.create_image(ROOT, name, 0, 0, 0),
    ):
        for number, taken in enumerate((put(store, ROOT, b"file"), store.lookup(ROOT, b"file"))):
            with pytest.raises(Exists):
                make(b"file")
            assert store.lookup(ROOT, b"file") == taken, number
    store.mkdir(ROOT, b"d", 0, 0, 0)
    with pytest.raises(IsADirectory):
        put(store, ROOT, b"d")


def test_names_are_looked_up_in_directories(store: Store) -> None:
    image, link = put(store, ROOT, b"a"), store.symlink(ROOT, b"l", b"target", 5, 6)
    for inode in (image, link):
        with pytest.raises(NotADirectory):
            store.lookup(inode, b"x")
        with pytest.raises(NotADirectory):
            list(store.list(inode))
        with pytest.raises(NotADirectory):
            put(store, inode, b"x")
    with pytest.raises(NotFound):
        store.lookup(ROOT, b"x")
    assert store.readlink(link) == b"target"
    assert (store.attr(link).kind, store.attr(link).mode, store.attr(link).size) == (Kind.SYMLINK, 0o777, 6)
    with pytest.raises(InvalidArgument):
        store.readlink(image)
    with pytest.raises(NameTooLong):
        store.symlink(ROOT, b"long", b"x" * 4096, 0, 0)
    assert store.readlink(store.symlink(ROOT, b"long", b"x" * 4095, 0, 0)) == b"x" * 4095


def test_unlink_and_rmdir_tell_what_they_take(store: Store) -> None:
    directory = store.mkdir(ROOT, b"d", 0o700, 0, 0)
    put(store, directory, b"a")
    with pytest.raises(IsADirectory):
        store.unlink(ROOT, b"d")
    with pytest.raises(NotEmpty):
        store.rmdir(ROOT, b"d")
    with pytest.raises(NotADirectory):
        store.rmdir(directory, b"a")
    store.unlink(directory, b"a")
    with pytest.raises(NotFound):
        store.unlink(directory, b"a")
    store.rmdir(ROOT, b"d")
    assert tree(store) == {}
    assert store.attr(directory).nlink == 0
    assert list(store.list(directory)) == []
    for call in (
        lambda: put(store, directory, b"a"),
        lambda: store.mkdir(directory, b"a", 0, 0, 0),
        lambda: store.create_image(directory, b"a", 0, 0, 0),
        lambda: store.rename(ROOT, b"b", directory, b"b"),
    ):
        put(store, ROOT, b"b")
        with pytest.raises(NotFound, match="directory was removed"):
            call()


# -- rename -------------------------------------------------------------------------------------------------------

THINGS = ("image", "unborn", "link", "empty", "full")  # what is renamed, and what has the new name
DIRECTORIES = ("empty", "full")


def thing(store: Store, parent: int, name: bytes, what: str) -> tuple[int, bytes]:
    """Make one of THINGS; return its inode, and what an image holds."""
    if what == "image":
        return put(store, parent, name, name), name
    if what == "unborn":
        inode, handle = store.create_image(parent, name, 0o600, 0, 0)
        store.write(handle, 0, name * 2)
        return inode, name * 2
    if what == "link":
        return store.symlink(parent, name, name, 0, 0), name
    inode = store.mkdir(parent, name, 0o755, 0, 0)
    if what == "full":
        put(store, inode, b"in " + name)
    return inode, b""


@pytest.mark.parametrize("across", [False, True], ids=["within", "across"])
@pytest.mark.parametrize("target", [None, *THINGS])
@pytest.mark.parametrize("source", THINGS)
def test_rename(store: Store, source: str, target: str | None, across: bool) -> None:
    new_parent = store.mkdir(ROOT, b"other", 0o755, 0, 0) if across else ROOT
    inode, data = thing(store, ROOT, b"old", source)
    there = thing(store, new_parent, b"new", target)[0] if target else 0
    before = tree(store)
    error: type[ImgfsError] | None = None
    if target:
        with pytest.raises(Exists):
            store.rename(ROOT, b"old", new_parent, b"new", replace=False)
        if source in DIRECTORIES:
            error = {"empty": None, "full": NotEmpty}.get(target, NotADirectory)
        elif target in DIRECTORIES:
            error = IsADirectory
    if error:
        with pytest.raises(error):
            store.rename(ROOT, b"old", new_parent, b"new")
        assert tree(store) == before
        return
    store.rename(ROOT, b"old", new_parent, b"new")
    after = tree(store)
    moved = after[b"/other/new" if across else b"/new"]
    assert moved == before[b"/old"]
    assert (moved.inode, moved.data) == (inode, data)
    assert b"/old" not in after
    assert len(after) == len(before) - bool(target)
    if there:
        assert store.attr(there).nlink == 0
    store = killed(store)
    assert tree(store) == after
    assert tree(store := reopened(store)) == after
    abandon(store)


def test_renaming_to_itself_changes_nothing(store: Store) -> None:
    inode = put(store, ROOT, b"a")
    steps = disk_of(store).steps
    store.rename(ROOT, b"a", ROOT, b"a")
    assert store.lookup(ROOT, b"a") == inode
    assert disk_of(store).steps == steps


def test_no_directory_can_be_moved_into_itself(store: Store) -> None:
    one = store.mkdir(ROOT, b"1", 0o755, 0, 0)
    two = store.mkdir(one, b"2", 0o755, 0, 0)
    for parent in (one, two):
        with pytest.raises(InvalidArgument):
            store.rename(ROOT, b"1", parent, b"x")
    with pytest.raises(NotEmpty):
        store.rename(one, b"2", ROOT, b"1")
    put(store, ROOT, b"a")
    with pytest.raises(NotADirectory):
        store.rename(ROOT, b"a", store.lookup(ROOT, b"a"), b"x")
    with pytest.raises(NotFound):
        store.rename(ROOT, b"gone", ROOT, b"x")
    store.rename(one, b"2", ROOT, b"2")
    assert store.attr(one).nlink == 2
    store.rename(ROOT, b"1", two, b"1")
    assert store.resolve(b"2/1") == one


def test_renaming_writes_no_data(store: Store) -> None:
    put(store, ROOT, b"a", b"x" * 40_000)
    written = sum(row.volume_bytes for row in [store.counts()])
    store.rename(ROOT, b"a", ROOT, b"b")
    assert store.counts().volume_bytes - written < 300


def test_an_image_being_written_follows_its_name(store: Store) -> None:
    inode = put(store, ROOT, b"a", b"old")
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    handle = store.open_image(inode, write=True)
    store.write(handle, 3, b" and new")
    store.rename(ROOT, b"a", directory, b"b")
    store.write(handle, 11, b"er")
    store.flush(handle)
    store = killed(store)
    assert {path: found.data for path, found in tree(store).items()} == {b"/d": b"", b"/d/b": b"old and newer"}
    store.close()


# -- inodes -------------------------------------------------------------------------------------------------------


def test_a_slot_comes_back_after_its_rest_with_another_generation(store: Store) -> None:
    old = put(store, ROOT, b"old")
    store.unlink(ROOT, b"old")
    assert store.attr(old).nlink == 0, "it rests, and can be opened still"
    assert content(store, old) == b"data"
    for number in range(TINY.rest_slots):
        put(store, ROOT, b"%d" % number)
        store.unlink(ROOT, b"%d" % number)
    new = put(store, ROOT, b"new", b"other")
    assert new == old + (1 << 32)
    stale: list[Callable[[], object]] = [
        lambda: store.attr(old),
        lambda: store.open_image(old),
        lambda: store.open_image(old, write=True, truncate=True),
        lambda: store.truncate(old, 0),
        lambda: store.set_attr(old, mode=0),
        lambda: store.lookup(old, b"x"),
        lambda: list(store.list(old)),
        lambda: store.readlink(old),
        lambda: store.locate(old),
        lambda: store.parent(old),
        lambda: store.mkdir(old, b"x", 0, 0, 0),
        lambda: store.rename(ROOT, b"new", old, b"x"),
    ]
    for call in stale:
        with pytest.raises(Stale):
            call()
    store.prefetch(old)
    assert content(store, new) == b"other"
    for never in (0, 1 << 40, 999, new + (1 << 32)):
        with pytest.raises(Stale):
            store.attr(never)
    store = killed(store)
    assert store.lookup(ROOT, b"new") == new
    with pytest.raises(Stale):
        store.attr(old)
    abandon(store)


def test_no_slot_comes_back_while_a_handle_is_open() -> None:
    store = new_store(replace(TINY, rest_slots=0))
    old = put(store, ROOT, b"old", b"old")
    handle = store.open_image(old)
    store.unlink(ROOT, b"old")
    inodes = []
    for number in range(5):
        inodes.append(put(store, ROOT, b"%d" % number))
        store.unlink(ROOT, b"%d" % number)
    assert old & 0xFFFFFFFF not in {inode & 0xFFFFFFFF for inode in inodes}
    assert read_all(store, handle) == b"old"
    store.release(handle)
    assert put(store, ROOT, b"new") & 0xFFFFFFFF in {inode & 0xFFFFFFFF for inode in (*inodes, old)}
    store.close()


def test_inodes_survive_everything(store: Store) -> None:
    inode = write_image(store, store.mkdir(ROOT, b"d", 0o755, 0, 0), b"a")
    store = killed(store)
    assert store.resolve(b"d/a") == inode
    put(store, ROOT, b"other")
    store = reopened(store)
    assert store.resolve(b"/d/./a") == inode
    store.close()


# -- attributes ---------------------------------------------------------------------------------------------------


def test_attributes_survive(store: Store) -> None:
    inode = write_image(store, ROOT, b"a", b"x" * 1000)
    directory = store.mkdir(ROOT, b"d", 0o1777, 8, 9)
    before = store.attr(inode)
    assert (before.mode, before.uid, before.gid, before.size, before.blocks) == (0o644, 1, 2, 1000, 2)
    store.set_attr(inode, mode=0o4711)
    store.set_attr(inode, uid=(1 << 32) - 2)
    store.set_attr(inode, gid=77)
    store.set_attr(inode, mtime_ns=1_234_567_890_123_456_789)
    store.set_attr(directory, mtime_ns=-5)
    changed = store.attr(inode)
    assert changed[2:5] == (0o4711, (1 << 32) - 2, 77)
    assert changed.mtime_ns == 1_234_567_890_123_456_789
    assert store.attr(directory)[2:5] == (0o1777, 8, 9)
    for again in (killed, reopened):
        expected = store.attr(inode), store.attr(directory), store.attr(ROOT)
        store = again(store)
        assert (store.attr(inode), store.attr(directory), store.attr(ROOT)) == expected
    store.close()


def test_times_of_directories_survive(store: Store) -> None:
    directories = [store.mkdir(ROOT, b"%d" % number, 0o755, 0, 0) for number in range(4)]
    put(store, directories[0], b"a")
    store.rename(directories[0], b"a", directories[1], b"a")
    store.unlink(directories[1], b"a")
    store.mkdir(directories[2], b"d", 0o755, 0, 0)
    before = [store.attr(inode) for inode in (ROOT, *directories)]
    for again in (killed, reopened, killed, reopened):
        store = again(store)
        assert [store.attr(inode) for inode in (ROOT, *directories)] == before
    store.close()


def test_attributes_set_while_writing_join_the_needle(store: Store) -> None:
    inode, handle = store.create_image(ROOT, b"a", 0o600, 0, 0)
    store.write(handle, 0, b"data")
    steps = disk_of(store).steps
    store.set_attr(inode, mode=0o444, uid=5, gid=6, mtime_ns=42)
    assert disk_of(store).steps == steps
    assert (store.attr(inode).mode, store.attr(inode).mtime_ns) == (0o444, 42)
    records = store._memory.words[17]
    store.flush(handle)
    assert store._memory.words[17] - records <= 2, "a needle, and at most one for its owner"
    store.release(handle)
    store = killed(store)
    attr = store.attr(inode)
    assert (attr.mode, attr.uid, attr.gid, attr.mtime_ns) == (0o444, 5, 6, 42)
    store.close()


def test_attributes_set_between_flush_and_the_next_write_are_kept(store: Store) -> None:
    inode, handle = store.create_image(ROOT, b"a", 0o600, 0, 0)
    store.write(handle, 0, b"data")
    store.flush(handle)
    store.set_attr(inode, mode=0o444, mtime_ns=42)
    assert store.attr(inode).mode == 0o444
    store.write(handle, 4, b"!")
    store.release(handle)
    assert store.attr(inode).mode == 0o444
    assert store.attr(inode).mtime_ns > 42
    store.close()
    store = open_store(disk_of(store))
    assert store.attr(inode).mode == 0o444
    abandon(store)


# -- listing ------------------------------------------------------------------------------------------------------


def test_a_listing_goes_on_from_any_key(store: Store) -> None:
    made = {b"%d" % number: put(store, ROOT, b"%d" % number, b"") for number in range(50)}
    entries = list(store.list(ROOT))
    assert {entry.name: entry.inode for entry in entries} == made
    keys = [entry.key for entry in entries]
    assert keys == sorted(set(keys))
    assert keys[0] > 0
    assert keys[-1] < 1 << 56
    for number, entry in enumerate(entries):
        assert list(store.list(ROOT, entry.key)) == entries[number + 1 :]
        if number % 2:
            store.unlink(ROOT, entry.name)
    assert list(store.list(ROOT)) == entries[::2]


def test_a_listing_sees_images_that_are_being_written(store: Store) -> None:
    inode, _ = store.create_image(ROOT, b"a", 0o644, 0, 0)
    assert [(entry.inode, entry.name) for entry in store.list(ROOT)] == [(inode, b"a")]
    assert store.name(inode) == b"a"
    with pytest.raises(NotFound):
        store.locate(inode)
