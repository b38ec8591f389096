"""Extended attributes: kept through rename, rewriting, kill and rebuild; limits; what the store tells by itself."""

import io
from collections.abc import Callable, Iterator

import pytest
from PIL import Image
from stores import abandon_all, content, disk_of, killed, new_store, put, rebuilt, reopened, write_image

from imgfs.errors import InvalidArgument, NameTooLong, NoAttribute, NotSupported, StoreFull
from imgfs.format import pack_xattrs, unpack_xattrs
from imgfs.layout import Word
from imgfs.settings import KIB, MIB, Settings
from imgfs.store import ROOT, Store

USER = b"user.test"
ROOMY = Settings(volume_bytes_max=8 * MIB, headroom_bytes=16 * KIB, checkpoint_needles=8, rest_slots=2)


@pytest.fixture
def store() -> Store:
    return new_store()


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


@pytest.mark.parametrize("again", [killed, reopened, rebuilt])
def test_attributes_stay_with_their_inode(store: Store, again: Callable[[Store], Store]) -> None:
    image, directory = put(store, ROOT, b"a", b"photo"), store.mkdir(ROOT, b"d", 0o755, 0, 0)
    link = store.symlink(ROOT, b"l", b"a", 0, 0)
    store.set_xattr(image, USER, b"one")
    store.set_xattr(image, b"user.empty", b"")
    store.set_xattr(directory, b"trusted.d", bytes(range(256)))
    store.set_xattr(link, b"security.x", b"label")
    store.rename(ROOT, b"a", directory, b"moved")
    handle = store.open_image(image, write=True)
    store.write(handle, 0, b"PHOTO")
    store.release(handle)
    store.link(image, ROOT, b"again")
    store.unlink(directory, b"moved")
    store = again(store)
    assert {name: store.get_xattr(image, name) for name in store.list_xattrs(image)} == {
        USER: b"one",
        b"user.empty": b"",
    }
    assert store.get_xattr(directory, b"trusted.d") == bytes(range(256))
    assert store.list_xattrs(link) == [b"security.x"]
    assert content(store, image) == b"PHOTO"
    store.set_xattr(image, USER, b"two")
    store.remove_xattr(image, b"user.empty")
    store.remove_xattr(directory, b"trusted.d")
    store = again(store)
    assert store.get_xattr(image, USER) == b"two"
    assert store.list_xattrs(directory) == []
    for name in (b"user.empty", b"user.never"):
        with pytest.raises(NoAttribute):
            store.get_xattr(image, name)
        with pytest.raises(NoAttribute):
            store.remove_xattr(image, name)


@pytest.mark.parametrize("again", [killed, reopened, rebuilt])
def test_attributes_of_an_image_that_was_not_closed_yet(store: Store, again: Callable[[Store], Store]) -> None:
    inode, handle = store.create_image(ROOT, b"a", 0o644, 0, 0)
    store.set_xattr(inode, USER, b"early")
    store.set_xattr(inode, b"user.more", b"x")
    assert sorted(store.list_xattrs(inode)) == [b"user.more", USER]
    store.write(handle, 0, b"data")
    store.release(handle)
    assert not [path for path in disk_of(store).paths() if path.endswith(".xattrs")]
    store = again(store)
    assert sorted(store.list_xattrs(inode)) == [b"user.more", USER]
    assert content(store, inode) == b"data"


def test_the_next_in_a_slot_inherits_nothing(store: Store) -> None:
    for number in range(8):
        inode = write_image(store, ROOT, b"a")
        assert store.list_xattrs(inode) == []
        store.set_xattr(inode, USER, b"%d" % number)
        store.unlink(ROOT, b"a")
        store = reopened(store) if number % 2 else killed(store)
    assert store._memory.words[Word.RARE_COUNT] <= store.settings.rest_slots + 1


def test_a_never_closed_image_leaves_no_attributes(store: Store) -> None:
    inode, _ = store.create_image(ROOT, b"a", 0o644, 0, 0)
    store.set_xattr(inode, USER, b"early")
    store = killed(store)
    assert write_image(store, ROOT, b"b") == inode
    assert store.list_xattrs(inode) == []


def test_limits() -> None:
    store = new_store(ROOMY)
    inode = put(store, ROOT, b"a")
    for name, value, error in (
        (b"user." + bytes(251), b"", NameTooLong),
        (USER, bytes(64 * KIB + 1), InvalidArgument),
        (b"system.posix_acl_access", b"x", NotSupported),
        (b"other.name", b"x", NotSupported),
        (b"user.imgfs.checksum", b"x", InvalidArgument),
    ):
        with pytest.raises(error):
            store.set_xattr(inode, name, value)
    with pytest.raises(NotSupported):
        store.get_xattr(inode, b"system.posix_acl_access")
    with pytest.raises(InvalidArgument):
        store.remove_xattr(inode, b"user.imgfs.checksum")
    with pytest.raises(StoreFull):
        for number in range(17):
            store.set_xattr(inode, b"user.%d" % number, bytes(64 * KIB))
    assert len(store.list_xattrs(inode)) == 15
    short = [b"user." + b"%d" % number + b"x" * 240 for number in range(300)]
    other = put(store, ROOT, b"b")
    with pytest.raises(StoreFull):
        for name in short:
            store.set_xattr(other, name, b"")
    assert sum(len(name) + 1 for name in store.list_xattrs(other)) <= 64 * KIB


def test_what_the_store_tells_of_an_image(store: Store) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    image = put(store, ROOT, b"a.jpg", picture.getvalue())
    where = store.locate(image)
    told = {name: store.get_xattr(image, b"user.imgfs." + name) for name in (b"checksum", b"volume", b"offset")}
    assert told == {
        b"checksum": b"crc32c:%08x" % where.checksum,
        b"volume": b"%d" % where.volume,
        b"offset": b"%d" % where.data_offset,
    }
    assert store.get_xattr(image, b"user.imgfs.mime_type") == b"image/png"
    assert store.get_xattr(put(store, ROOT, b"b", b"no image"), b"user.imgfs.mime_type") == b"application/octet-stream"
    assert store.list_xattrs(image) == [], "a copy must not try to take them along"
    for inode, name in ((image, b"user.imgfs.other"), (ROOT, b"user.imgfs.volume")):
        with pytest.raises(NoAttribute):
            store.get_xattr(inode, name)


def test_packing() -> None:
    attributes = {b"user.a": b"", b"user.b": bytes(1000), b"security.c": b"x"}
    assert unpack_xattrs(pack_xattrs(attributes)) == attributes
    assert unpack_xattrs(b"") == {}
