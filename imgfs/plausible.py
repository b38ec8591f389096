"""What a writer can have written: the fields of a needle or a volume that no release of this format would write.

A checksum says that bytes are those that were written, not that they make sense: a bug, a bad memory or somebody with a
pen can write anything. Owns the bounds that everything behind a checksum is held against, so that no reader has to
expect more. Must not know what else is in the store.

*Concurrency:* none; these are values.
"""

from imgfs.format import (
    CHUNK_BYTES,
    NAME_BYTES_MAX,
    NEEDLES_START,
    PUT_KINDS,
    SYMLINK_BYTES_MAX,
    VOLUME_BYTES_LIMIT,
    Kind,
    Needle,
    Tag,
    VolumeHeader,
)
from imgfs.layout import SLOTS_MAX

_ROOT = 1
_SLOT_MASK = 0xFFFF_FFFF
_INODES_END = 256 << 32  # behind the last generation
NUMBER_MAX = (1 << 63) - 1  # of volumes and sequence numbers: one more still fits 64 bits
FIRST_SEQUENCE_MAX = NUMBER_MAX >> 1
# An inode gets a slot before it gets a sequence number: that many may have waited for their first needle, rested, or
# been held by handles. So a slot is never much higher than the sequence number of a needle that speaks of it.
SLOTS_AHEAD_MAX = 1 << 20
# What one volume can hold of sequence numbers: 2^32 needles, times the volumes whose needles may be copied into one. A
# needle that lies about its number must not use up those of all to come.
_SEQUENCES_MAX = 1 << 41

_TARGET, _DEVICE = int(Tag.TARGET), int(Tag.DEVICE)
_INODE_TAGS = (_TARGET, int(Tag.REPLACED))
_DATA_BYTES_MAX: dict[int, int] = {Kind.SYMLINK: SYMLINK_BYTES_MAX, Kind.XATTR: CHUNK_BYTES}
_NO_NAMES = (b".", b"..")
_PERMISSIONS = 0o7777
_FILE_TYPES = frozenset({0o010000, 0o020000, 0o060000, 0o140000})  # pipe, devices, socket
_NO_TYPE = (0,)
_FILE, _DIRECTORY, _SYMLINK = int(Kind.FILE), int(Kind.DIRECTORY), int(Kind.SYMLINK)
_SPECIAL, _LINK = int(Kind.SPECIAL), int(Kind.LINK)

# What holds for a kind, as bits: one look instead of many, for each needle that is read passes here.
_KNOWN = 1
_OF_AN_INODE = 2
_OF_NO_INODE = 4
_OF_THE_ROOT = 8  # that one may also be about the root
_NAMED = 16
_NAMELESS_TOO = 32  # of which only links may be left
_MODE = 64
_LIMITED = 128
_RULES = [0, *[_KNOWN] * 255]
for _rule, _kinds in (
    (_OF_AN_INODE, (*PUT_KINDS, Kind.DELETE, Kind.RENAME, Kind.ATTRIBUTES, Kind.XATTR)),
    (_OF_NO_INODE, (Kind.OWNER, Kind.CHECKPOINT)),
    (_OF_THE_ROOT, (_DIRECTORY, Kind.ATTRIBUTES, Kind.XATTR)),
    (_NAMED, (*PUT_KINDS, Kind.RENAME)),
    (_NAMELESS_TOO, (_FILE, _SYMLINK, _SPECIAL)),
    (_MODE, (_FILE, _DIRECTORY, _SYMLINK, _SPECIAL)),
    (_LIMITED, tuple(_DATA_BYTES_MAX)),
):
    for _kind in _kinds:
        _RULES[_kind] |= _rule


def plausible_header(header: VolumeHeader) -> bool:
    """Return whether *header* can be that of a volume of this format."""
    previous = header.previous
    return (
        0 < header.volume_id <= NUMBER_MAX
        and header.first_sequence <= FIRST_SEQUENCE_MAX
        and NEEDLES_START < header.volume_bytes_max <= VOLUME_BYTES_LIMIT
        and (previous is None or NEEDLES_START <= previous.index_state.end <= VOLUME_BYTES_LIMIT)
    )


def slot_limit(sequence: int) -> int:
    """Return the highest slot + 1 that a needle with that *sequence* number can speak of."""
    return min(sequence + SLOTS_AHEAD_MAX, SLOTS_MAX)


def plausible_needle(needle: Needle, offset: int, first_sequence: int) -> bool:
    """Return whether *needle* can have been written at *offset* of a volume whose header says *first_sequence*.

    Of kinds to come little is known.
    """
    rules, sequence, inode = _RULES[needle.kind], needle.sequence, needle.inode
    if not rules or needle.durable > offset or sequence > first_sequence + _SEQUENCES_MAX:
        return False
    limit = sequence + SLOTS_AHEAD_MAX
    if limit > SLOTS_MAX:
        limit = SLOTS_MAX
    slot_1 = inode & _SLOT_MASK
    if not rules & _OF_AN_INODE:
        return slot_1 <= limit and not (inode and rules & _OF_NO_INODE)
    if not 0 < slot_1 <= limit or inode >= _INODES_END:
        return False
    if slot_1 == _ROOT and (inode != _ROOT or not rules & _OF_THE_ROOT):
        return False
    if rules & _LIMITED and needle.data_size > _DATA_BYTES_MAX[needle.kind]:
        return False
    if rules & _NAMED and not _is_place(needle, limit, rules):
        return False
    if rules & _MODE and needle.mode & ~_PERMISSIONS not in (_FILE_TYPES if needle.kind == _SPECIAL else _NO_TYPE):
        return False
    return _are_extras(needle, limit) if needle.extras else needle.kind != _LINK


def _is_place(needle: Needle, limit: int, rules: int) -> bool:
    """Return whether the directory and the name in *needle* can be those of an entry."""
    name, parent = needle.name, needle.parent
    if needle.inode == _ROOT:
        return parent == _ROOT and not name
    if not parent or not name:
        return not parent and not name and bool(rules & _NAMELESS_TOO)
    if not 0 < parent & _SLOT_MASK <= limit or parent >= _INODES_END or parent == needle.inode:
        return False
    return len(name) <= NAME_BYTES_MAX and b"/" not in name and b"\0" not in name and name not in _NO_NAMES


def _are_extras(needle: Needle, limit: int) -> bool:
    """Return whether the tagged fields of *needle* hold what they can hold."""
    extras = needle.extras
    for tag in _INODE_TAGS:
        value = extras.get(tag)
        if value is None:
            continue
        inode = int.from_bytes(value, "little")
        if len(value) != 8 or not _ROOT < inode & _SLOT_MASK <= limit or inode >= _INODES_END:
            return False
    if len(extras.get(_DEVICE, b"")) > 4:
        return False
    return needle.kind != _LINK or _TARGET in extras
