"""Stores that have something to give back, for tests: what reclaiming does, whole, and what must be left of it.

Owns the rules: nothing unpublished and nothing replaced is left, each volume has a row, and what dies is dead.

*Concurrency:* none; one thread at a time.
"""

from collections.abc import Iterator

from powercut import SimulatedDisk

from imgfs.compact import COPY, Keep
from imgfs.format import Kind, Needle
from imgfs.layout import VOLUME_GONE, Word
from imgfs.needed import NEVER_S
from imgfs.reclaim import Reclaimed
from imgfs.store import Store
from imgfs.volume import Gap, Volume


def reclaim(store: Store, *, holes: bool = True) -> Reclaimed:
    """Give back all that can be, as the maintenance process does turn by turn; without *holes* by copies alone."""
    reclaimer = store.reclaimer()
    reclaimer.finish()
    done = reclaimer.punch(everything=True) if holes else Reclaimed()
    while groups := reclaimer.worthwhile(reclaimer.survey()):
        compacted = reclaimer.compact(groups[0])
        done = done._replace(
            volumes=done.volumes + compacted.volumes, volume_bytes=done.volume_bytes + compacted.volume_bytes
        )
    assert reclaimer.finish()
    return done


def compact(store: Store, rows: list[int], *, cutoff_s: int = NEVER_S) -> int:
    """Compact the volumes in *rows*, which must be neighbours, and remove them; return the row of the new one."""
    compaction = store.reclaimer().compaction
    held = store._handles.slots()
    row = compaction.run(compaction.plan(rows, Keep(held, cutoff_s)), 0)
    assert compaction.unfinished() == [row]
    assert compaction.remove(row, held)
    return row


def rows_of(store: Store) -> dict[int, int]:
    """Return the row of each volume, by its id, in the order of their sequence numbers."""
    table = store._table
    return {table.volume(row).volume_id: row for row in store._volumes.rows()}


def assert_tidy(store: Store) -> None:
    """Check that nothing is left of compactions but their results."""
    names = store._disk.names(f"{store.path}/volumes")
    assert not [name for name in names if name.endswith(COPY)]
    known = rows_of(store)
    found = {int(name.partition(".")[0]) for name in names}
    assert found == known.keys(), "a volume without a row, or the other way round"
    for row in known.values():
        assert not known.keys() & set(store._volumes.get(row).volume.header.replaces)
    words, table = store._memory.words, store._table
    free = [row for row in range(words[Word.VOLUMES]) if table.volume(row).flags & VOLUME_GONE]
    assert len(free) == words[Word.ROWS_FREE]


def assert_sound(store: Store) -> None:
    """Check that every byte of every volume is what was written, or a hole."""
    assert not store.report.damage
    assert not [found for found in store.check() if hasattr(found, "text")]


def needles(disk: SimulatedDisk, directory: str = "/store/volumes") -> Iterator[tuple[Volume, int, Needle]]:
    """Yield (volume, offset, needle) of all volumes, by their file names."""
    for path in disk.paths():
        if path.startswith(directory) and path.endswith(".vol"):
            volume = Volume.open(disk, path)
            for item in volume.scan(8192, volume.size()):
                if not isinstance(item, Gap):
                    yield volume, *item
            volume.close()


def kept_images(disk: SimulatedDisk) -> set[tuple[bytes, bytes]]:
    """Return (name, bytes) of all images whose bytes are in the volumes, alive or dead."""
    found = set()
    for volume, offset, needle in needles(disk):
        if needle.kind == Kind.FILE and volume.whole(needle, offset):
            found.add((needle.name, b"".join(volume.pieces(needle, offset))))
    return found
