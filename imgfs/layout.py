"""Every byte of the shared memory is declared here: which region lies where, and what a record holds.

Owns offsets and structs. Must not know who changes them. The whole is one sparse mapping: a region takes
memory only as far as it is used.
"""

import struct

LAYOUT_VERSION = 5  # another one cannot take the memory over; see `Store.attach`
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
    DURABLE = 15  # bytes of it known durable
    ACTIVE_END = 16  # bytes of it that hold needles which are applied to the table
    INDEX_RECORDS = 17  # of the active volume
    INDEX_CRC = 18
    NAMES_END = 19
    NAMES_CRC = 20
    APPENDING = 21  # 0, or what is being appended behind ACTIVE_END, see `appending`
    CHECKPOINT_RECORDS = 22  # INDEX_RECORDS at its last checkpoint
    HANDLES = 23  # handle words ever used
    STAGED = 24  # staging entries ever used
    STALE_DIRECTORIES = 25  # directories whose mtime is newer than their last needle
    SYNCED = 26  # end in bytes | entry << 48 of what the last sync covered
    FAILED = 27  # 0, or why the store takes no changes: reason << 32 | errno
    NOTES = 28  # requests in the list of resent ones that were applied
    NOTE_ROWS = 29  # rows of that list ever used
    RARE_ENTRIES = 30  # entries of rare.py ever used
    RARE_FREE = 31  # its first free entry + 1
    RARE_COUNT = 32  # its entries in use
    FAILURES = 33  # syncs that failed
    SYNCING = 34  # 1 while a sync runs, or if its process was killed
    VOLUMES_GONE = 35  # volumes that were removed since the store was opened
    ROWS_FREE = 36  # rows of the volume table that are free
    ROOM_OFFERED = 37  # 1 if somebody gives space back when he is asked
    ROOM_ASKED = 38  # how often somebody asked for room
    ROOM_ANSWERED = 39  # up to which of these it was seen to
    SOUND = 41  # 1 if nothing was wrong when the store was opened: a clean stop may keep the table
    ARENA_FREE = 64  # 32 words: first free region of each size


WORDS = 128


# In place of that: the records of the volume with entry APPENDING >> 8 are moved to where its needles are now.
MOVING = 2
# Or: many images in one write, see batch.py.
BATCH = 4


def appending(row: int, staged: int) -> int:
    """Return the value of APPENDING: the row of the request it is for and the staging entry it stores, or -1."""
    return 1 | row + 1 << 8 | staged + 1 << 32


def appended_for(value: int) -> tuple[int, int]:
    """Return what `appending` was given."""
    return (value >> 8 & 0xFF_FFFF) - 1, (value >> 32) - 1


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
VOLUME_GONE = 2  # its needles were copied elsewhere, and it is removed: the row is free

HANDLE = struct.Struct("<Q")  # inode (40 bits), flags (8 bits), nonce (16 bits); the nonce stays when it is freed
HANDLES_MAX = 1 << 16
# A process takes free handles by the chunk, under the lock; it hands them out and gets them back without any.
HANDLE_CHUNK = 64
HANDLE_OWNER = struct.Struct("<I")  # pid of the process a chunk belongs to, 0: nobody's
HANDLE_OWNERS = HANDLES_MAX // HANDLE_CHUNK

# A request in hand: handle, inode, applied, thread, node, key, 1 if it waits for room, opcode (0: the row is free)
REQUEST = struct.Struct("<8Q")
WORKERS_MAX = 16
TASKS_MAX = 128  # requests one worker has in hand at the same time
REQUESTS_MAX = WORKERS_MAX * TASKS_MAX
# A request of a worker that died, which the kernel resent: the same, 0, time in ns
NOTE = struct.Struct("<10Q")

# inode, flags, owner, size, mtime ns, ctime ns, process that created it, name length, name
STAGED = struct.Struct("<QIIQqqIB255s")
STAGED_STATE = struct.Struct("<IIQqq")  # what changes of an entry, from AT_STAGED_STATE on
AT_STAGED_STATE = 8
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

ATIME = struct.Struct("<Qq")  # inode, ns
ATIMES_MAX = 1 << 12

LINK_BYTES = 4  # next record of the same bucket
BUCKET_BYTES = 4  # first record of a bucket
ARENA_UNIT = 16  # the smallest bucket region: four buckets

WORDS_AT = _region(WORDS * 8)
JOURNAL_AT = _region(JOURNAL_ENTRY.size * JOURNAL_ENTRIES)
OWNERS_AT = _region(OWNER.size * OWNERS_MAX)
VOLUMES_AT = _region(VOLUME.size * VOLUMES_MAX)
HANDLES_AT = _region(HANDLE.size * HANDLES_MAX)
HANDLE_OWNERS_AT = _region(HANDLE_OWNER.size * HANDLE_OWNERS)
REQUESTS_AT = _region(REQUEST.size * REQUESTS_MAX)
NOTES_AT = _region(NOTE.size * REQUESTS_MAX)
STAGED_AT = _region(STAGED_BYTES * STAGED_MAX)
ATIMES_AT = _region(ATIME.size * ATIMES_MAX)
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
