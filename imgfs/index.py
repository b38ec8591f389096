"""The derived files of a volume: `.idx`, one 39-byte record per needle, and `.names`, the names they point at.

Owns the two files of one volume. Must not know the table; whether they can be trusted is said by checkpoint
needles in the volume, which carry their checksums.

*Concurrency:* reading keeps no state; appending is for the holder of the table's lock.
"""

from typing import NamedTuple

from crc32c import crc32c

from imgfs.disk import Disk
from imgfs.errors import Damaged
from imgfs.format import (
    ALIGNMENT,
    FLAG_SEAL,
    INDEX_RECORD,
    INDEX_RECORD_BYTES,
    INDEX_STATE,
    NAMES_HEADER,
    NAMES_MAGIC,
    NEEDLES_START,
    PUT_KINDS,
    IndexState,
    Kind,
    Needle,
    Tag,
    seconds,
    slot_of,
)
from imgfs.volume import Volume

NAME_BYTES_READ = 256  # a length byte and the longest name
_NO_NAMES = (b"", b".", b"..")
_NAMING = PUT_KINDS | {Kind.RENAME}
# Plain numbers: comparing with those of an enum takes longer, and a rebuild does it for every needle.
_REMOVING, _OWNER = (int(Kind.RENAME), int(Kind.DELETE)), int(Kind.OWNER)


class Index(NamedTuple):
    """The paths of the two files of a volume."""

    records: str
    names: str


def index_paths(volume_path: str) -> Index:
    """Return the paths of the index files beside the volume at *volume_path*."""
    stem = volume_path.removesuffix(".new").removesuffix(".vol")
    return Index(stem + ".idx", stem + ".names")


def read_records(disk: Disk, volume_path: str, count: int = -1) -> bytes:
    """Return the first *count* records of the volume at *volume_path*, all without it.

    Raises:
        Damaged: they are not there, or not whole.
    """
    path = index_paths(volume_path).records
    try:
        file = disk.open(path)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing; mount again, or run imgfs rebuild-index") from None
    try:
        data = disk.read(file, 0, disk.size(file) if count < 0 else count * INDEX_RECORD_BYTES)
    finally:
        disk.close(file)
    if not data or len(data) % INDEX_RECORD_BYTES or 0 <= count * INDEX_RECORD_BYTES != len(data):
        raise Damaged(f"{path} is not whole; mount again, or run imgfs rebuild-index")
    return data


def names_header(volume_id: int) -> bytes:
    """Return the first bytes of `.names`; because of them no name has offset 0."""
    return NAMES_HEADER.pack(NAMES_MAGIC, volume_id)


def empty_state(volume_id: int) -> IndexState:
    """Return the state of index files that cover nothing of a volume yet."""
    header = names_header(volume_id)
    return IndexState(NEEDLES_START, 0, 0, len(header), crc32c(header))


def pack_name(name: bytes) -> bytes:
    """Return *name* as it stands in `.names`: its length in one byte, then the name; nothing for no name."""
    return bytes([len(name)]) + name if name else b""


def pack_record(needle: Needle, offset: int, name_offset: int, value: int) -> bytes:
    """Return the record of *needle*, which lies at *offset*; *value* is the hash of its name.

    What a kind does not need holds what loading needs of it: a rename has the slot + 1 it replaces in place of the
    size, an owner its uid, gid and mode in place of parent, size and name offset. Renames and deletes have their flags
    in place of the owner, and the slot + 1 of the inode whose link goes in place of the mtime.
    """
    parent, size, owner, mtime_ns = slot_of(needle.parent) + 1, needle.record_size, needle.record_owner, needle.mtime_ns
    kind = needle.kind
    if kind in _REMOVING:
        size, owner = slot_of(needle.extra_u64(Tag.REPLACED)) + 1, needle.flags
        mtime_ns = slot_of(needle.extra_u64(Tag.TARGET)) + 1
    elif kind == _OWNER:
        parent, size, name_offset = needle.uid, needle.gid, needle.mode
    return INDEX_RECORD.pack(
        kind,
        slot_of(needle.inode) + 1,
        parent,
        name_offset,
        offset // ALIGNMENT,
        size,
        mtime_ns,
        seconds(needle.ctime_ns),
        owner,
        value | (needle.inode >> 32 & 0xFF) << 24,
    )


class Names:
    """The names of one volume: a file, and for a store that must not be written what the file lacks.

    From *tail_start* on the names are those in *tail*, if there is one.
    """

    def __init__(self, disk: Disk, file: int | None, tail_start: int = 0, tail: bytes = b"") -> None:
        self._disk = disk
        self._file = file
        self._tail_start = tail_start
        self._tail = tail

    def close(self) -> None:
        if self._file is not None:
            self._disk.close(self._file)

    def get(self, offset: int, *, nowait: bool = False) -> bytes:
        """Return the name that stands at *offset*; WouldBlock as Disk.read."""
        if not offset:
            return b""
        if self._file is None or (self._tail and offset >= self._tail_start):
            at = offset - self._tail_start
            data = self._tail[at : at + NAME_BYTES_READ]
        else:
            data = self._disk.read(self._file, offset, NAME_BYTES_READ, nowait=nowait)
        if not data or len(data) <= data[0]:
            raise Damaged(f".names ends within the name at offset {offset}; run imgfs rebuild-index")
        name = data[1 : 1 + data[0]]
        if b"/" in name or b"\0" in name or name in _NO_NAMES:
            raise Damaged(f".names holds no name at offset {offset}; run imgfs rebuild-index")
        return name

    def stretch(self, offset: int, size: int, *, nowait: bool = False) -> bytes:
        """Return up to *size* bytes from *offset* on, fewer where the names end; WouldBlock as Disk.read."""
        in_file = max(self._tail_start - offset, 0) if self._tail else size
        data = b""
        if self._file is not None and in_file:
            data = self._disk.read(self._file, offset, min(size, in_file), nowait=nowait)
        if self._tail and len(data) == in_file:
            at = max(offset - self._tail_start, 0)
            data += self._tail[at : at + size - len(data)]
        return data

    def add(self, name: bytes) -> int:
        """Keep *name* in memory, behind all others, and return its offset; for a volume nobody appends to."""
        offset = self._tail_start + len(self._tail)
        self._tail += pack_name(name)
        return offset

    def prefetch(self) -> None:
        """Let the disk read all names into the page cache."""
        if self._file is not None:
            self._disk.prefetch(self._file, 0, self._disk.size(self._file))


def checkpoint(state: IndexState, *, seal: bool) -> Needle:
    """Return the needle that says the index files reached *state*; with *seal*, that the volume ends with it."""
    extras: dict[int, bytes] = {Tag.CHECKPOINT: INDEX_STATE.pack(*state)}
    return Needle(Kind.CHECKPOINT, 0, flags=FLAG_SEAL if seal else 0, extras=extras)


def checkpoint_state(needle: Needle) -> IndexState | None:
    """Return what a checkpoint needle says, None for any other."""
    value = needle.extras.get(Tag.CHECKPOINT, b"")
    if needle.kind != Kind.CHECKPOINT or len(value) != INDEX_STATE.size:
        return None
    return IndexState(*INDEX_STATE.unpack(value))


def trusted_state(
    records: bytes, names: bytes, volume: Volume, end: int, sealed_state: IndexState | None
) -> IndexState:
    """Return the longest state of the index files that a checkpoint in *volume* vouches for.

    *records* and *names* are the whole files; *end* is where the volume ends at most. *sealed_state* is what the
    header of a later volume says of this one.
    """
    if sealed_state is not None and _matches(sealed_state, records, names, end):
        return sealed_state
    position = len(records) - len(records) % INDEX_RECORD_BYTES
    while position:
        position -= INDEX_RECORD_BYTES
        if records[position] != Kind.CHECKPOINT:
            continue
        offset = INDEX_RECORD.unpack_from(records, position)[4] * ALIGNMENT
        try:
            state = checkpoint_state(volume.header_at(offset))
        except Damaged:
            continue
        if state is not None and state.end <= offset < end and _matches(state, records, names, end):
            return state
    return empty_state(volume.header.volume_id)


def _matches(state: IndexState, records: bytes, names: bytes, end: int) -> bool:
    size = state.records * INDEX_RECORD_BYTES
    return (
        state.end <= end
        and len(records) >= size
        and len(names) >= state.names_bytes
        and crc32c(memoryview(records)[:size]) == state.records_crc
        and crc32c(memoryview(names)[: state.names_bytes]) == state.names_crc
    )


def names_a_name(kind: int) -> bool:
    """Return whether needles of *kind* carry a name that belongs into `.names`."""
    return kind in _NAMING


def state_of(records: bytes | bytearray, names: bytes | bytearray, end: int) -> IndexState:
    """Return the state of index files with that content, which cover a volume up to *end*."""
    return IndexState(end, len(records) // INDEX_RECORD_BYTES, crc32c(records), len(names), crc32c(names))
