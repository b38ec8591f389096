"""Every byte of the shared memory is declared here: which region lies where, and what a record holds.

Owns offsets and structs. Must not know who changes them. The whole is one sparse mapping: a region takes
memory only as far as it is used.
"""

import struct

LAYOUT_VERSION = 1
SLOTS_MAX = 1 << 28  # images, directories and links of one store
PAGE = 4096


class Word:
    """The 64-bit words at the start of the mapping, by number.

    Plain numbers, which index a memoryview five times faster than those of an enum.
    """

    VERSION = 0
    COUNTER = 1  # odd while the table changes
    JOURNAL = 2  # before-images held in the journal
    SLOTS = 3  # slots ever used: records 0 .. SLOTS - 1
    FREE_HEAD = 4  # slot + 1 of the freed slot that has rested longest
    FREE_TAIL = 5
    FREE_COUNT = 6
    FILES = 7
    DIRECTORIES = 8
    SYMLINKS = 9
    ARENA_END = 10  # units of bucket memory ever used
    OWNERS = 11  # owner entries in use
    VOLUMES = 12  # volume entries in use
    NEXT_SEQUENCE = 13
    ACTIVE = 14  # entry of the active volume
    ACTIVE_END = 15  # bytes of it that hold needles which are applied to the table
    DURABLE = 16  # bytes of it known durable
    INDEX_RECORDS = 17  # of the active volume
    INDEX_CRC = 18
    NAMES_END = 19
    NAMES_CRC = 20
    CHECKPOINT_RECORDS = 21  # INDEX_RECORDS at its last checkpoint
    HANDLES = 22  # handle words ever used
    STAGED = 23  # staging entries ever used
    STALE_DIRECTORIES = 24  # directories whose mtime is newer than their last needle
    RARE_ENTRIES = 25  # entries of rare.py ever used
    RARE_FREE = 26  # its first free entry + 1
    RARE_COUNT = 27  # its entries in use
    ARENA_FREE = 32  # 32 words: first free region of each size


WORDS = 64

_NEXT = 0


def _region(size: int) -> int:
    """Reserve *size* bytes on pages of their own; return the offset."""
    global _NEXT
    start = _NEXT
    _NEXT += -(-size // PAGE) * PAGE
    return start


# The journal holds the before-image of every word the change in hand overwrites.
JOURNAL_ENTRY = struct.Struct("<QQ48s")  # offset, length, bytes
JOURNAL_DATA_MAX = 48
JOURNAL_ENTRIES = 4096

OWNER = struct.Struct("<IIHxxI")  # uid, gid, mode, entry + 1 of the last volume that defines it
OWNERS_MAX = 1 << 16

VOLUME = struct.Struct("<QQQQ")  # id, end in bytes, first sequence, flags
VOLUMES_MAX = 1 << 16
VOLUME_SEALED = 1

HANDLE = struct.Struct("<Q")  # inode (40 bits), flags (8 bits), nonce (16 bits)
HANDLES_MAX = 1 << 16

# inode, flags, owner, size, mtime ns, ctime ns, process that created it, name length, name
STAGED = struct.Struct("<QIIQqqIB255s")
STAGED_BYTES = 320
STAGED_MAX = 4096

# flags, volume, volume of the name, parent slot + 1, name offset, offset / 8, size, mtime ns, ctime s, owner,
# name hash | generation << 24
RECORD = struct.Struct("<BHHIIIIqIHI")
RECORD_BYTES = 39
assert RECORD.size == RECORD_BYTES

# What few inodes have: next entry + 1 of the same chain, slot + 1, generation, links, then of the needle with its
# extended attributes entry + 1 of the volume, offset / 8, bytes of data
RARE = struct.Struct("<IIIIIII")
RARE_MAX = 1 << 26
RARE_HEADS = 1 << 18

LINK_BYTES = 4  # next record of the same bucket
BUCKET_BYTES = 4  # first record of a bucket
ARENA_UNIT = 16  # the smallest bucket region: four buckets

WORDS_AT = _region(WORDS * 8)
JOURNAL_AT = _region(JOURNAL_ENTRY.size * JOURNAL_ENTRIES)
OWNERS_AT = _region(OWNER.size * OWNERS_MAX)
VOLUMES_AT = _region(VOLUME.size * VOLUMES_MAX)
HANDLES_AT = _region(HANDLE.size * HANDLES_MAX)
STAGED_AT = _region(STAGED_BYTES * STAGED_MAX)
RARE_HEADS_AT = _region(4 * RARE_HEADS)
RARE_AT = _region(RARE.size * RARE_MAX)
ARENA_AT = _region(2 * BUCKET_BYTES * SLOTS_MAX)
LINKS_AT = _region(LINK_BYTES * SLOTS_MAX)
RECORDS_AT = _region(RECORD_BYTES * SLOTS_MAX)
MEMORY_BYTES = _NEXT
assert STAGED.size <= STAGED_BYTES


class Flag:
    """The flags byte of a record: its kind in the low four bits, and what is so of it.

    Plain numbers: `&` with an enum.IntFlag takes a microsecond, and a request does some ten of them.
    """

    KIND = 0x0F
    DEAD = 0x10  # unlinked; rests until no handle needs it and its turn comes
    STAGED = 0x20  # being written: size and data are in staging
    UNBORN = 0x40  # created, but no needle has named it yet; its name is in staging
    STALE_MTIME = 0x80  # a directory that changed since its last needle
    LINKED = 0x80  # of all else: it has further names; rare.py knows how many


# Offsets of single fields within a record, for changes of one field.
AT_FLAGS = 0
AT_VOLUME = 1
AT_NAME_VOLUME = 3
AT_PARENT = 5
AT_NAME_OFFSET = 9
AT_OFFSET8 = 13
AT_SIZE = 17
AT_MTIME = 21
AT_CTIME = 29
AT_OWNER = 33
AT_HASH = 35

# A directory uses these fields of its record for its buckets.
AT_SUBDIRECTORIES = AT_VOLUME  # 2 bytes, stays at SUBDIRECTORIES_MANY once it got there
AT_BUCKETS = AT_OFFSET8  # first record, or the unit of its bucket region, see buckets.py
AT_CHILDREN = AT_SIZE
SUBDIRECTORIES_MANY = 0xFFFF
