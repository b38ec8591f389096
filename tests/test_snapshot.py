"""A snapshot holds all that the store holds, goes its own way, and changes nothing of what it is taken of."""

from collections.abc import Iterator

import pytest
from copied import BOTH, TARGET, Watched, files_of, filled_store, take, tree_at
from stores import PATH, TINY, abandon, abandon_all, content, disk_of, put, tree

from imgfs.cloning import Reflink
from imgfs.errors import DiskFailure, Exists, InvalidArgument, NoStore, NotSupported
from imgfs.format import Kind
from imgfs.snapshot import UNFINISHED, take_snapshot
from imgfs.store import ROOT, Store


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


@pytest.fixture
def store() -> Store:
    return filled_store()


@BOTH
def test_it_holds_all_that_a_store_in_use_holds(store: Store, reflink: Reflink) -> None:
    disk, before, wanted = disk_of(store), files_of(disk_of(store)), tree(store)
    watched = Watched()
    taken = take_snapshot(PATH, TARGET, watched, reflink=reflink, disk=disk)
    assert files_of(disk) == before
    assert tree_at(disk) == wanted
    assert taken.volumes == store.counts().volumes > 3
    assert taken.volume_bytes == sum(len(data) for path, data in before.items() if path.endswith(".vol"))
    assert taken.shared == (taken.volumes if reflink == Reflink.ALWAYS else 0)
    assert watched.done == (taken.volumes - 1, watched.whole[1])
    assert watched.sequence == store.last_sequence
    put(store, ROOT, b"later")
    assert tree_at(disk) == wanted


@BOTH
def test_each_goes_its_own_way(store: Store, reflink: Reflink) -> None:
    disk = disk_of(store)
    take(disk, reflink)
    with Store.open(TARGET, disk=disk, settings=TINY) as copy:
        assert copy.superblock == store.superblock
        put(copy, ROOT, b"in the copy")
        fill_album = copy.lookup(ROOT, b"album")
        copy.unlink(fill_album, b"1.jpg")
    put(store, ROOT, b"in the store")
    assert b"/in the copy" not in tree(store)
    assert b"/album/1.jpg" in tree(store)
    assert b"/in the store" not in tree_at(disk)
    assert b"/album/1.jpg" not in tree_at(disk)


@BOTH
def test_a_snapshot_of_what_a_killed_daemon_left_has_its_torn_end_cut(store: Store, reflink: Reflink) -> None:
    wanted, disk = tree(store), disk_of(store).after_kill()
    abandon(store)
    last = max(path for path in disk.paths() if path.endswith(".vol"))
    disk.set_content(last, disk.content(last) + b"half a needle")
    take(disk, reflink)
    assert tree_at(disk) == wanted


@BOTH
def test_what_is_wrong_with_the_index_is_mended_in_the_copy(store: Store, reflink: Reflink) -> None:
    disk, wanted = disk_of(store), tree(store)
    for path in files_of(disk):
        if path.endswith("1.idx"):
            disk.unlink(path)
        elif path.endswith("2.names"):
            disk.flip(path, 20)
    take(disk, reflink)
    assert tree_at(disk) == wanted


def test_a_lost_superblock_is_made_again_in_the_copy(store: Store) -> None:
    disk = disk_of(store)
    wanted, superblock = tree(store), disk.content(f"{PATH}/imgfs.json")
    disk.unlink(f"{PATH}/imgfs.json")
    take(disk, Reflink.AUTO)
    assert tree_at(disk) == wanted
    assert disk.content(f"{TARGET}/imgfs.json") == superblock
    assert not disk.exists(f"{PATH}/imgfs.json")


def test_a_volume_without_a_header_is_kept_as_it_is(store: Store) -> None:
    disk = disk_of(store)
    path = f"{PATH}/volumes/00000002.vol"
    for offset in (0, 4096):
        disk.flip(path, offset)
    take(disk, Reflink.NEVER)
    assert disk.content(path.replace(PATH, TARGET)) == disk.content(path)
    with Store.open(TARGET, disk=disk, settings=TINY) as copy:
        assert [damage.volume for damage in copy.report.damage] == [2]


def test_without_shared_blocks_auto_copies_and_always_refuses(store: Store) -> None:
    disk, wanted = disk_of(store), tree(store)
    disk.shares_blocks = False
    before = disk.paths()
    with pytest.raises(NotSupported, match="cannot share blocks"):
        take(disk, Reflink.ALWAYS)
    assert disk.paths() == before
    take(disk, Reflink.AUTO)
    assert tree_at(disk) == wanted


def test_where_it_cannot_be(store: Store) -> None:
    disk = disk_of(store)
    before = files_of(disk, "")
    for target, error, text in (
        (PATH, Exists, "is there already"),
        (f"{PATH}/volumes/x", InvalidArgument, "lies in the store"),
        (f"{PATH}/x", InvalidArgument, "lies in the store"),
        (f"{PATH}/volumes/../x", InvalidArgument, "lies in the store"),
        ("/nowhere/x", DiskFailure, "/nowhere does not exist"),
    ):
        with pytest.raises(error, match=text):
            take(disk, Reflink.AUTO, target)
    with pytest.raises(NoStore):
        take_snapshot("/other", TARGET, Watched(), disk=disk)
    assert files_of(disk, "") == before
    take(disk, Reflink.AUTO, f"{PATH}-2/")
    assert disk.exists(f"{PATH}-2/imgfs.json")


def test_what_somebody_else_put_in_its_way_is_not_touched(store: Store) -> None:
    disk = disk_of(store)
    disk.mkdir(TARGET + UNFINISHED)
    disk.set_content(f"{TARGET}{UNFINISHED}/photo", b"mine")
    with pytest.raises(DiskFailure, match="in the way"):
        take(disk, Reflink.AUTO)
    assert disk.content(f"{TARGET}{UNFINISHED}/photo") == b"mine"


def test_kinds_are_what_they_were(store: Store) -> None:
    store.symlink(ROOT, b"link", b"album", 1, 2)
    store.special(ROOT, b"pipe", 0o010644, 0, 1, 2)
    disk = disk_of(store)
    take(disk, Reflink.AUTO)
    with Store.open(TARGET, disk=disk, settings=TINY) as copy:
        assert copy.attr(copy.lookup(ROOT, b"link")).kind == Kind.SYMLINK
        assert content(copy, copy.resolve(b"album/1.jpg")) == b"\1" * 9001
