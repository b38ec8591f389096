"""Keeps the finished table in a file from a clean stop to the next start, so that opening need not make it again.

Owns `saved.table`, and what it says of volumes to tell whether they are still what it was made from (docs/crash.md).
It is derived: without it opening takes longer, and nothing else. Must not know what records mean, nor how it is loaded
(saved_loading.py).

*Concurrency:* saving is under `Memory.lock`, with nobody else at work.
"""

import logging
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from imgfs.disk import Disk
from imgfs.errors import Damaged, ImgfsError
from imgfs.format import NEEDLE_HEADER_BYTES, IndexState, Needle, PreviousEnd, pack_extras
from imgfs.index import checkpoint, checkpoint_state, empty_state, pack_record
from imgfs.layout import LAYOUT_VERSION, RECORDS_AT, STAGED_AT, STAGED_BYTES, VOLUME_GONE, Flag, Word
from imgfs.load import RECORDS
from imgfs.memory import Memory
from imgfs.recover import previous_ends
from imgfs.saved_format import (
    ARENA_CLASSES,
    PIECE_BYTES,
    SAVED_HEADER,
    SAVED_MAGIC,
    SAVED_TABLE,
    SAVED_VERSION,
    Front,
    SavedHeader,
    SavedVolume,
    file_bytes,
    front_bytes,
    is_of_other_release,
    pack_front,
    piece_seed,
    piece_sum,
    pieces,
    release_name,
    unpack_front,
    unpack_header,
)
from imgfs.settings import Settings
from imgfs.table import Table
from imgfs.volume import Volume
from imgfs.volumes import Volumes

log = logging.getLogger(__name__)

_NEW = ".new"
# The words that are part of the table, in the order of the header.
SAVED_WORDS = (
    *(Word.SLOTS, Word.FREE_HEAD, Word.FREE_TAIL, Word.FREE_COUNT, Word.FILES, Word.DIRECTORIES, Word.SYMLINKS),
    *(Word.ARENA_END, Word.OWNERS, Word.NEXT_SEQUENCE, Word.RARE_ENTRIES, Word.RARE_FREE, Word.RARE_COUNT),
    Word.ROWS_FREE,
)
ARENA_FREE = struct.Struct(f"<{ARENA_CLASSES}Q")
_CHECKPOINT_BYTES = NEEDLE_HEADER_BYTES + len(pack_extras(checkpoint(empty_state(0), seal=False).extras))


# -- at a clean stop ------------------------------------------------------------------------------------------


def save_table(disk: Disk, root: str, table: Table, store_id: bytes, volumes: Volumes, settings: Settings) -> bool:
    """Keep the *table* of the store at *root*, which was synced and is about to be closed; return whether it was.

    It is not where there is no need or no room, or where the next start has something to find out by itself. Nothing
    is raised: the store is closed as well without it.
    """
    memory, path = table.memory, f"{root}/{SAVED_TABLE}"
    if memory.words[Word.SLOTS] < settings.saved_slots_min:
        return False
    try:
        with memory.lock():
            if not _is_settled(memory):
                return False
            header, rows = _header(memory, store_id), _rows(table, volumes)
            space = disk.space(root)
            if space.f_bavail * space.f_frsize < file_bytes(header) + settings.headroom_bytes:
                return False
            _write(disk, path + _NEW, memory, header, rows)
        disk.rename(path + _NEW, path)
        disk.sync_directory(root)
    except (ImgfsError, OSError) as error:
        log.info("the table is not kept, the next start makes it again: %s", error)
        with suppress(OSError):
            disk.unlink(path + _NEW)
        return False
    return True


def _is_settled(memory: Memory) -> bool:
    """Return whether the table is what the volumes say, no more and no less."""
    words = memory.words
    unsettled = Word.FAILED, Word.FAILURES, Word.APPENDING, Word.STALE_DIRECTORIES
    if not words[Word.SOUND] or any(words[word] for word in unsettled):
        return False
    if words[Word.DURABLE] != words[Word.ACTIVE_END]:
        return False
    if np.ndarray((words[Word.STAGED],), "<u8", memory.map, STAGED_AT, (STAGED_BYTES,)).any():
        return False
    flags = np.frombuffer(memory.map, RECORDS, words[Word.SLOTS], RECORDS_AT)["flags"]
    # What died before it was ever flushed is as gone as anything else.
    return not ((flags & Flag.DEAD == 0) & (flags & (Flag.STAGED | Flag.UNBORN) != 0)).any()


def _header(memory: Memory, store_id: bytes) -> SavedHeader:
    words = memory.words
    free = ARENA_FREE.pack(*(words[Word.ARENA_FREE + each] for each in range(ARENA_CLASSES)))
    numbers = (words[word] for word in SAVED_WORDS)
    fixed = SAVED_MAGIC, SAVED_VERSION, LAYOUT_VERSION, words[Word.VOLUMES], store_id, os.urandom(16), release_name()
    return SavedHeader._make((*fixed, words[Word.ACTIVE], *numbers, free))


def _rows(table: Table, volumes: Volumes) -> tuple[SavedVolume, ...]:
    """Return the rows of the volume table and how each volume ends. Damaged where one does not as it should."""
    words = table.memory.words
    opened = {
        row: volumes.get(row).volume for row in range(words[Word.VOLUMES]) if not table.volume(row).flags & VOLUME_GONE
    }
    rows = [SavedVolume(0, 0, 0, VOLUME_GONE, 0, bytes(16), 0)] * words[Word.VOLUMES]
    for number, ending in endings(opened).items():
        row, header, size = table.volume(number), opened[number].header, opened[number].size()
        end = words[Word.ACTIVE_END] if number == words[Word.ACTIVE] else row.end
        if (header.volume_id, ending.end) != (row.volume_id, end):
            raise Damaged(f"volume {row.volume_id} is not what the table says")
        rows[number] = SavedVolume(row.volume_id, end, header.first_sequence, row.flags, size, header.salt, ending.mark)
    return tuple(rows)


def _write(disk: Disk, path: str, memory: Memory, header: SavedHeader, rows: tuple[SavedVolume, ...]) -> None:
    """Write the file at *path*, durably, from the memory that must not change meanwhile."""
    sums = []
    seed, at = piece_seed(header), front_bytes(header)
    file = disk.open(path, writable=True, create=True)
    try:
        disk.truncate(file, 0)
        with memoryview(memory.map) as view:
            for number, (start, size) in enumerate(pieces(header)):
                with view[start : start + size] as piece:
                    sums.append(piece_sum(piece, seed, number))
                    disk.write(file, at, [piece])
                at += size
        disk.write(file, 0, [pack_front(Front(header, rows, tuple(sums)))])
        disk.sync(file)
    finally:
        disk.close(file)


# -- by anybody ------------------------------------------------------------------------------------------------


def remove_saved(disk: Disk, root: str) -> None:
    """Make sure that the store at *root*, which is about to change, keeps no table, not even after power loss."""
    found = [path for path in saved_paths(root) if disk.exists(path)]
    for path in found:
        disk.unlink(path)
    if found:
        disk.sync_directory(root)


def saved_paths(root: str) -> tuple[str, str]:
    """Return the paths of a saved table of the store at *root*, and of one that was cut off."""
    return f"{root}/{SAVED_TABLE}", f"{root}/{SAVED_TABLE}{_NEW}"


def saved_damage(disk: Disk, root: str) -> str:
    """Return what is wrong with the bytes of the saved table of the store at *root*; nothing if all or none is there.

    One that was written by another release, or for another state of the store, is whole.
    """
    path = f"{root}/{SAVED_TABLE}"
    if not disk.exists(path):
        return ""
    file = disk.open(path)
    try:
        if is_of_other_release(disk.read(file, 0, SAVED_HEADER.size)):
            return ""
        front = read_front(disk, file)
        buffer = bytearray(PIECE_BYTES)
        at, seed = front_bytes(front.header), piece_seed(front.header)
        for number, (_, size) in enumerate(pieces(front.header)):
            with memoryview(buffer)[:size] as piece:
                read_piece(disk, file, at, piece, front.sums[number], seed, number)
            at += size
    except Damaged as error:
        return str(error)
    finally:
        disk.close(file)
    return ""


def read_front(disk: Disk, file: int) -> Front:
    """Return the front of an open saved table. Damaged."""
    header = unpack_header(disk.read(file, 0, SAVED_HEADER.size), disk.size(file))
    return unpack_front(disk.read(file, 0, front_bytes(header)), header)


def read_piece(disk: Disk, file: int, at: int, piece: memoryview, expected: int, seed: int, number: int) -> None:
    """Fill *piece* with what stands *at* that offset, if it is what was written there. Damaged."""
    if disk.read_into(file, at, piece) != len(piece) or piece_sum(piece, seed, number) != expected:
        raise Damaged(f"the checksum of its bytes from {at} on is wrong")


# -- how volumes end ------------------------------------------------------------------------------------------


class Ending(NamedTuple):
    """How a volume ends, and what its index files must be."""

    end: int
    state: IndexState
    """Of the index files, up to the last needle."""
    final: Needle | None
    """The checkpoint that says so, the last needle; None: the header of a later volume does."""
    mark: int
    """What cannot be the same once anything was appended."""

    def last_record(self) -> bytes:
        """Return what stands in `.idx` behind `state`."""
        return b"" if self.final is None else pack_record(self.final, self.state.end, 0, 0)


def ending_of(volume: Volume, previous: PreviousEnd | None) -> Ending:
    """Return how *volume* ends; *previous* is what a later one says of it.

    Raises:
        Damaged: not as a clean stop leaves it.
    """
    if previous is not None:
        return Ending(previous.index_state.end, previous.index_state, None, previous.torn_bytes)
    size = volume.size()
    final = volume.header_at(size - _CHECKPOINT_BYTES)
    state = checkpoint_state(final)
    if state is None or state.end != size - _CHECKPOINT_BYTES or final.length != _CHECKPOINT_BYTES:
        raise Damaged(f"volume {volume.header.volume_id} does not end with a checkpoint of all that it holds")
    return Ending(size, state, final, final.checksum)


def endings(volumes: Mapping[int, Volume]) -> dict[int, Ending]:
    """Return how each of *volumes* ends, by row. Damaged, as `ending_of`, or where one replaces another."""
    ids = {volume.header.volume_id for volume in volumes.values()}
    if any(ids.intersection(volume.header.replaces) for volume in volumes.values()):
        raise Damaged("a compaction was cut off: a volume is there that another one replaces")
    ordered = sorted(volumes.values(), key=lambda volume: (volume.header.first_sequence, volume.header.volume_id))
    previous = previous_ends(ordered)
    return {row: ending_of(volume, previous.get(volume.header.volume_id)) for row, volume in volumes.items()}
