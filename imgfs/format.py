"""Every byte imgfs writes to disk is declared here; docs/format.md is the same in prose.

Owns the structs, their checksums and the limits that follow from them; the superblock, which is JSON, is in
superblock.py. Must not know files: it packs and unpacks buffers. All numbers are little-endian.
"""

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash
from crc32c import crc32c

from imgfs.disk import Buffer
from imgfs.errors import Damaged, NewerFormat

FORMAT_VERSION = 1
READABLE_BY = "0.1.0"  # the first release that reads this version
# Feature bits this release understands: a set bit outside the first mask makes the store unreadable for it.
KNOWN_INCOMPATIBLE = 0
KNOWN_COMPATIBLE = 0

ALIGNMENT = 8  # offsets are kept in units of this, so that 4 bytes reach 32 GiB
VOLUME_BYTES_LIMIT = ALIGNMENT << 32
NAME_BYTES_MAX = 255
IMAGE_BYTES_MAX = (1 << 32) - 1
SYMLINK_BYTES_MAX = 4095  # PATH_MAX less the NUL
CHUNK_BYTES = 1 << 20  # one checksum for so many bytes of a larger image


class Kind(enum.IntEnum):
    """What a needle says; the numbers are on disk. The first four put a whole inode, LINK a further name of one."""

    FREE = 0
    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    SPECIAL = 4
    DELETE = 5
    RENAME = 6
    EXCHANGE = 7
    LINK = 8
    ATTRIBUTES = 9
    XATTR = 10
    OWNER = 11
    CHECKPOINT = 12


# Plain numbers, for what is done with every needle: a name of an enum takes as long as a call.
_SPECIAL, _LINK = int(Kind.SPECIAL), int(Kind.LINK)
PUT_KINDS = frozenset({Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.SPECIAL, Kind.LINK})
# Kinds that say owner and mode of their inode.
OWNED_KINDS = PUT_KINDS - {Kind.LINK} | {Kind.ATTRIBUTES}
FLAG_SEAL = 1  # on a checkpoint: the last needle of its volume
FLAG_LAST = 2  # on a delete or rename: the link that goes was the last name of its target, which goes too
FLAG_BARE = 4  # on a delete or rename: the inode that loses its own name lives on under its links
FLAG_PAIR = 8  # this needle and the next stand or fall together


class Tag(enum.IntEnum):
    """Extra fields behind a header: tag and length (2 + 2 bytes), the value, zeros to the next multiple of 8."""

    PREVIOUS_END = 1  # volume header: where the volume before this one ends, and the state of its index there
    READABLE_BY = 2  # volume header: the first release that reads this format, as text
    OLD_PARENT = 3  # rename: the directory the name was taken from
    REPLACED = 4  # rename: the inode that had the new name
    CHECKPOINT = 5  # checkpoint: the state of the index files
    TARGET = 6  # link: the inode it names; delete, rename: the inode that the link that goes has named
    DEVICE = 7  # special file: its device number
    REPLACES = 8  # volume header: ids of the volumes whose needles were copied into this one
    RESCUED = 9  # put: the sequence number of the needle that a repair copied this from


class IndexState(NamedTuple):
    """What `.idx` and `.names` hold of the first *end* bytes of a volume, with the CRC-32C of those parts."""

    end: int
    records: int
    records_crc: int
    names_bytes: int
    names_crc: int


INDEX_STATE = struct.Struct("<QQIQI")


class PreviousEnd(NamedTuple):
    """Where an earlier volume that could not be sealed with a needle of its own ends."""

    volume_id: int
    torn_bytes: int
    index_state: IndexState


PREVIOUS_END = struct.Struct("<QQ")

# -- volume header ------------------------------------------------------------------------------------------------

VOLUME_MAGIC = b"imgfsvol"
VOLUME_HEADER = struct.Struct("<8sHHIII16s16sQQqQ")
VOLUME_HEADER_FIELDS = (
    *("magic", "version", "length", "incompatible", "compatible", "padding", "store_id", "salt"),
    *("volume_id", "first_sequence", "created_ns", "volume_bytes_max"),
)
CHECKSUM = struct.Struct("<Q")
VOLUME_HEADER_BYTES = VOLUME_HEADER.size + CHECKSUM.size
# The header stands twice, a page apart: without its salt no needle of the volume could be recognised.
VOLUME_HEADER_COPIES = (0, 4096)
NEEDLES_START = 8192
REPLACES_MAX = 256  # ids that fit into a header


@dataclass(frozen=True)
class VolumeHeader:
    """What a volume says of itself."""

    store_id: bytes
    salt: bytes
    volume_id: int
    first_sequence: int
    created_ns: int
    volume_bytes_max: int
    previous: PreviousEnd | None = None
    replaces: tuple[int, ...] = ()

    def seed(self) -> int:
        """Return the seed of this volume's header checksums."""
        return xxhash.xxh3_64_intdigest(self.salt + CHECKSUM.pack(self.volume_id))


def pack_extras(extras: Mapping[int, bytes]) -> bytes:
    """Return the tagged fields as they follow a header, padded to a multiple of 8 bytes each."""
    parts = []
    for tag, value in extras.items():
        part = struct.pack("<HH", tag, len(value)) + value
        parts.append(part + bytes(-len(part) % ALIGNMENT))
    return b"".join(parts)


def unpack_extras(data: Buffer) -> dict[int, bytes]:
    """Return the tagged fields in *data*; unknown tags are kept, a field that runs past the end is dropped."""
    extras: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        tag, length = struct.unpack_from("<HH", data, offset)
        if offset + 4 + length > len(data):
            break
        extras[tag] = bytes(data[offset + 4 : offset + 4 + length])
        offset += 4 + length + (-(4 + length) % ALIGNMENT)
    return extras


def pack_volume_header(header: VolumeHeader) -> bytes:
    """Return the first `NEEDLES_START` bytes of a volume: both copies of *header*."""
    tagged: dict[int, bytes] = {Tag.READABLE_BY: READABLE_BY.encode()}
    if header.previous is not None:
        previous = header.previous
        ends = PREVIOUS_END.pack(previous.volume_id, previous.torn_bytes)
        tagged[Tag.PREVIOUS_END] = ends + INDEX_STATE.pack(*previous.index_state)
    if header.replaces:
        tagged[Tag.REPLACES] = struct.pack(f"<{len(header.replaces)}Q", *header.replaces)
    extras = pack_extras(tagged)
    fixed = VOLUME_HEADER.pack(
        VOLUME_MAGIC,
        FORMAT_VERSION,
        VOLUME_HEADER_BYTES + len(extras),
        0,
        0,
        0,
        header.store_id,
        header.salt,
        header.volume_id,
        header.first_sequence,
        header.created_ns,
        header.volume_bytes_max,
    )
    copy = fixed + CHECKSUM.pack(xxhash.xxh3_64_intdigest(fixed + extras)) + extras
    gap = bytes(VOLUME_HEADER_COPIES[1] - len(copy))
    return copy + gap + copy + gap


def unpack_volume_header(data: Buffer) -> VolumeHeader:
    """Return the header in the first `NEEDLES_START` bytes of a volume, from whichever copy is whole.

    Raises:
        NewerFormat: the volume uses a version or a feature this release does not know.
        Damaged: neither copy is whole.
    """
    for start in VOLUME_HEADER_COPIES:
        copy = bytes(data[start : start + VOLUME_HEADER_COPIES[1]])
        if len(copy) < VOLUME_HEADER_BYTES or not copy.startswith(VOLUME_MAGIC):
            continue
        fields = VOLUME_HEADER.unpack_from(copy)
        _, version, length, incompatible, _, _, store_id, salt, volume_id, first, created_ns, limit = fields
        if not VOLUME_HEADER_BYTES <= length <= len(copy):
            continue
        extras_data = copy[VOLUME_HEADER_BYTES:length]
        (checksum,) = CHECKSUM.unpack_from(copy, VOLUME_HEADER.size)
        if checksum != xxhash.xxh3_64_intdigest(copy[: VOLUME_HEADER.size] + extras_data):
            continue
        extras = unpack_extras(extras_data)
        if version > FORMAT_VERSION or incompatible & ~KNOWN_INCOMPATIBLE:
            release = extras.get(Tag.READABLE_BY, b"a newer one").decode(errors="replace")
            raise NewerFormat(f"volume {volume_id} has format {version}; install imgfs {release} or newer to read it")
        previous, value, ids = None, extras.get(Tag.PREVIOUS_END, b""), extras.get(Tag.REPLACES, b"")
        if len(value) not in (0, PREVIOUS_END.size + INDEX_STATE.size) or len(ids) % 8:
            continue
        if value:
            index = IndexState(*INDEX_STATE.unpack_from(value, PREVIOUS_END.size))
            volume_before, torn_bytes = PREVIOUS_END.unpack_from(value)
            previous = PreviousEnd(volume_before, torn_bytes, index)
        replaces = struct.unpack(f"<{len(ids) // 8}Q", ids)
        return VolumeHeader(store_id, salt, volume_id, first, created_ns, limit, previous, replaces)
    raise Damaged("neither copy of the volume header is whole")


# -- needle -------------------------------------------------------------------------------------------------------

NEEDLE_MAGIC = 0x4C44454E  # "NEDL"
NEEDLE_HEADER = struct.Struct("<IHBBQQQqqqQIIIHHH6x")  # the last 6 bytes are kept for later
NEEDLE_HEADER_FIELDS = (
    *("magic", "header_bytes", "kind", "flags", "sequence", "inode", "parent", "mtime_ns", "ctime_ns", "commit_ns"),
    *("durable", "data_size", "uid", "gid", "mode", "owner", "name_bytes"),
)
NEEDLE_HEADER_BYTES = NEEDLE_HEADER.size + CHECKSUM.size
# CRC-32C of the data; CRC-32C of this footer's other bytes, seeded with the header's checksum
FOOTER = struct.Struct("<II")
FOOTER_FIELDS = ("data_crc", "footer_crc")
_CHUNK_CRC = struct.Struct("<I")


@dataclass(slots=True)
class Needle:
    """The header of a needle, unpacked; its data lies behind it."""

    kind: int
    inode: int
    parent: int = 0
    name: bytes = b""
    data_size: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    owner: int = 0
    mtime_ns: int = 0  # as `storable_ns` gives it
    ctime_ns: int = 0
    commit_ns: int = 0
    sequence: int = 0
    durable: int = 0
    flags: int = 0
    extras: dict[int, bytes] = field(default_factory=dict)
    header_bytes: int = NEEDLE_HEADER_BYTES
    checksum: int = 0

    @property
    def data_start(self) -> int:
        """Offset of the data from the start of the needle, in bytes."""
        return self.header_bytes + len(self.name)

    @property
    def length(self) -> int:
        """Length of the whole needle in bytes, up to the next multiple of 8."""
        size = self.data_size
        return aligned(self.header_bytes + len(self.name) + size + (footer_bytes(size) if size else 0))

    def extra_u64(self, tag: Tag) -> int:
        """Return the number in extra field *tag*, 0 where there is none."""
        value = self.extras.get(tag)
        return int.from_bytes(value, "little") if value else 0

    @property
    def record_size(self) -> int:
        """What a record keeps of this put as its size: of a link the slot + 1 of its target, else bytes of data."""
        if self.kind == _LINK:
            return slot_of(self.extra_u64(Tag.TARGET)) + 1
        return self.extra_u64(Tag.DEVICE) if self.kind == _SPECIAL else self.data_size

    @property
    def record_owner(self) -> int:
        """What a record keeps of this put as its owner: of a link the generation of its target."""
        return self.extra_u64(Tag.TARGET) >> 32 if self.kind == _LINK else self.owner


def aligned(size: int) -> int:
    """Return *size* rounded up to a multiple of 8."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def footer_bytes(data_size: int) -> int:
    """Return the length of the footer behind *data_size* bytes of data; without data there is none."""
    if data_size <= CHUNK_BYTES:
        return FOOTER.size if data_size else 0
    return FOOTER.size + _CHUNK_CRC.size * -(-data_size // CHUNK_BYTES)


def pack_needle_header(needle: Needle, seed: int, offset: int) -> bytes:
    """Return header, extras and name of *needle* as they stand at *offset*; sets its checksum and header length."""
    extras = pack_extras(needle.extras) if needle.extras else b""
    needle.header_bytes = NEEDLE_HEADER_BYTES + len(extras)
    fixed = NEEDLE_HEADER.pack(
        NEEDLE_MAGIC,
        needle.header_bytes,
        needle.kind,
        needle.flags,
        needle.sequence,
        needle.inode,
        needle.parent,
        needle.mtime_ns,
        needle.ctime_ns,
        needle.commit_ns,
        needle.durable,
        needle.data_size,
        needle.uid,
        needle.gid,
        needle.mode,
        needle.owner,
        len(needle.name),
    )
    tail = extras + needle.name
    needle.checksum = xxhash.xxh3_64_intdigest(fixed + tail, (seed + offset) & 0xFFFF_FFFF_FFFF_FFFF)
    return fixed + CHECKSUM.pack(needle.checksum) + tail


def header_checksum(data: Buffer, end: int, seed: int, offset: int) -> int:
    """Return the checksum that a header which starts *data*, and ends with its name before *end*, has at *offset*."""
    covered = bytes(data[: NEEDLE_HEADER.size]) + bytes(data[NEEDLE_HEADER_BYTES:end])
    return xxhash.xxh3_64_intdigest(covered, (seed + offset) & 0xFFFF_FFFF_FFFF_FFFF)


def unpack_needle_header(data: Buffer, seed: int, offset: int) -> Needle | None:
    """Return the needle whose header starts *data* and stands at *offset* of its volume.

    None where it is not whole: *data* is too short, or these bytes were not written there as a header.
    """
    if len(data) < NEEDLE_HEADER_BYTES:
        return None
    fields = NEEDLE_HEADER.unpack_from(data)
    magic, header_bytes, kind, flags, sequence, inode, parent, mtime_ns, ctime_ns, commit_ns = fields[:10]
    durable, data_size, uid, gid, mode, owner, name_bytes = fields[10:]
    if magic != NEEDLE_MAGIC or not NEEDLE_HEADER_BYTES <= header_bytes <= len(data) - name_bytes:
        return None
    (checksum,) = CHECKSUM.unpack_from(data, NEEDLE_HEADER.size)
    if checksum != header_checksum(data, header_bytes + name_bytes, seed, offset):
        return None
    tail = bytes(data[NEEDLE_HEADER_BYTES : header_bytes + name_bytes])
    extras_bytes = header_bytes - NEEDLE_HEADER_BYTES
    extras = unpack_extras(tail[:extras_bytes]) if extras_bytes else {}
    # By place, which takes half the time: a rebuild does this for every needle of the store.
    return Needle(
        *(kind, inode, parent, tail[extras_bytes:], data_size, mode, uid, gid, owner, mtime_ns, ctime_ns, commit_ns),
        *(sequence, durable, flags, extras, header_bytes, checksum),
    )


# The longest header with its name: what a scan reads to be sure of one.
NEEDLE_HEADER_BYTES_MAX = NEEDLE_HEADER_BYTES + 64 + NAME_BYTES_MAX


class Checksums(NamedTuple):
    """The CRC-32C of an image's data, and of each of its MiB if it has more than one."""

    data: int
    chunks: tuple[int, ...]


class ChecksumBuilder:
    """Computes `Checksums` from data that comes in pieces."""

    def __init__(self) -> None:
        self._data = 0
        self._chunk = 0
        self._chunk_fill = 0
        self._chunks: list[int] = []

    def add(self, piece: Buffer) -> None:
        view = memoryview(piece)
        self._data = crc32c(view, self._data)
        while len(view):
            part = view[: CHUNK_BYTES - self._chunk_fill]
            self._chunk = crc32c(part, self._chunk)
            self._chunk_fill += len(part)
            view = view[len(part) :]
            if self._chunk_fill == CHUNK_BYTES:
                self._chunks.append(self._chunk)
                self._chunk = self._chunk_fill = 0

    def finish(self) -> Checksums:
        """Return the checksums of all that was added; nothing may be added afterwards."""
        chunks = self._chunks + ([self._chunk] if self._chunk_fill else [])
        return Checksums(self._data, tuple(chunks) if len(chunks) > 1 else ())


def checksums(data: Buffer) -> Checksums:
    """Return the checksums of *data*, a whole image."""
    if len(data) <= CHUNK_BYTES:
        return Checksums(crc32c(data), ())
    builder = ChecksumBuilder()
    builder.add(data)
    return builder.finish()


def pack_footer(sums: Checksums, data_size: int, header_checksum: int) -> bytes:
    """Return the footer behind *data_size* bytes of data, and the zeros that are part of it; see `footer_bytes`."""
    if not data_size:
        return b""
    body = _CHUNK_CRC.pack(sums.data)
    if sums.chunks:
        body = b"".join(map(_CHUNK_CRC.pack, sums.chunks)) + body
    return body + _CHUNK_CRC.pack(crc32c(body, header_checksum & 0xFFFF_FFFF))


def unpack_footer(footer: Buffer, data_size: int, header_checksum: int) -> Checksums | None:
    """Return the checksums in *footer*, None where it is damaged or belongs to another header."""
    size = footer_bytes(data_size)
    if not size:
        return Checksums(0, ())
    if len(footer) < size:
        return None
    body = footer[: size - _CHUNK_CRC.size]
    (own,) = _CHUNK_CRC.unpack_from(footer, size - _CHUNK_CRC.size)
    if own != crc32c(body, header_checksum & 0xFFFF_FFFF):
        return None
    values = [value for (value,) in _CHUNK_CRC.iter_unpack(body)]
    return Checksums(values[-1], tuple(values[:-1]))


# -- extended attributes ------------------------------------------------------------------------------------------

_XATTR = struct.Struct("<HI")  # lengths of name and value, which follow


def pack_xattrs(attributes: Mapping[bytes, bytes]) -> bytes:
    """Return the data of the needle that says all extended attributes of an inode."""
    return b"".join(_XATTR.pack(len(name), len(value)) + name + value for name, value in attributes.items())


def unpack_xattrs(data: Buffer) -> dict[bytes, bytes]:
    """Return the extended attributes in *data*, which is known to be what was written; Damaged if that is none."""
    attributes = {}
    at = 0
    while at < len(data):
        start = at + _XATTR.size
        name_length, value_length = _XATTR.unpack_from(data, at) if start <= len(data) else (0, 0)
        at = start + name_length + value_length
        if not name_length or at > len(data):
            raise Damaged("what was written as extended attributes is none")
        attributes[bytes(data[start : start + name_length])] = bytes(data[start + name_length : at])
    return attributes


# -- index files --------------------------------------------------------------------------------------------------

INDEX_RECORD = struct.Struct("<BIIIIIqIHI")
# slot and parent are slot + 1, offset8 is offset / 8, the last is name hash | generation << 24
INDEX_RECORD_FIELDS = (
    *("kind", "slot", "parent", "name_offset", "offset8", "size", "mtime", "ctime", "owner", "hash_generation"),
)
INDEX_RECORD_BYTES = 39
assert INDEX_RECORD.size == INDEX_RECORD_BYTES

NAMES_MAGIC = b"imgfsnam"
NAMES_HEADER = struct.Struct("<8sQ")
NAMES_HEADER_FIELDS = ("magic", "volume_id")
NAMES_BYTES_LIMIT = 1 << 32


def inode_of(slot: int, generation: int) -> int:
    """Return the inode number: slot + 1 + generation x 2^32."""
    return slot + 1 | generation << 32


def slot_of(inode: int) -> int:
    """Return the slot in *inode*; that of 0, which no image has, is -1."""
    return (inode & 0xFFFF_FFFF) - 1


def storable_ns(time_ns: int) -> int:
    """Return the time nearest to *time_ns* that needles and records can hold: 64 bits, from 1677 to 2262."""
    return min(max(time_ns, -(1 << 63)), (1 << 63) - 1)


def seconds(time_ns: int) -> int:
    """Return the whole seconds of *time_ns* as records hold them: 32 bits, from 1970 to 2106."""
    return min(max(time_ns // 1_000_000_000, 0), 0xFFFF_FFFF)


def name_hash(name: bytes, seed: int) -> int:
    """Return the 24-bit hash of *name* that records hold; *seed* is the store's."""
    return xxhash.xxh3_64_intdigest(name, seed) & 0xFF_FFFF


def hash_seed(store_id: bytes) -> int:
    """Return the seed of the name hashes of the store with that id: nobody can prepare names that collide."""
    return int.from_bytes(store_id[:8], "little")
