"""Small stores on a simulated disk, for tests: made, killed, opened again, and read as a whole.

Owns the tiny limits. Must not know what a test wants of a store.

*Concurrency:* none.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from powercut import SimulatedDisk

from imgfs.format import Kind
from imgfs.settings import KIB, Settings
from imgfs.store import ROOT, Store, make_store

PATH = "/store"
TINY = Settings(volume_bytes_max=64 * KIB, headroom_bytes=16 * KIB, checkpoint_needles=8, rest_slots=2)


_opened: list[Store] = []


class Found(NamedTuple):
    """What a store holds under one path; times and sizes of directories are left out."""

    kind: Kind
    inode: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    data: bytes
    attributes: frozenset[tuple[bytes, bytes]] = frozenset()
    device: int = 0


def new_store(settings: Settings = TINY, disk: SimulatedDisk | None = None) -> Store:
    """Return an empty store that is open for writing."""
    disk = disk or SimulatedDisk()
    make_store(PATH, settings, disk, uid=0, gid=0)
    return open_store(disk, settings)


def open_store(disk: SimulatedDisk, settings: Settings = TINY, *, writable: bool = True) -> Store:
    store = Store.open(PATH, disk=disk, settings=settings, writable=writable)
    _opened.append(store)
    return store


def disk_of(store: Store) -> SimulatedDisk:
    disk = store._disk
    assert isinstance(disk, SimulatedDisk)
    return disk


def abandon(store: Store) -> None:
    """Free the memory of *store* as when its process is killed: nothing is written."""
    if store in _opened:
        _opened.remove(store)
    if not store._memory.map.closed:
        store.requests.close()
        store.access_times.close()
        store._handles.close()
        store._memory.close()


def abandon_all() -> None:
    """Free the memory of all stores that were opened and neither closed nor killed."""
    for store in _opened.copy():
        abandon(store)


@pytest.fixture
def no_store_stays_open() -> Iterator[None]:
    """Whatever the test has opened is abandoned behind it."""
    yield
    abandon_all()


def killed(store: Store, *, writable: bool = True) -> Store:
    """Kill the process that has *store* open, and return what the next one opens."""
    disk, settings = disk_of(store).after_kill(), store.settings
    abandon(store)
    return open_store(disk, settings, writable=writable)


def reopened(store: Store, *, writable: bool = True) -> Store:
    """Close *store*, and open it again."""
    store.close()
    return open_store(disk_of(store), store.settings, writable=writable)


def rebuilt(store: Store) -> Store:
    """Close *store*, and open what its volumes alone say."""
    store.close()
    disk = disk_of(store)
    for path in disk.paths():
        if path.endswith((".idx", ".names")):
            disk.unlink(path)
    return open_store(disk, store.settings)


def put(store: Store, parent: int, name: bytes, data: bytes = b"data", mtime_ns: int = 1) -> int:
    return store.put(parent, name, data, len(data), mode=0o644, uid=1, gid=2, mtime_ns=mtime_ns)


def write_image(store: Store, parent: int, name: bytes, data: bytes = b"data") -> int:
    """Make an image as cp does, and return its inode."""
    inode, handle = store.create_image(parent, name, 0o644, 1, 2)
    store.write(handle, 0, data)
    store.flush(handle)
    store.release(handle)
    return inode


def content(store: Store, inode: int) -> bytes:
    """Return the bytes of the image *inode*, read through a handle."""
    handle = store.open_image(inode)
    try:
        return read_all(store, handle)
    finally:
        store.release(handle)


def read_all(store: Store, handle: int) -> bytes:
    size = store.attr(store.handle_inode(handle)).size
    data = bytes(store.read(handle, 0, size + 1))
    assert len(data) == size
    return data


def tree(store: Store, directory: int = ROOT, path: bytes = b"") -> dict[bytes, Found]:
    """Return all that *store* holds, by path; what contradicts itself is an error."""
    found = {}
    subdirectories = 0
    for entry in store.list(directory):
        assert store.lookup(directory, entry.name) == entry.inode
        attr = store.attr(entry.inode)
        if attr.nlink == 1 or attr.kind == Kind.DIRECTORY:
            assert (store.parent(entry.inode), store.name(entry.inode)) == (directory, entry.name)
        here = path + b"/" + entry.name
        assert here not in found
        data = b""
        if attr.kind == Kind.FILE:
            data = content(store, entry.inode)
        elif attr.kind == Kind.SYMLINK:
            data = store.readlink(entry.inode)
        mtime_ns = 0 if attr.kind == Kind.DIRECTORY else attr.mtime_ns
        attributes = frozenset((name, store.get_xattr(entry.inode, name)) for name in store.list_xattrs(entry.inode))
        found[here] = Found(
            attr.kind, attr.inode, attr.mode, attr.uid, attr.gid, mtime_ns, data, attributes, attr.device
        )
        if attr.kind == Kind.DIRECTORY:
            subdirectories += 1
            found |= tree(store, entry.inode, here)
    assert store.attr(directory).nlink == 2 + subdirectories
    return found


def staged_files(store: Store) -> list[bytes]:
    disk = disk_of(store)
    return [disk.content(path) for path in disk.paths() if path.startswith(f"{PATH}/staging/")]


def killed_content(store: Store, path: bytes) -> bytes:
    """Return what a process would find of the image at *path* if this one died now."""
    twin = open_store(disk_of(store).after_kill())
    data = content(twin, twin.resolve(path))
    abandon(twin)
    return data


def names(store: Store, directory: int = ROOT) -> set[bytes]:
    return {entry.name for entry in store.list(directory)}
