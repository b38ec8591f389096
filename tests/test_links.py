"""Several names of one image, swapped names, pipes and devices: also after a kill, a restart and a rebuild."""

import stat
from collections.abc import Callable, Iterator

import pytest
from stores import abandon_all, content, killed, names, new_store, put, rebuilt, reopened, write_image

from imgfs.errors import Exists, InvalidArgument, IsADirectory, NotFound
from imgfs.format import Kind
from imgfs.store import ROOT, Store


@pytest.fixture
def store() -> Store:
    return new_store()


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


AGAIN = pytest.mark.parametrize("again", [killed, reopened, rebuilt])
Again = Callable[[Store], Store]


def _links(store: Store, inode: int) -> int:
    return store.attr(inode).nlink


@AGAIN
def test_all_names_of_an_image_are_equal(store: Store, again: Again) -> None:
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    inode = put(store, ROOT, b"a", b"photo")
    store.link(inode, ROOT, b"b")
    store.link(inode, directory, b"c")
    store.set_attr(store.lookup(ROOT, b"b"), mode=0o600)
    store = again(store)
    assert {store.lookup(ROOT, b"a"), store.lookup(ROOT, b"b"), store.lookup(directory, b"c")} == {inode}
    assert (_links(store, inode), store.attr(inode).mode, content(store, inode)) == (3, 0o600, b"photo")
    assert [(entry.name, entry.inode) for entry in store.list(directory)] == [(b"c", inode)]


@AGAIN
@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_an_image_lives_until_its_last_name_goes(store: Store, again: Again, order: str) -> None:
    inode = put(store, ROOT, b"a", b"photo")
    store.link(inode, ROOT, b"b")
    store.link(inode, ROOT, b"c")
    for left, name in zip((2, 1), order, strict=False):
        before = store.attr(inode).ctime_ns
        store.unlink(ROOT, name.encode())
        store = again(store)
        assert (_links(store, inode), content(store, inode)) == (left, b"photo")
        assert store.attr(inode).ctime_ns >= before
    assert names(store) == {order[2].encode()}
    assert store.name(inode) == order[2].encode()
    assert store.parent(inode) == ROOT
    store.unlink(ROOT, order[2].encode())
    assert _links(store, inode) == 0
    store = again(store)
    assert names(store) == set()
    assert store.counts().images == 0
    assert put(store, ROOT, b"new") != inode


@AGAIN
def test_an_image_without_a_name_of_its_own_is_written_anew(store: Store, again: Again) -> None:
    inode = put(store, ROOT, b"a", b"old")
    store.link(inode, ROOT, b"b")
    store.unlink(ROOT, b"a")
    handle = store.open_image(inode, write=True, truncate=True)
    store.write(handle, 0, b"new bytes")
    store.release(handle)
    store = again(store)
    assert content(store, store.lookup(ROOT, b"b")) == b"new bytes"
    # As an import does, which puts what is there in one needle.
    assert put(store, ROOT, b"b", b"third") == inode
    store = again(store)
    assert content(store, inode) == b"third"
    assert names(store) == {b"b"}
    assert _links(store, inode) == 1


@AGAIN
def test_a_link_is_renamed_and_replaced_like_any_name(store: Store, again: Again) -> None:
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    one, two = put(store, ROOT, b"one", b"1"), put(store, ROOT, b"two", b"2")
    store.link(one, ROOT, b"link")
    store.rename(ROOT, b"link", directory, b"moved")
    assert (names(store, directory), _links(store, one)) == ({b"moved"}, 2)
    store.rename(ROOT, b"two", directory, b"moved")  # over a link
    store = again(store)
    assert (_links(store, one), _links(store, two)) == (1, 1)
    assert store.lookup(directory, b"moved") == two
    store.link(one, ROOT, b"link")
    store.rename(directory, b"moved", ROOT, b"one")  # over the own name of one that has a link
    store = again(store)
    assert store.lookup(ROOT, b"one") == two
    assert store.lookup(ROOT, b"link") == one
    assert _links(store, one) == 1
    store.rename(ROOT, b"one", ROOT, b"link")  # over the last name
    assert _links(store, one) == 0
    store = again(store)
    assert names(store) == {b"d", b"link"}
    assert content(store, store.lookup(ROOT, b"link")) == b"2"


def test_a_rename_between_two_names_of_one_image_does_nothing(store: Store) -> None:
    inode = put(store, ROOT, b"a")
    store.link(inode, ROOT, b"b")
    store.rename(ROOT, b"a", ROOT, b"b")
    assert (names(store), _links(store, inode)) == ({b"a", b"b"}, 2)


@AGAIN
def test_an_image_that_was_never_closed_can_be_linked(store: Store, again: Again) -> None:
    inode, handle = store.create_image(ROOT, b"a", 0o644, 0, 0)
    store.write(handle, 0, b"so far")
    store.link(inode, ROOT, b"b")
    store.unlink(ROOT, b"a")
    store.write(handle, 6, b", and more")
    store.release(handle)
    store = again(store)
    assert content(store, store.lookup(ROOT, b"b")) == b"so far, and more"


def test_what_is_no_name_for_a_link(store: Store) -> None:
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    inode = put(store, ROOT, b"a")
    for error, arguments in (
        (Exists, (inode, ROOT, b"d")),
        (Exists, (inode, ROOT, b"a")),
        (IsADirectory, (directory, ROOT, b"e")),
        (InvalidArgument, (inode, ROOT, b"..")),
    ):
        with pytest.raises(error):
            store.link(*arguments)
    handle = store.open_image(inode)
    store.unlink(ROOT, b"a")
    with pytest.raises(NotFound):
        store.link(inode, ROOT, b"again")
    store.release(handle)


@AGAIN
def test_two_entries_swap_their_names(store: Store, again: Again) -> None:
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    below = store.mkdir(directory, b"below", 0o755, 0, 0)
    image = put(store, ROOT, b"image", b"photo")
    other = write_image(store, below, b"other", b"another")
    store.exchange(ROOT, b"image", below, b"other")
    store.exchange(ROOT, b"d", ROOT, b"image")
    store = again(store)
    assert store.lookup(ROOT, b"image") == directory
    assert store.lookup(ROOT, b"d") == other
    assert store.lookup(below, b"other") == image
    assert (store.attr(ROOT).nlink, store.attr(below).nlink) == (3, 2)
    store.exchange(ROOT, b"d", directory, b"below")
    assert (store.attr(ROOT).nlink, store.attr(directory).nlink) == (4, 2)
    store = again(store)
    assert (store.attr(ROOT).nlink, store.attr(directory).nlink, store.parent(below)) == (4, 2, ROOT)


def test_what_cannot_be_swapped(store: Store) -> None:
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    put(store, directory, b"inside")
    put(store, ROOT, b"a")
    with pytest.raises(NotFound):
        store.exchange(ROOT, b"a", ROOT, b"missing")
    with pytest.raises(InvalidArgument):
        store.exchange(ROOT, b"d", directory, b"inside")
    with pytest.raises(InvalidArgument):
        store.exchange(directory, b"inside", ROOT, b"d")
    store.exchange(ROOT, b"a", ROOT, b"a")
    assert names(store) == {b"a", b"d"}


@AGAIN
def test_pipes_sockets_and_devices(store: Store, again: Again) -> None:
    kinds = {
        b"pipe": (stat.S_IFIFO | 0o600, 0),
        b"socket": (stat.S_IFSOCK | 0o644, 0),
        b"null": (stat.S_IFCHR | 0o4666, 1 << 8 | 3),
        b"disk": (stat.S_IFBLK | 0o660, 0xFFFF_FFFF),
    }
    for name, (mode, device) in kinds.items():
        store.special(ROOT, name, mode, device, 5, 6)
    store.link(store.lookup(ROOT, b"pipe"), ROOT, b"pipe too")
    store.set_attr(store.lookup(ROOT, b"null"), mode=0o640)
    store = again(store)
    attr = {entry.name: store.attr(entry.inode) for entry in store.list(ROOT)}
    assert {attr[name].kind for name in kinds} == {Kind.SPECIAL}
    kinds[b"null"] = (stat.S_IFCHR | 0o640, 1 << 8 | 3)
    assert {name: (attr[name].mode, attr[name].device) for name in kinds} == kinds
    assert {(row.size, row.blocks, row.uid, row.gid) for row in attr.values()} == {(0, 0, 5, 6)}
    assert attr[b"pipe"].nlink == 2
    assert store.counts().images == 4


def test_a_swap_that_is_refused_publishes_nothing(store: Store) -> None:
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    inode, handle = store.create_image(directory, b"unborn", 0o644, 0, 0, creator=77)
    store.write(handle, 0, b"half")
    with pytest.raises(InvalidArgument):
        store.exchange(directory, b"unborn", ROOT, b"d")
    assert store.creator(inode) == 77
    assert names(killed(store), directory) == set()
