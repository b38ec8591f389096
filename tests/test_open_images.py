"""Open images: read, written, truncated, unlinked, replaced, several at once; a flush is the commit point."""

import errno
from collections.abc import Callable, Iterator

import pytest
from stores import (
    PATH,
    abandon,
    abandon_all,
    content,
    disk_of,
    killed,
    killed_content,
    names,
    new_store,
    put,
    read_all,
    reopened,
    staged_files,
    tree,
    write_image,
)

from imgfs.disk import WouldBlock
from imgfs.errors import (
    BadHandle,
    Damaged,
    IsADirectory,
    TooLarge,
)
from imgfs.format import IMAGE_BYTES_MAX
from imgfs.settings import KIB, MIB, Settings
from imgfs.store import ROOT, Store


@pytest.fixture
def store() -> Store:
    return new_store()


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


# -- open images --------------------------------------------------------------------------------------------------


def test_what_was_closed_is_whole_after_a_kill_and_what_was_not_is_as_before(store: Store) -> None:
    write_image(store, ROOT, b"closed", b"whole")
    changed = store.open_image(put(store, ROOT, b"changed", b"old"), write=True)
    store.write(changed, 1, b"!!!!")
    _, born = store.create_image(ROOT, b"born", 0o644, 0, 0)
    store.write(born, 0, b"x")
    assert names(store) == {b"closed", b"changed", b"born"}
    store = killed(store)
    assert {path: found.data for path, found in tree(store).items()} == {b"/closed": b"whole", b"/changed": b"old"}
    store.close()


def test_writing_at_any_offset(store: Store) -> None:
    inode, handle = store.create_image(ROOT, b"a", 0o644, 0, 0)
    store.write(handle, 5, b"56")
    assert read_all(store, handle) == bytes(5) + b"56"
    store.write(handle, 0, b"01")
    store.write(handle, 6, b"678")
    store.flush(handle)
    store.write(handle, 2, b"2")
    assert content(store, inode) == b"012\0\0" + b"5678"
    store.truncate(inode, 4)
    store.truncate(inode, 6)
    store.release(handle)
    assert content(store, inode) == b"012\0\0\0"
    store = killed(store)
    assert content(store, inode) == b"012\0\0\0"
    assert bytes(store.read(handle := store.open_image(inode), 1, 2)) == b"12"
    assert [bytes(store.read(handle, offset, 9)) for offset in (5, 6, 7, 1 << 40)] == [b"\0", b"", b"", b""]
    store.close()


@pytest.mark.parametrize("size", [0, 1, 512 * KIB, MIB, MIB + 1, 4 * MIB, 4 * MIB + 1, 5 * MIB + 123])
def test_images_of_every_size_come_back(size: int) -> None:
    store = new_store(Settings(volume_bytes_max=8 * MIB, headroom_bytes=0))
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    inode = put(store, ROOT, b"a", data)
    copy = write_image(store, ROOT, b"b", data)
    for _ in range(2):
        assert content(store, inode) == content(store, copy) == data
        handle = store.open_image(copy)
        for offset in (0, MIB - 1, 2 * MIB, max(0, size - 3)):
            assert bytes(store.read(handle, offset, MIB)) == data[offset : offset + MIB]
        store.release(handle)
        store = killed(store)
    handle = store.open_image(copy, write=True)
    store.write(handle, size, b"appended")
    store.release(handle)
    assert content(store, copy) == data + b"appended"
    assert store.locate(copy).size == size + 8
    store.close()


def test_several_images_are_written_at_once(store: Store) -> None:
    handles = {name: store.create_image(ROOT, name, 0o644, 0, 0)[1] for name in (b"a", b"b", b"c")}
    for turn in range(10):
        for name, handle in handles.items():
            store.write(handle, turn * 2, name * 2)
    put(store, ROOT, b"d", b"meanwhile")
    store.release(handles.pop(b"b"))
    for name, handle in handles.items():
        store.write(handle, 20, name)
        store.release(handle)
    expected = {b"/a": b"a" * 21, b"/b": b"b" * 20, b"/c": b"c" * 21, b"/d": b"meanwhile"}
    store = killed(store)
    assert {path: found.data for path, found in tree(store).items()} == expected
    assert not any(map(len, staged_files(store)))
    store.close()


def test_nothing_of_the_image_before_is_seen_in_a_file_that_was_kept(store: Store) -> None:
    def staged_anew() -> tuple[int, int]:
        write_image(store, ROOT, b"before", b"x" * 20_000)
        store.unlink(ROOT, b"before")
        assert [kept[:20_000] for kept in staged_files(store)] == [b"x" * 20_000]
        return store.create_image(ROOT, b"after", 0o644, 0, 0)

    def closed(inode: int, handle: int, data: bytes) -> None:
        assert read_all(store, handle) == data
        store.flush(handle)
        store.release(handle)
        assert content(store, inode) == killed_content(store, b"after") == data
        store.unlink(ROOT, b"after")

    inode, handle = staged_anew()
    closed(inode, handle, b"")
    inode, handle = staged_anew()
    store.write(handle, 0, b"short")
    closed(inode, handle, b"short")
    inode, handle = staged_anew()
    store.write(handle, 5000, b"behind a hole")
    closed(inode, handle, bytes(5000) + b"behind a hole")
    inode, handle = staged_anew()
    store.truncate(inode, 30_000)
    closed(inode, handle, bytes(30_000))
    inode, handle = staged_anew()
    store.write(handle, 0, b"cut and extended")
    store.truncate(inode, 3)
    store.truncate(inode, 6)
    closed(inode, handle, b"cut" + bytes(3))
    old = put(store, ROOT, b"after", b"old")
    write_image(store, ROOT, b"before", b"x" * 20_000)
    handle = store.open_image(old, write=True)
    store.write(handle, 10, b"new")
    closed(old, handle, b"old" + bytes(7) + b"new")


def test_two_handles_write_one_image(store: Store) -> None:
    inode = put(store, ROOT, b"a", b"0123456789")
    one, other = store.open_image(inode, write=True), store.open_image(inode, write=True)
    reader = store.open_image(inode)
    store.write(one, 0, b"AB")
    store.write(other, 8, b"YZ")
    assert read_all(store, reader) == b"AB234567YZ"
    store.release(one)
    store.write(other, 4, b"!")
    assert killed_content(store, b"a") == b"AB234567YZ"
    store.release(other)
    assert read_all(store, reader) == b"AB23!567YZ"
    assert not any(map(len, staged_files(store)))


@pytest.mark.parametrize("size", [100, 256 * KIB, 256 * KIB + 1])
def test_a_writer_goes_on_behind_a_flush(store: Store, size: int) -> None:
    inode, handle = store.create_image(ROOT, b"log", 0o644, 0, 0)
    store.write(handle, 0, b"x" * size)
    store.flush(handle)
    assert store.has_staged(handle) == (size > 256 * KIB), "what is little is not expected to be gone on with"
    store.write(handle, size, b"more")
    assert store.has_staged(handle)
    assert killed_content(store, b"log") == b"x" * size
    store.flush(handle)
    assert killed_content(store, b"log") == content(store, inode) == b"x" * size + b"more"
    second = store.open_image(inode, write=True)
    store.write(handle, 0, b"y")
    store.flush(handle)
    assert store.has_staged(second), "with two writers one may still go on"
    store.write(second, 1, b"z")
    store.release(handle)
    store.release(second)
    assert content(store, inode) == b"yz" + b"x" * (size - 2) + b"more"


def test_overwriting_is_copy_on_write(store: Store) -> None:
    inode = put(store, ROOT, b"a", b"old content")
    before = store.locate(inode)
    handle = store.open_image(inode, write=True)
    assert store.stage_bytes(handle) == 11
    assert (store.flush_bytes(handle), staged_files(store)) == (0, [])
    store.write(handle, 0, b"new")
    assert (store.stage_bytes(handle), store.flush_bytes(handle)) == (0, 12)
    assert store.locate(inode) == before
    assert killed_content(store, b"a") == b"old content"
    store.flush(handle)
    assert store.flush_bytes(handle) == 0
    assert store.locate(inode) != before
    assert killed_content(store, b"a") == b"new content"
    store.release(handle)


def test_opening_for_writing_alone_changes_nothing(store: Store) -> None:
    inode = put(store, ROOT, b"a", b"x", mtime_ns=77)
    steps = disk_of(store).steps
    store.release(store.open_image(inode, write=True))
    assert (disk_of(store).steps, store.attr(inode).mtime_ns) == (steps, 77)


def test_truncating_open_keeps_the_old_image_until_it_is_closed(store: Store) -> None:
    inode = put(store, ROOT, b"a", b"old content", mtime_ns=77)
    handle = store.open_image(inode, write=True, truncate=True)
    assert store.attr(inode).size == 0
    assert store.attr(inode).mtime_ns > 77
    assert killed_content(store, b"a") == b"old content"
    store.write(handle, 0, b"new")
    assert killed_content(store, b"a") == b"old content"
    store.release(handle)
    assert content(store, inode) == killed_content(store, b"a") == b"new"
    store.release(store.open_image(inode, write=True, truncate=True))
    assert content(store, inode) == killed_content(store, b"a") == b""


def test_truncating_open_needs_none_of_the_old_bytes(store: Store) -> None:
    inode = put(store, ROOT, b"a", b"old content")
    location = store.locate(inode)
    disk_of(store).flip(f"{PATH}/volumes/{location.volume:08d}.vol", location.data_offset)
    with pytest.raises(Damaged, match=f"volume {location.volume}, offset {location.offset}, inode {inode:#x}"):
        store.open_image(inode)
    with pytest.raises(Damaged):
        store.truncate(inode, 3)
    assert staged_files(store) == [b""]
    handle = store.open_image(inode, write=True, truncate=True)
    store.write(handle, 0, b"new")
    store.release(handle)
    assert content(store, inode) == b"new"


def test_truncating_by_path_is_flushed_at_once(store: Store) -> None:
    inode = put(store, ROOT, b"a", b"0123456789")
    store.truncate(inode, 3)
    assert killed_content(store, b"a") == b"012"
    handle = store.open_image(inode, write=True)
    store.truncate(inode, 1)
    assert killed_content(store, b"a") == b"012"
    store.release(handle)
    assert killed_content(store, b"a") == b"0"
    with pytest.raises(IsADirectory):
        store.truncate(ROOT, 0)
    with pytest.raises(IsADirectory):
        store.open_image(ROOT)
    with pytest.raises(IsADirectory):
        store.open_image(ROOT, write=True, truncate=True)


@pytest.mark.parametrize("write", [False, True])
def test_an_unlinked_image_can_be_read_while_it_is_open(store: Store, write: bool) -> None:
    inode = put(store, ROOT, b"a", b"content")
    handle = store.open_image(inode, write=write)
    if write:
        store.write(handle, 7, b"s")
    store.unlink(ROOT, b"a")
    expected = b"contents" if write else b"content"
    assert store.attr(inode)[5:7] == (0, len(expected))
    assert read_all(store, handle) == expected
    other = store.open_image(inode)
    if write:
        store.write(handle, 8, b"!")
        expected += b"!"
        store.flush(handle)
        store.set_attr(inode, mode=0o123, mtime_ns=5)
    store.release(handle)
    assert read_all(store, other) == expected
    store.release(other)
    assert not any(map(len, staged_files(store)))
    assert tree(store := killed(store)) == {}
    abandon(store)


def test_an_unborn_image_can_be_unlinked_while_it_is_open(store: Store) -> None:
    inode, handle = store.create_image(ROOT, b"a", 0o644, 0, 0)
    store.write(handle, 0, b"x")
    store.unlink(ROOT, b"a")
    assert names(store) == set()
    assert read_all(store, handle) == b"x"
    store.set_attr(inode, mode=0o600, uid=9)
    assert store.attr(inode)[2:4] == (0o600, 9)
    again, _ = store.create_image(ROOT, b"a", 0o644, 0, 0)
    assert again != inode
    store.release(handle)
    assert store.counts().images == 1


def test_attributes_of_an_unlinked_image_can_be_changed(store: Store) -> None:
    inode = put(store, ROOT, b"a")
    handle = store.open_image(inode)
    store.unlink(ROOT, b"a")
    steps = disk_of(store).steps
    store.set_attr(inode, mode=0o111, uid=4711, mtime_ns=3)  # an owner that nothing else has
    attr = store.attr(inode)
    assert (attr.mode, attr.uid, attr.mtime_ns) == (0o111, 4711, 3)
    assert disk_of(store).steps == steps
    assert store._memory.words[1] % 2 == 0
    put(store, ROOT, b"b")
    store.release(handle)


def test_a_replaced_image_can_be_read_while_it_is_open(store: Store) -> None:
    old, new = put(store, ROOT, b"a", b"old"), put(store, ROOT, b"b", b"new")
    handle = store.open_image(old)
    store.rename(ROOT, b"b", ROOT, b"a")
    assert read_all(store, handle) == b"old"
    assert content(store, old) == b"old", "the kernel may open the old inode once more"
    assert content(store, store.lookup(ROOT, b"a")) == content(store, new) == b"new"
    store.release(handle)


@pytest.mark.parametrize("flushed", [False, True])
def test_a_whole_image_is_put_over_one_that_is_being_written(store: Store, flushed: bool) -> None:
    _, handle = store.create_image(ROOT, b"a", 0o644, 0, 0)
    store.write(handle, 0, b"slow")
    if flushed:
        store.flush(handle)
    put(store, ROOT, b"a", b"quick")
    assert content(store, store.lookup(ROOT, b"a")) == b"quick"
    assert killed_content(store, b"a") == b"quick"
    store.release(handle)
    assert names(store) == {b"a"}


def test_a_whole_image_that_cannot_be_put_leaves_the_old_one(store: Store) -> None:
    put(store, ROOT, b"a", b"old")
    with pytest.raises(Damaged, match="7 bytes short"):
        store.put(ROOT, b"a", [b"x" * MIB], MIB + 7, mode=0, uid=0, gid=0, mtime_ns=0)
    with pytest.raises(Damaged, match="too long"):
        store.put(ROOT, b"a", [b"x" * MIB, b"y" * MIB], MIB + 7, mode=0, uid=0, gid=0, mtime_ns=0)

    def failing() -> Iterator[bytes]:
        yield b"x" * MIB
        raise KeyError("the source is gone")

    with pytest.raises(KeyError):
        store.put(ROOT, b"a", failing(), 2 * MIB, mode=0, uid=0, gid=0, mtime_ns=0)
    assert content(store, store.lookup(ROOT, b"a")) == killed_content(store, b"a") == b"old"


def test_handles_are_told_apart_by_a_nonce(store: Store) -> None:
    inode = put(store, ROOT, b"a")
    first = store.open_image(inode)
    store.release(first)
    second = store.open_image(inode)
    assert first & 0xFFFFFFFF == second & 0xFFFFFFFF
    assert first != second
    calls: list[Callable[[int], object]] = [
        store.release,
        store.flush,
        store.fsync,
        store.handle_inode,
        store.flush_bytes,
        store.stage_bytes,
        lambda handle: store.read(handle, 0, 1),
        lambda handle: store.write(handle, 0, b"x"),
    ]
    for call in calls:
        for handle in (first, second + 1, 0xFFFF, 1 << 60, 0xFFFF_FFFF):
            with pytest.raises(BadHandle):
                call(handle)
    assert store.handle_inode(second) == inode
    with pytest.raises(BadHandle, match="not opened for writing"):
        store.write(second, 0, b"x")
    store.flush(second)
    store.fsync(second)


def test_images_end_at_4_gib(store: Store) -> None:
    inode, handle = store.create_image(ROOT, b"a", 0o644, 0, 0)
    for call in (
        lambda: store.write(handle, IMAGE_BYTES_MAX, b"x"),
        lambda: store.write(handle, IMAGE_BYTES_MAX - 1, b"xy"),
        lambda: store.truncate(inode, IMAGE_BYTES_MAX + 1),
        lambda: store.put(ROOT, b"b", [], IMAGE_BYTES_MAX + 1, mode=0, uid=0, gid=0, mtime_ns=0),
    ):
        with pytest.raises(TooLarge) as caught:
            call()
        assert caught.value.errno == errno.EFBIG
    assert store.attr(inode).size == 0


def test_a_cold_disk_makes_the_caller_come_again(store: Store) -> None:
    inode = put(store, ROOT, b"a" * 20)
    handle = store.open_image(inode)
    store = reopened(store)
    disk_of(store).cold = True
    for call in (
        lambda: store.lookup(ROOT, b"a" * 20, nowait=True),
        lambda: list(store.list(ROOT, nowait=True)),
        lambda: store.open_image(inode, nowait=True),
    ):
        with pytest.raises(WouldBlock):
            call()
    handle = store.open_image(store.lookup(ROOT, b"a" * 20))
    assert bytes(store.read(handle, 0, 9, nowait=True)) == b"data", "what was verified is kept for the reads"
    store.close()
