"""What follows a sync that failed: the volume ends where it is known durable, and the rest is appended again elsewhere.

Owns the new volume until all is in it, and what is told of the lost. Must not know how a failure is noticed.

The kernel says once that pages were lost, and then takes them for clean; the bytes behind the durable mark may be on
the disk, in memory only, or gone. What of them is still whole is copied to a new volume, whose header says where the
last one ends (PREVIOUS_END). A copy keeps its sequence number. Order (docs/crash.md): copies, times of directories,
sync, name; in one step the active volume; then the records, some at a time.

*Concurrency:* under `Memory.lock`. Who is killed before the new volume is active leaves a file that is removed when
all begins anew; who is killed behind that leaves records to be moved, by the next who takes the lock (`APPENDING`).
Readers find what they look for in either.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from crc32c import crc32c

from imgfs.active import NO_DATA, SMALL_BYTES, Failure
from imgfs.errors import Damaged, DiskFailure
from imgfs.format import (
    ALIGNMENT,
    FLAG_PAIR,
    INDEX_RECORD_BYTES,
    NEEDLES_START,
    OWNED_KINDS,
    IndexState,
    Kind,
    Needle,
    PreviousEnd,
    inode_of,
    slot_of,
)
from imgfs.index import empty_state, index_paths, names_a_name, pack_name, state_of
from imgfs.layout import MOVING, VOLUME_SEALED, Word
from imgfs.load import INDEX_RECORDS, lost_slots, stale_directories
from imgfs.records import VolumeEntry
from imgfs.rolling import Rolling
from imgfs.volume import Gap, Volume
from imgfs.volumes import SUFFIX, volume_id_of, volume_path

log = logging.getLogger(__name__)

# Records moved in one step: a few words of the journal each.
_BATCH = 128
# Lost images that are named one by one.
_NAMED_MAX = 100
_SECOND_NS = 1_000_000_000


@dataclass
class _Copies:
    """Where the last needles of each inode lie that were appended again."""

    data: dict[int, tuple[int, int]] = field(default_factory=dict)  # sequence, offset
    attributes: dict[int, tuple[int, int]] = field(default_factory=dict)
    names: dict[int, tuple[int, bytes, int]] = field(default_factory=dict)  # parent, name, name offset

    def add(self, needle: Needle, offset: int, name_offset: int) -> None:
        if needle.kind == Kind.XATTR:
            self.attributes[needle.inode] = needle.sequence, offset
        elif names_a_name(needle.kind):
            self.names[needle.inode] = needle.parent, needle.name, name_offset
            if needle.kind != Kind.RENAME:
                self.data[needle.inode] = needle.sequence, offset

    def inodes(self) -> list[int]:
        return sorted({*self.data, *self.attributes, *self.names})


class FailedSync(Rolling):
    """The end of a store whose disk may fail."""

    def _mend(self) -> None:
        """Within the lock: if a sync failed, go on in a new volume.

        Raises:
            StoreFull: there is no room for it now.
            DiskFailure: nothing may be changed any more.
        """
        if not self._words[Word.FAILED]:
            return
        if self._words[Word.FAILED] >> 32 == Failure.LOST:
            try:
                with self._disk_errors(self._directory):
                    self._append_again()
            except DiskFailure:
                self._words[Word.FAILED] = Failure.DEAD << 32 | self._words[Word.FAILED] & 0xFFFF_FFFF
                raise
        self._check()

    def _append_again(self) -> None:
        words = self._words
        self._note_synced()
        entry, mark, end = words[Word.ACTIVE], words[Word.DURABLE], words[Word.ACTIVE_END]
        row, old = self._table.volume(entry), self.volume
        log.error("the disk lost data of %s; what is whole behind byte %d is appended again", old.path, mark)
        self._remove_copies_of(row.volume_id)
        kept = list(_kept(old, mark, end))
        previous = PreviousEnd(row.volume_id, end - mark, self._state_at(mark))
        sequence = kept[0][1].sequence if kept else words[Word.NEXT_SEQUENCE]
        volume, path = self._new_volume(previous, sequence)
        source = Volume.open(self._disk, old.path)
        try:
            self._release_files()
            self._activate(volume, -1, paths_of=path)
            state, next_sequence = self._copy(source, kept, volume)
            self._publish(volume, path)
        finally:
            source.close()
            self._release_files()
        with self._memory.change():
            self._table.set_volume(entry, row._replace(end=mark, flags=VOLUME_SEALED))
            ours = self._table.add_volume(VolumeEntry(volume.header.volume_id, NEEDLES_START, sequence, 0))
            self._set_words(ours, state, state.end, next_sequence)
            self._memory.put_word(Word.FAILED, 0)
            self._memory.put_word(Word.APPENDING, MOVING | entry << 8)
        self._move_records()

    def _remove_copies_of(self, volume_id: int) -> None:
        """Remove what a killed writer had copied behind *volume_id*, and not made the active volume."""
        for name in self._disk.names(self._directory):
            if not name.endswith(SUFFIX) or not volume_id_of(name) or self._is_known(volume_id_of(name)):
                continue
            path = f"{self._directory}/{name}"
            try:
                volume = Volume.open(self._disk, path)
            except Damaged:
                continue  # it was there before this store was opened
            volume.close()
            if volume.header.store_id != self._superblock.store_id:
                continue
            if volume.header.previous is not None and volume.header.previous.volume_id == volume_id:
                paths = index_paths(path)
                for each in (path, paths.records, paths.names):
                    self._disk.unlink(each)
                self._sync_names()

    def _state_at(self, mark: int) -> IndexState:
        """Return the state that the index of the active volume had when that ended at *mark*."""
        now = self.state()
        records = self._disk.read(self._records_file, 0, now.records * INDEX_RECORD_BYTES)
        names = self._disk.read(self._names_file, 0, now.names_bytes)
        if crc32c(records) != now.records_crc or crc32c(names) != now.names_crc:
            # They are rebuilt when the store is opened.
            return empty_state(self.volume.header.volume_id)._replace(end=mark)
        index = np.frombuffer(records, INDEX_RECORDS)
        count = int(np.searchsorted(index["offset8"].astype(np.int64) * ALIGNMENT, mark))
        behind = index[count:]
        named = behind[np.isin(behind["kind"], [kind for kind in Kind if names_a_name(kind)])]["name_offset"]
        names_bytes = int(named[named > 0].min(initial=now.names_bytes))
        return state_of(records[: count * INDEX_RECORD_BYTES], names[:names_bytes], mark)

    def _copy(self, source: Volume, kept: Sequence[tuple[int, Needle]], volume: Volume) -> tuple[IndexState, int]:
        """Append *kept*, which lie in *source*, to *volume*; return the state then, and the next sequence number."""
        state, sequence = empty_state(volume.header.volume_id), self._words[Word.NEXT_SEQUENCE]
        defined: set[int] = set()
        settled = ((-1, needle) for needle in self._directory_times())
        for offset, needle in (*kept, *settled):
            before = []
            if needle.kind in OWNED_KINDS and needle.owner not in defined:
                defined.add(needle.owner)
                before = [Needle(Kind.OWNER, 0, mode=needle.mode, uid=needle.uid, gid=needle.gid, owner=needle.owner)]
            for each in (*before, needle):
                if not each.sequence:
                    each.sequence, sequence = sequence, sequence + 1
                    each.commit_ns = self.now_ns()
                copy = replace(each, durable=NEEDLES_START)
                if not each.data_size:
                    volume.write_needle(state.end, copy, [], NO_DATA)
                elif each.data_size <= SMALL_BYTES:
                    volume.write_needle(state.end, copy, list(source.pieces(each, offset)), None)
                else:
                    volume.write_large_needle(state.end, copy, source.pieces(each, offset))
                _, state = self._write_index(copy, state)
        return state, sequence

    def _directory_times(self) -> Iterator[Needle]:
        """Yield a needle for each directory whose entries changed since its last one."""
        if not self._words[Word.STALE_DIRECTORIES]:
            return
        for slot in stale_directories(self._memory):
            record = self._table.record(slot)
            uid, gid, mode = self._table.owner(record.owner)
            needle = Needle(Kind.ATTRIBUTES, inode_of(slot, record.generation), uid=uid, gid=gid, mode=mode)
            needle.owner, needle.mtime_ns, needle.ctime_ns = record.owner, record.mtime_ns, record.ctime_s * _SECOND_NS
            yield needle

    # -- the table --------------------------------------------------------------------------------------------

    def _move_records(self) -> None:
        """Let the records that point behind the end of the last volume point to the copies in the active one."""
        memory = self._memory
        entry = self._words[Word.APPENDING] >> 8
        row = self._table.volume(entry)
        with self._disk_errors(self._directory):
            copies = self._copies()
            source = Volume.open(self._disk, volume_path(self._directory, row.volume_id))
            try:
                inodes = copies.inodes()
                for start in range(0, len(inodes), _BATCH):
                    with memory.change():
                        for inode in inodes[start : start + _BATCH]:
                            self._move(inode, copies, source, entry)
            finally:
                source.close()
            lost = lost_slots(memory, entry, row.end)
            self._tell(lost, row.volume_id)
        with memory.change():
            memory.put_word(Word.APPENDING, 0)

    def _copies(self) -> _Copies:
        volume, copies = self.volume, _Copies()
        names_bytes = empty_state(volume.header.volume_id).names_bytes
        for item in volume.scan(NEEDLES_START, self._words[Word.ACTIVE_END]):
            if not isinstance(item, Gap):
                offset, needle = item
                copies.add(needle, offset, names_bytes if needle.name else 0)
                names_bytes += len(pack_name(needle.name)) if names_a_name(needle.kind) else 0
        return copies

    def _move(self, inode: int, copies: _Copies, source: Volume, entry: int) -> None:
        """Within `Memory.change`: let the record of *inode* point to the copies of what it points to in *source*."""
        table, ours, mark = self._table, self._words[Word.ACTIVE], self._table.volume(entry).end
        previous = self.volume.header.previous
        names_mark = previous.index_state.names_bytes if previous is not None else 0
        slot, generation = slot_of(inode), inode >> 32
        old = record = table.record(slot)
        if record.generation != generation:
            return

        def copy_of(volume: int, offset8: int, found: dict[int, tuple[int, int]]) -> int:
            """Return where the needle at that place was copied to, 0 if it was not."""
            if volume != entry or offset8 * ALIGNMENT < mark or inode not in found:
                return 0
            sequence, offset = found[inode]
            return offset // ALIGNMENT if source.header_at(offset8 * ALIGNMENT).sequence == sequence else 0

        if record.kind != Kind.DIRECTORY:
            offset8 = copy_of(record.volume, record.offset8, copies.data)
            record = record._replace(volume=ours, offset8=offset8) if offset8 else record
        if record.name_volume == entry and record.name_offset >= names_mark and inode in copies.names:
            parent, name, name_offset = copies.names[inode]
            if (slot_of(parent) + 1, table.hash(name)) == (record.parent, record.hash_generation & 0xFF_FFFF):
                record = record._replace(name_volume=ours, name_offset=name_offset)
        if record != old:
            table.store(slot, record)
        rare = table.rare.get(slot, generation)
        offset8 = copy_of(rare.volume, rare.offset8, copies.attributes)
        if offset8:
            table.rare.put(slot, generation, rare._replace(volume=ours, offset8=offset8))

    def _tell(self, lost: list[int], volume_id: int) -> None:
        """Log what is lost: images whose needles were not whole any more."""
        for slot in lost[:_NAMED_MAX]:
            inode = inode_of(slot, self._table.record(slot).generation)
            log.error("lost with the end of volume %d: the image with inode %d", volume_id, inode)
        if len(lost) > _NAMED_MAX:
            log.error("lost: %d more", len(lost) - _NAMED_MAX)


def _kept(volume: Volume, start: int, end: int) -> Iterator[tuple[int, Needle]]:
    """Yield (offset, needle) of what is whole in *volume* from *start* to *end*, and has to be appended again."""
    first: list[tuple[int, Needle]] = []
    broken = False  # the first of a pair was not whole
    try:
        for item in volume.scan(start, end):
            if isinstance(item, Gap):
                first, broken = [], False
                continue
            offset, needle = item
            broken = broken or not volume.whole(needle, offset)
            first.append(item)
            if not needle.flags & FLAG_PAIR:
                if not broken and needle.kind not in (Kind.CHECKPOINT, Kind.OWNER):
                    yield from first
                first, broken = [], False
    except OSError as error:
        log.error("%s cannot be read: %s", volume.path, error.strerror)
