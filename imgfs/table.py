"""What every image is and where it lies: one 39-byte record per image, directory and link, in shared memory.

Owns records, slots, generations, owners and the counts. Must not know the disk: a needle is applied to the table
after it was appended, and applying the same needles in the same order gives the same table.

*Concurrency:* see memory.py. Methods under "changing" run within `Memory.change`, those under "reading" within
`Memory.consistent`; for a single record there is `whole_record`.
"""

import struct
from collections.abc import Callable, Sequence

from imgfs.buckets import Buckets, record_at
from imgfs.errors import Damaged, StoreLimit
from imgfs.format import (
    ALIGNMENT,
    FLAG_BARE,
    FLAG_LAST,
    Kind,
    Needle,
    Tag,
    inode_of,
    name_hash,
    seconds,
    slot_of,
)
from imgfs.free_slots import FreeSlots
from imgfs.layout import (
    AT_CTIME,
    AT_FLAGS,
    AT_MTIME,
    AT_OWNER,
    AT_PARENT,
    AT_SUBDIRECTORIES,
    RECORD,
    RECORD_BYTES,
    RECORDS_AT,
    SLOTS_MAX,
    SUBDIRECTORIES_MANY,
    VOLUME,
    VOLUME_GONE,
    VOLUME_SEALED,
    VOLUMES_AT,
    VOLUMES_MAX,
    Flag,
    Word,
)
from imgfs.memory import Memory
from imgfs.owners import Owners
from imgfs.rare import NOTHING, Rare
from imgfs.records import Place, Record, VolumeEntry

_U16 = struct.Struct("<H")
# `Record._make` of what has the right number of fields by nature; records are read some thirty times for one image.
_record: Callable[..., Record] = tuple.__new__
_COUNTER, _AT_VOLUME_FLAGS = Word.COUNTER, VOLUME.size - 8  # their lowest byte
_TIMES = struct.Struct("<qI")  # mtime and ctime, next to each other in a record
_KIND, _KIND_OR_DEAD = Flag.KIND, Flag.KIND | Flag.DEAD
_DIRECTORY, _LINK, _DELETE = int(Kind.DIRECTORY), int(Kind.LINK), int(Kind.DELETE)
_WHOLE = (int(Kind.FILE), _DIRECTORY, int(Kind.SYMLINK), int(Kind.SPECIAL))  # what puts a whole inode
# A freed slot that a handle still needs goes to the end of the queue; after so many a new slot is taken.
_ROTATIONS_MAX = 16
# What has one name only: a link to such is one that a volume tells of which contradicts itself.
_NOT_LINKED = (Kind.DIRECTORY, Kind.LINK)
_COUNTS: dict[int, int] = {
    Kind.FILE: Word.FILES,
    Kind.SPECIAL: Word.FILES,
    Kind.DIRECTORY: Word.DIRECTORIES,
    Kind.SYMLINK: Word.SYMLINKS,
}
# What one change has room for.
_OWNERS_AT_ONCE = 1000


class Table(Owners):
    """The records and what belongs to them, on a `Memory` that other processes may share."""

    def __init__(self, memory: Memory, seed: int) -> None:
        """*seed* is the store's, for the hashes of names."""
        super().__init__(memory)
        self.buckets = Buckets(memory)
        self.rare = Rare(memory)
        self._free = FreeSlots(memory)
        self._seed = seed
        # While volumes are replayed, slots fall free in an order that no longer matters; see rebuild_free_queue.
        self.replaying = False

    # -- reading ----------------------------------------------------------------------------------------------

    def record(self, slot: int) -> Record:
        """Return the record of *slot*; all zeros for one never used."""
        if not 0 <= slot < SLOTS_MAX:
            return Record._make(RECORD.unpack(bytes(RECORD_BYTES)))
        return _record(Record, RECORD.unpack_from(self._map, RECORDS_AT + RECORD_BYTES * slot))

    def whole_record(self, slot: int) -> Record:
        """Return the record of *slot* as it was before or after a change; outside of any.

        No processor stores 39 bytes at once: another process that reads them meanwhile gets a mixture.
        """
        words = self.memory.words
        before = words[_COUNTER]
        record = self.record(slot)
        if before & 1 or words[_COUNTER] != before:
            return self.memory.consistent(lambda: self.record(slot))
        return record

    def knows(self, inode: int) -> bool:
        """Return whether there is a record of *inode*, which may have been deleted."""
        record = self.record(slot_of(inode))
        return record.flags & _KIND != 0 and record.generation == inode >> 32

    def target(self, slot: int, record: Record) -> int:
        """Return the inode that the entry in *slot*, which has *record*, is a name of: a link's is another's."""
        if record.flags & _KIND == Kind.LINK:
            return inode_of(record.size - 1, record.owner)
        return inode_of(slot, record.generation)

    def names(self, slot: int, record: Record) -> int:
        """Return how many names the inode in *slot*, which has *record* and is no directory, has."""
        if record.flags & Flag.DEAD:
            return 0
        links = self.rare.get(slot, record.generation).links if record.flags & Flag.LINKED else 0
        return links + (1 if record.parent else 0)

    def hash(self, name: bytes) -> int:
        """Return the 24-bit hash under which *name* is found."""
        return name_hash(name, self._seed)

    def subdirectories(self, slot: int) -> int:
        """Return how many directories lie in the directory *slot*; SUBDIRECTORIES_MANY for that many or more."""
        value: int = _U16.unpack_from(self._map, record_at(slot) + AT_SUBDIRECTORIES)[0]
        return value

    def volume(self, entry: int) -> VolumeEntry:
        """Return row *entry* of the volume table."""
        return VolumeEntry._make(VOLUME.unpack_from(self._map, VOLUMES_AT + VOLUME.size * entry))

    def is_sealed(self, entry: int) -> bool:
        """Return whether the volume in row *entry* of the volume table is sealed."""
        return self._map[VOLUMES_AT + VOLUME.size * entry + _AT_VOLUME_FLAGS] & VOLUME_SEALED != 0

    # -- slots ------------------------------------------------------------------------------------------------

    def next_slot(self, rest: int, in_use: Callable[[int], bool]) -> tuple[int, int]:
        """Return (slot, generation) for a new image: the freed slot that rested longest, or one never used.

        A freed slot is left alone until *rest* others wait behind it, and while *in_use* says a handle needs it.
        Takes nothing yet: `apply` does. Within `Memory.lock`, outside of `change`.

        Raises:
            StoreLimit: the table is full.
        """
        words = self.memory.words
        for _ in range(_ROTATIONS_MAX):
            if words[Word.FREE_COUNT] <= rest:
                break
            slot = words[Word.FREE_HEAD] - 1
            if not in_use(slot):
                record = self.record(slot)
                return slot, (record.generation + 1) & 0xFF if record.flags else 0
            with self.memory.change():
                self._free.take(slot)
                self._free.push(slot)
        slot = words[Word.SLOTS]
        if slot >= SLOTS_MAX:
            raise StoreLimit(f"a store holds at most {SLOTS_MAX} images")
        return slot, 0

    def _take(self, slot: int) -> None:
        """Mark *slot* as used: it waits in the free queue, or was never used."""
        words = self.memory.words
        if slot >= words[Word.SLOTS]:
            self.memory.put_word(Word.SLOTS, slot + 1)
        elif not self.replaying:
            self._free.take(slot)

    # -- changing ---------------------------------------------------------------------------------------------

    def apply(self, needle: Needle, place: Place) -> None:
        """Do to the table what *needle*, which lies at *place*, says.

        Raises:
            Damaged: the needle contradicts the table, as only a damaged volume can make it.
        """
        kind = needle.kind
        # The most first; plain numbers, because each name of an enum takes as long as a call.
        if kind in _WHOLE:
            self._put(needle, place)
        elif kind == _DELETE:
            self._drop_name(needle.inode, needle)
        elif kind == Kind.LINK:
            aim = self.record(slot_of(needle.extra_u64(Tag.TARGET)))
            if aim.live and aim.kind in _NOT_LINKED:
                raise Damaged(f"inode {needle.inode:#x} is a further name of what can have only one")
            if self._put(needle, place):
                self._count_link(needle.extra_u64(Tag.TARGET), 1, needle.ctime_ns)
        elif kind == Kind.RENAME:
            self._rename(needle, place)
        elif kind == Kind.ATTRIBUTES:
            self._set_attributes(needle)
        elif kind == Kind.XATTR:
            self._set_xattrs(needle, place)
        elif kind == Kind.OWNER:
            self.define_owner(needle.owner, needle.uid, needle.gid, needle.mode, place.volume)

    def _put(self, needle: Needle, place: Place) -> bool:
        """Do what a put says; return whether it is about an inode that was not there."""
        slot, generation = slot_of(needle.inode), needle.inode >> 32
        parent = slot_of(needle.parent)
        old = self.record(slot)
        value = self.hash(needle.name) if needle.name else 0
        kind, is_directory = needle.kind, needle.kind == _DIRECTORY
        known = old.live and old.generation == generation
        if known and (old.kind == _DIRECTORY) != is_directory:
            raise Damaged(f"inode {needle.inode:#x} cannot be both a directory and none")
        if old.live and not known:
            # The needle that ended it is damaged; when that was nobody knows.
            self._delete(inode_of(slot, old.generation), needle.ctime_ns, timed=False)
        moved = known and (old.parent - 1 != parent or old.hash_generation & 0xFF_FFFF != value)
        if moved and slot:
            self._unlink(slot, old)
        flags = kind
        if known and not is_directory:
            flags |= old.flags & (Flag.STAGED | Flag.LINKED)
        volume, offset8, size = place.volume, place.offset // ALIGNMENT, needle.record_size
        if is_directory:
            # Its buckets live in these fields; a directory put again keeps its children.
            volume, offset8, size = (old.volume, old.offset8, old.size) if known else (0, 0, 0)
        record = Record(
            flags,
            volume,
            place.volume,
            parent + 1,
            place.name_offset,
            offset8,
            size,
            needle.mtime_ns,
            seconds(needle.ctime_ns),
            needle.record_owner,
            value | generation << 24,
        )
        if not known:
            self._take(slot)
            self.rare.clear(slot)
        self.store(slot, record)
        if known and old.stale:
            self._add_word(Word.STALE_DIRECTORIES, -1)
        if not known:
            self.count(kind, 1)
        elif old.kind != kind:
            # An import may put an image in place of a link, in one needle.
            self.count(old.kind, -1)
            self.count(kind, 1)
        if slot and needle.parent and (not known or moved):
            self._link(slot, record)
            if not known:
                self.touch(parent, needle.ctime_ns)
        return not known

    def put_new(self, first: int, volume: int, records: Sequence[bytes]) -> None:
        """Put images into the slots from *first* on, never used so far, as their index *records* (39 bytes) say.

        They lie in the volume with that entry. Who calls makes them children of their directories.
        """
        # All behind the slot is the same in both kinds of records (layout.py, format.py).
        head = RECORD.pack(Kind.FILE, volume, volume, *[0] * 8)[:AT_PARENT]
        # Nothing points there yet, so no before-images are kept: `forget_new` makes them zeros again.
        self.memory.fill(record_at(first), b"".join(head + record[AT_PARENT:] for record in records))
        self.memory.put_word(Word.SLOTS, first + len(records))
        self._add_word(Word.FILES, len(records))

    def forget_new(self, count: int) -> None:
        """Clear the *count* records behind the last slot that was ever used: a `put_new` that was undone left them."""
        slot = self.memory.words[Word.SLOTS]
        self.memory.fill(record_at(slot), bytes(RECORD_BYTES * min(count, SLOTS_MAX - slot)))

    def add_unborn(self, slot: int, record: Record, now_ns: int) -> None:
        """Put an image into the table that no needle has named yet; it is gone after a crash, as was promised."""
        self._take(slot)
        self.rare.clear(slot)
        self.store(slot, record)
        self.count(record.kind, 1)
        self._link(slot, record)
        self.touch(record.parent - 1, now_ns)

    def _drop_name(self, inode: int, needle: Needle) -> None:
        """Take away the name that *inode* has of itself; *needle*, a delete or rename, says what else goes."""
        if needle.flags & FLAG_BARE:
            self._strip(inode, needle.ctime_ns)
        else:
            self._delete(inode, needle.ctime_ns)
        target = needle.extra_u64(Tag.TARGET)
        if needle.flags & FLAG_LAST:
            self._delete(target, needle.ctime_ns)
        elif target:
            self._count_link(target, 0, needle.ctime_ns)

    def _strip(self, inode: int, now_ns: int) -> None:
        """Take away the own name of *inode*, which lives on under its links."""
        slot = slot_of(inode)
        record = self.record(slot)
        if not record.live or record.generation != inode >> 32 or not record.parent:
            return
        self._unlink(slot, record)
        self.touch(record.parent - 1, now_ns)
        bare = record._replace(name_volume=0, parent=0, name_offset=0, hash_generation=record.generation << 24)
        self.store(slot, bare._replace(ctime_s=seconds(now_ns)))

    def _count_link(self, inode: int, by: int, now_ns: int | None) -> None:
        """Note that *inode* got or lost a link at *now_ns*."""
        slot = slot_of(inode)
        record = self.record(slot)
        if not record.live or record.generation != inode >> 32 or record.kind in _NOT_LINKED:
            return
        if by:
            self.set_links(slot, max(0, self.rare.get(slot, record.generation).links + by))
        if now_ns is not None:
            self.memory.put_u32(record_at(slot) + AT_CTIME, seconds(now_ns))

    def set_links(self, slot: int, links: int) -> None:
        """Note that *links* name the inode in *slot*."""
        record = self.record(slot)
        entry = self.rare.get(slot, record.generation)
        self.rare.put(slot, record.generation, entry._replace(links=links))
        self.set_flags(slot, record.flags & ~Flag.LINKED | (Flag.LINKED if links else 0))

    def _set_xattrs(self, needle: Needle, place: Place) -> None:
        slot, generation = slot_of(needle.inode), needle.inode >> 32
        record = self.record(slot)
        if not record.flags & _KIND or record.generation != generation:
            return
        entry = self.rare.get(slot, generation)
        entry = entry._replace(volume=place.volume, offset8=place.offset // ALIGNMENT, size=needle.data_size)
        if not needle.data_size:
            entry = NOTHING._replace(links=entry.links)
        self.rare.put(slot, generation, entry)
        self.memory.put_u32(record_at(slot) + AT_CTIME, seconds(needle.ctime_ns))

    def _delete(self, inode: int, now_ns: int, *, timed: bool = True) -> None:
        slot = slot_of(inode)
        record = self.record(slot)
        if not record.live or record.generation != inode >> 32 or not slot:
            return
        self._unlink(slot, record)
        self.touch(record.parent - 1, now_ns)
        kind = record.kind
        # In slices, which take a quarter of the time of `_replace`.
        flags = record.flags & ~Flag.STALE_MTIME | Flag.DEAD
        self.store(slot, (flags, *record[1:8], seconds(now_ns), *record[9:]))
        if record.stale:
            self._add_word(Word.STALE_DIRECTORIES, -1)
        if kind == _LINK:
            self._count_link(inode_of(record.size - 1, record.owner), -1, now_ns if timed else None)
        self.count(kind, -1)
        if not self.replaying:
            self._free.push(slot)

    def adopt(self, slot: int) -> None:
        """Make an orphan a child of the directory its record names, which is there again."""
        record = self.record(slot)
        if record.live and slot not in self.buckets.find(record.parent - 1, record.hash_generation & 0xFF_FFFF):
            self._link(slot, record)

    def delete_unborn(self, slot: int, now_ns: int) -> None:
        """Take an image that no needle has named out of the table."""
        self._delete(inode_of(slot, self.record(slot).generation), now_ns)

    def _rename(self, needle: Needle, place: Place) -> None:
        replaced = needle.extra_u64(Tag.REPLACED)
        if replaced:
            self._drop_name(replaced, needle)
        record = self.record(slot_of(needle.inode))
        if record.live and record.generation == needle.inode >> 32:
            self.move(slot_of(needle.inode), slot_of(needle.parent), needle.name, place, needle.ctime_ns)

    def move(self, slot: int, parent: int, name: bytes, place: Place, now_ns: int) -> None:
        """Give *slot* another name, which stands at *place*, in the directory *parent*."""
        old = self.record(slot)
        self._unlink(slot, old)
        record = old._replace(
            name_volume=place.volume,
            parent=parent + 1,
            name_offset=place.name_offset,
            ctime_s=seconds(now_ns),
            hash_generation=self.hash(name) | old.generation << 24,
        )
        if old.kind == Kind.DIRECTORY:
            # Unlinking changed the count of a directory that may be this one's own parent, never itself.
            fresh = self.record(slot)
            record = record._replace(volume=fresh.volume, offset8=fresh.offset8, size=fresh.size)
        self.store(slot, record)
        self._link(slot, record)
        self.touch(old.parent - 1, now_ns)
        if parent != old.parent - 1:
            self.touch(parent, now_ns)

    def _set_attributes(self, needle: Needle) -> None:
        slot = slot_of(needle.inode)
        record = self.record(slot)
        if record.flags & _KIND and record.generation == needle.inode >> 32:
            self.set_attributes(slot, needle.owner, needle.mtime_ns, needle.ctime_ns)

    def set_attributes(self, slot: int, owner: int, mtime_ns: int, ctime_ns: int) -> None:
        """Set owner (with mode) and times of *slot*."""
        at = record_at(slot)
        self.memory.put(at + AT_MTIME, _TIMES.pack(mtime_ns, seconds(ctime_ns)))
        self.memory.put_u16(at + AT_OWNER, owner)
        if self.record(slot).stale:
            self.set_flags(slot, self._map[at + AT_FLAGS] & ~Flag.STALE_MTIME)
            self._add_word(Word.STALE_DIRECTORIES, -1)

    def add_volume(self, entry: VolumeEntry) -> int:
        """Give a volume a row of the volume table and return its number.

        Raises:
            StoreLimit: the table has 65,536 rows.
        """
        words = self.memory.words
        index = words[Word.VOLUMES]
        if words[Word.ROWS_FREE]:
            index = next(row for row in range(index) if self.volume(row).flags & VOLUME_GONE)
            self.set_volume(index, entry)
            self.memory.put_word(Word.ROWS_FREE, words[Word.ROWS_FREE] - 1)
            return index
        if index >= VOLUMES_MAX:
            raise StoreLimit(f"more than {VOLUMES_MAX} volumes in one store; make a store with larger volumes")
        self.memory.put(VOLUMES_AT + VOLUME.size * index, VOLUME.pack(*entry))
        self.memory.put_word(Word.VOLUMES, index + 1)
        return index

    def free_volume(self, index: int) -> None:
        """Within the lock: free row *index*, whose volume is removed and which nothing refers to any more."""
        memory, words = self.memory, self.memory.words
        stated = [owner for owner in range(words[Word.OWNERS]) if self.owner_volume(owner) == index]
        for start in range(0, len(stated), _OWNERS_AT_ONCE):
            with memory.change():
                for owner in stated[start : start + _OWNERS_AT_ONCE]:
                    self.define_owner(owner, *self.owner(owner), -1)
        with memory.change():
            # What was synced of it says nothing about the volume that gets its row.
            memory.put_word(Word.SYNCED, 0)
            self.set_volume(index, VolumeEntry(0, 0, 0, VOLUME_GONE))
            memory.put_word(Word.ROWS_FREE, words[Word.ROWS_FREE] + 1)
            memory.put_word(Word.VOLUMES_GONE, words[Word.VOLUMES_GONE] + 1)

    def set_volume(self, index: int, entry: VolumeEntry) -> None:
        """Overwrite row *index* of the volume table."""
        self.memory.put(VOLUMES_AT + VOLUME.size * index, VOLUME.pack(*entry))

    def store(self, slot: int, record: tuple[int, ...]) -> None:
        """Overwrite the record of *slot*; *record* has the fields of `Record`."""
        self.memory.put(RECORDS_AT + RECORD_BYTES * slot, RECORD.pack(*record))

    def set_flags(self, slot: int, flags: int) -> None:
        """Overwrite the flags of *slot*."""
        self.memory.put(record_at(slot) + AT_FLAGS, bytes([flags]))

    def touch(self, directory: int, now_ns: int) -> None:
        """Note that the entries of *directory* changed."""
        if not self.is_directory(directory):
            return
        at = record_at(directory)
        self.memory.put(at + AT_MTIME, _TIMES.pack(now_ns, seconds(now_ns)))
        flags = self._map[at + AT_FLAGS]
        if not flags & Flag.STALE_MTIME:
            self.memory.put(at + AT_FLAGS, bytes([flags | Flag.STALE_MTIME]))
            self._add_word(Word.STALE_DIRECTORIES, 1)

    def count(self, kind: int, by: int) -> None:
        """Change the count of images, directories or symbolic links; a further name counts as nothing."""
        if kind != _LINK:
            self._add_word(_COUNTS[kind], by)

    def _add_word(self, word: int, by: int) -> None:
        self.memory.put_word(word, self.memory.words[word] + by)

    def _link(self, slot: int, record: Record) -> None:
        parent = record.parent - 1
        if not self.is_directory(parent):
            raise Damaged(f"inode {inode_of(slot, record.generation)} lies in slot {parent}, which is no directory")
        self.buckets.add(parent, slot)
        if record.kind == _DIRECTORY:
            self._count_subdirectory(parent, 1)

    def is_directory(self, slot: int) -> bool:
        """Return whether *slot* is a directory that is not removed."""
        return 0 <= slot < SLOTS_MAX and self._map[record_at(slot) + AT_FLAGS] & _KIND_OR_DEAD == _DIRECTORY

    def _unlink(self, slot: int, record: Record) -> None:
        if not self.is_directory(record.parent - 1):
            return  # an orphan: its directory was lost with a damaged needle
        self.buckets.remove(record.parent - 1, slot)
        if record.kind == _DIRECTORY:
            self._count_subdirectory(record.parent - 1, -1)

    def _count_subdirectory(self, parent: int, by: int) -> None:
        count = self.subdirectories(parent)
        if count != SUBDIRECTORIES_MANY:
            self.memory.put_u16(record_at(parent) + AT_SUBDIRECTORIES, count + by)
