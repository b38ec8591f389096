"""Snapshots of a store on a simulated disk, for tests: how one is taken, and what it must hold.

Owns the store of several volumes that is copied, and the check that a copy is clean. Must not know what happens to the
store meanwhile.

*Concurrency:* none; one thread at a time.
"""

import pytest
from powercut import SimulatedDisk
from stores import PATH, TINY, new_store, put, tree

from imgfs.cloning import Reflink
from imgfs.snapshot import take_snapshot
from imgfs.store import ROOT, Store
from imgfs.survey import Damage

TARGET = "/snapshot"
BOTH = pytest.mark.parametrize("reflink", [Reflink.ALWAYS, Reflink.NEVER])

Tree = dict[bytes, object]


class Watched:
    """A watcher that remembers what it heard."""

    def __init__(self) -> None:
        self.whole = (0, 0)
        self.done = (0, 0)
        self.sequence = 0

    def started(self, volumes: int, volume_bytes: int) -> None:
        self.whole = volumes, volume_bytes

    def advanced(self, volumes: int, volume_bytes: int) -> None:
        self.done = volumes, volume_bytes

    def opened(self, store: Store) -> None:
        self.sequence = store.last_sequence


def take(disk: SimulatedDisk, reflink: Reflink, target: str = TARGET) -> None:
    take_snapshot(PATH, target, Watched(), reflink=reflink, disk=disk)


def files_of(disk: SimulatedDisk, directory: str = PATH) -> dict[str, bytes]:
    return {path: disk.content(path) for path in disk.paths() if path.startswith(f"{directory}/")}


def tree_at(disk: SimulatedDisk, *, freed: bool = False) -> Tree:
    """Return all that the snapshot holds, as its next daemon sees it; it must be clean.

    *freed*: the bytes of what no image needs any more may be gone.
    """
    with Store.open(TARGET, disk=disk, settings=TINY) as store:
        assert (store.report.damage, store.report.torn_bytes) == ([], 0)
        damage = [found for found in store.check() if isinstance(found, Damage)]
        assert [each for each in damage if each.inode or not freed] == []
        return dict(tree(store))


def fill(store: Store, images: int = 20) -> None:
    """Put images into *store* that fill several volumes, and delete some."""
    album = store.mkdir(ROOT, b"album", 0o750, 3, 4)
    for number in range(images):
        put(store, (ROOT, album)[number % 2], b"%d.jpg" % number, bytes([number]) * (9000 + number), number)
    for number in range(0, images, 5):
        store.unlink((ROOT, album)[number % 2], b"%d.jpg" % number)
    store.rename(ROOT, b"2.jpg", album, b"renamed")


def filled_store() -> Store:
    """Return a store of several volumes that is open for writing; its last changes are not durable."""
    store = new_store()
    fill(store)
    return store
