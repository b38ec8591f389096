"""Repairs a store on a simulated disk, and holds each repair against what holds of all of them.

Must not know what was wrong with the store.

*Concurrency:* none.
"""

from collections.abc import Callable

from crafted import PATH, SETTINGS, Crafted
from powercut import SimulatedDisk
from snapshots import Snapshot, assert_same, snapshot

from imgfs.format import inode_of
from imgfs.repair import Repair
from imgfs.store import ROOT, Store
from imgfs.survey import Damage

# Those of `clean`: a directory, two images, a link; and one that it does not use.
D, E, F, G, H = (inode_of(slot, 0) for slot in (1, 2, 3, 4, 5))


def yes(_: str) -> bool:
    return True


def repaired(
    disk: SimulatedDisk, agree: Callable[[str], bool] = yes, *, damaged: int = 0
) -> tuple[list[str], Snapshot]:
    """Repair the store, check it, and return what was done and what is there then.

    It is *damaged* in so many places for good. A dry run says the same and changes nothing; a second one has nothing
    to do and changes nothing; nothing depends on the index files.
    """
    before = {path: disk.content(path) for path in disk.paths()}
    dry = Repair(PATH, disk, SETTINGS, dry_run=True)
    with dry.run() as store:
        planned = snapshot(store, damaged=True)
    assert {path: disk.content(path) for path in disk.paths()} == before
    repair = Repair(PATH, disk, SETTINGS, agree=agree)
    with repair.run() as store:
        seen = snapshot(store, damaged=True)
        assert len(places(store)) == damaged
    if not repair.left:
        assert dry.done == repair.done
    assert len(planned) <= len(seen)
    before = {path: disk.content(path) for path in disk.paths()}
    again = Repair(PATH, disk, SETTINGS, agree=agree)
    with again.run() as store:
        assert_same(snapshot(store, damaged=True), seen, "the second time")
        assert len(places(store)) == damaged
        assert store.contradictions() == []
    assert again.done == []
    assert again.left == repair.left
    if not repair.left:
        assert {path: disk.content(path) for path in disk.paths()} == before
    with Store.open(PATH, disk=disk, settings=SETTINGS, writable=False) as store:
        assert_same(snapshot(store, damaged=True), seen, "as a mount finds it")
    return repair.done, seen


def places(store: Store) -> set[tuple[int, int]]:
    """Return where the open store is damaged."""
    told = [*store.check(), *store.report.damage]
    return {(damage.volume, damage.offset) for damage in told if isinstance(damage, Damage)}


def found_before(disk: SimulatedDisk) -> list[str]:
    """Return what a check says of the store before it is repaired, which repairs nothing of the kind."""
    with Store.open(PATH, disk=disk.after_kill(), settings=SETTINGS, writable=False) as store:
        return [*store.contradictions(), *map(str, store.report.damage)]


def data(seen: Snapshot) -> dict[bytes, bytes]:
    return {path: node.data for path, node in seen.items() if node.data is not None}


def clean() -> Crafted:
    """A store in which nothing is wrong: a directory with two images, one of which has a link."""
    craft = Crafted()
    craft.directory(D, ROOT, b"d")
    craft.file(E, D, b"one", b"1" * 900)
    craft.file(F, ROOT, b"two", b"2" * 800)
    craft.link(G, D, b"link", F)
    return craft
