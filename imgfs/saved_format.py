"""The bytes of `saved.table`, in which a clean stop keeps the finished table; docs/format.md is the same in prose.

Owns the structs, the checksums and what such a file can claim at all. Must not know files: it packs and unpacks
buffers. All numbers are little-endian. In front stand the header, a row for each row of the volume table and a checksum
for each piece; behind that the pieces, which are parts of the shared memory as they are.

*Concurrency:* none; these are values.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import xxhash

from imgfs import __version__
from imgfs.errors import Damaged
from imgfs.layout import (
    ARENA_AT,
    ARENA_UNIT,
    LAYOUT_VERSION,
    LINK_BYTES,
    LINKS_AT,
    OWNER,
    OWNERS_AT,
    OWNERS_MAX,
    RARE,
    RARE_AT,
    RARE_HEADS,
    RARE_HEADS_AT,
    RARE_MAX,
    RECORD_BYTES,
    RECORDS_AT,
    SLOTS_MAX,
    VOLUMES_MAX,
)

SAVED_TABLE = "saved.table"
SAVED_VERSION = 1
SAVED_MAGIC = b"imgfstab"
# One checksum for so many bytes: they stay in the processor's cache between reading, verifying and storing.
PIECE_BYTES = 1 << 20
ARENA_CLASSES = 32  # words from Word.ARENA_FREE on

SAVED_HEADER = struct.Struct("<8sHHI16s16s16s15Q256s")
SAVED_VOLUME = struct.Struct("<QQQQQ16sQ")
SAVED_SUM = struct.Struct("<Q")


class SavedHeader(NamedTuple):
    """What the header says, magic first."""

    magic: bytes
    version: int
    layout: int
    volumes: int
    store_id: bytes
    salt: bytes
    release: bytes
    active: int
    slots: int
    free_head: int
    free_tail: int
    free_count: int
    files: int
    directories: int
    symlinks: int
    arena_end: int
    owners: int
    next_sequence: int
    rare_entries: int
    rare_free: int
    rare_count: int
    rows_free: int
    arena_free: bytes

    @property
    def numbers(self) -> tuple[int, ...]:
        """What stands for words of the shared memory, in their order."""
        counts = self.files, self.directories, self.symlinks
        rare = self.rare_entries, self.rare_free, self.rare_count
        free = self.free_head, self.free_tail, self.free_count
        return self.slots, *free, *counts, self.arena_end, self.owners, self.next_sequence, *rare, self.rows_free


class SavedVolume(NamedTuple):
    """A row of the volume table, and what tells that the volume is still the one it was."""

    volume_id: int
    end: int
    first_sequence: int
    flags: int
    size: int
    salt: bytes
    mark: int


SAVED_HEADER_FIELDS = SavedHeader._fields
SAVED_VOLUME_FIELDS = SavedVolume._fields


class Front(NamedTuple):
    """All before the pieces."""

    header: SavedHeader
    volumes: tuple[SavedVolume, ...]
    sums: tuple[int, ...]


def release_name() -> bytes:
    """Return what stands for this release: no other one believes what it saved."""
    return __version__.encode()[:16].ljust(16, b"\0")


def regions(header: SavedHeader) -> list[tuple[int, int]]:
    """Return (offset, bytes) of each part of the shared memory that the pieces hold, in their order."""
    return [
        (OWNERS_AT, OWNER.size * header.owners),
        (RARE_HEADS_AT, 4 * RARE_HEADS if header.rare_entries else 0),
        (RARE_AT, RARE.size * header.rare_entries),
        (ARENA_AT, ARENA_UNIT * header.arena_end),
        (LINKS_AT, LINK_BYTES * header.slots),
        (RECORDS_AT, RECORD_BYTES * header.slots),
    ]


def pieces(header: SavedHeader) -> Iterator[tuple[int, int]]:
    """Yield (offset in the shared memory, bytes) of each piece."""
    for start, size in regions(header):
        for at in range(0, size, PIECE_BYTES):
            yield start + at, min(PIECE_BYTES, size - at)


def piece_count(header: SavedHeader) -> int:
    """Return how many pieces there are."""
    return sum(-(-size // PIECE_BYTES) for _, size in regions(header))


def front_bytes(header: SavedHeader) -> int:
    """Return how long the front is: where the first piece begins."""
    rows = SAVED_VOLUME.size * header.volumes + SAVED_SUM.size * piece_count(header)
    return SAVED_HEADER.size + SAVED_SUM.size + rows


def file_bytes(header: SavedHeader) -> int:
    """Return how long the whole file is."""
    return front_bytes(header) + sum(size for _, size in regions(header))


def piece_seed(header: SavedHeader) -> int:
    """Return the seed of the first piece's checksum; each further one has the next number."""
    return xxhash.xxh3_64_intdigest(header.salt)


def piece_sum(data: bytes | bytearray | memoryview, seed: int, number: int) -> int:
    """Return the checksum of piece *number*, which counts only in that place of that file."""
    return xxhash.xxh3_64_intdigest(data, (seed + number) % (1 << 64))


def pack_front(front: Front) -> bytes:
    """Return the front as it stands on disk."""
    header = SAVED_HEADER.pack(*front.header)
    rows = b"".join(SAVED_VOLUME.pack(*row) for row in front.volumes)
    rows += struct.pack(f"<{len(front.sums)}Q", *front.sums)
    return header + SAVED_SUM.pack(xxhash.xxh3_64_intdigest(header + rows)) + rows


def is_of_other_release(data: bytes) -> bool:
    """Return whether *data* begins a saved table that another release wrote, whose rest may mean anything."""
    if len(data) < SAVED_HEADER.size or not data.startswith(SAVED_MAGIC):
        return False
    header = SavedHeader._make(SAVED_HEADER.unpack_from(data))
    return (header.version, header.layout, header.release) != (SAVED_VERSION, LAYOUT_VERSION, release_name())


def unpack_header(data: bytes, size: int) -> SavedHeader:
    """Return the header that begins *data*, the first bytes of a file of *size* bytes.

    Raises:
        Damaged: it is none, or none that this release wrote.
    """
    if len(data) < SAVED_HEADER.size or not data.startswith(SAVED_MAGIC):
        raise Damaged("it does not begin as a saved table")
    if is_of_other_release(data):
        raise Damaged("another release wrote it")
    header = SavedHeader._make(SAVED_HEADER.unpack_from(data))
    if not (
        0 < header.volumes <= VOLUMES_MAX
        and header.active < header.volumes
        and header.rows_free < header.volumes
        and 0 < header.slots <= SLOTS_MAX
        and max(header.free_head, header.free_tail, header.free_count) <= header.slots
        and header.files + header.directories + header.symlinks <= header.slots
        and header.owners <= OWNERS_MAX
        and header.arena_end * ARENA_UNIT <= LINKS_AT - ARENA_AT
        and max(header.rare_free, header.rare_count) <= header.rare_entries <= RARE_MAX
        and file_bytes(header) == size
    ):
        raise Damaged("its header says what no release writes")
    return header


def unpack_front(data: bytes, header: SavedHeader) -> Front:
    """Return the front that *data* is, which begins with *header*.

    Raises:
        Damaged: these are not the bytes that were written.
    """
    start = SAVED_HEADER.size + SAVED_SUM.size
    if len(data) != front_bytes(header):
        raise Damaged("too short")
    (checksum,) = SAVED_SUM.unpack_from(data, SAVED_HEADER.size)
    if xxhash.xxh3_64_intdigest(data[: SAVED_HEADER.size] + data[start:]) != checksum:
        raise Damaged("the checksum of its front is wrong")
    end = start + SAVED_VOLUME.size * header.volumes
    rows = tuple(map(SavedVolume._make, SAVED_VOLUME.iter_unpack(data[start:end])))
    sums: Sequence[int] = struct.unpack(f"<{piece_count(header)}Q", data[end:])
    return Front(header, rows, tuple(sums))
