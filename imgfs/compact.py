"""Compaction: copies what is needed of some sealed volumes into one new volume, and removes the old ones.

Owns the order of the steps (docs/crash.md): copy, sync, publish, make current, remove. Publishing is the commit
point: from then on the new volume counts in place of those that its header says it replaces. A copy keeps its sequence
number, so that meeting a needle twice is harmless. Must not know when it is worth it, nor who waits.

*Concurrency:* copying takes no lock, for sealed volumes do not change; making current takes the table's lock for a
batch at a time, and moves only what still points at a replaced volume. One compaction at a time.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.buckets import record_at
from imgfs.disk import Disk
from imgfs.errors import Damaged, StoreFull, StoreLimit, disk_error
from imgfs.format import (
    ALIGNMENT,
    NEEDLE_HEADER_BYTES_MAX,
    NEEDLES_START,
    REPLACES_MAX,
    VOLUME_BYTES_LIMIT,
    Kind,
    Needle,
    VolumeHeader,
    footer_bytes,
)
from imgfs.index import (
    checkpoint,
    index_paths,
    names_a_name,
    names_header,
    pack_name,
    pack_record,
    read_records,
    state_of,
)
from imgfs.layout import AT_NAME_OFFSET, AT_NAME_VOLUME, AT_OFFSET8, AT_VOLUME, VOLUME_GONE, VOLUME_SEALED, Flag, Word
from imgfs.load import INDEX_RECORDS, PUTS, lengths, references
from imgfs.needed import NEVER_S, Needed, last_of_each
from imgfs.plausible import NUMBER_MAX
from imgfs.rare import Entry
from imgfs.records import Record, VolumeEntry
from imgfs.superblock import Superblock
from imgfs.table import Table
from imgfs.volume import Volume
from imgfs.volumes import SUFFIX, Volumes, volume_id_of, volume_path

log = logging.getLogger(__name__)

# Behind the names of files that are not published yet; those of a volume that is begun have another, see rolling.py.
COPY = ".copy"
_BATCH = 256  # needles that are made current in one step
_WRITE_BYTES = 1 << 20


class Share(NamedTuple):
    """What a compaction of one volume would do."""

    row: int
    volume_id: int
    file_bytes: int
    disk_bytes: int
    """What it takes of the disk, less than its length where holes were punched."""
    needed_bytes: int
    """What a copy would take."""

    @property
    def gain_bytes(self) -> int:
        """What the disk would have more of."""
        return self.disk_bytes - self.needed_bytes


@dataclass
class Plan:
    """What a compaction of some volumes copies: rows of the volume table, in the order of their sequence numbers."""

    rows: list[int]
    needed: list["npt.NDArray[np.bool_]"] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    bytes_after: int = NEEDLES_START


class Keep(NamedTuple):
    """What a compaction must keep though it is dead."""

    held: Sequence[int] = ()
    """Slots that handles are open on."""
    cutoff_s: int = NEVER_S
    """What went at that time or later is kept for those who want it back."""
    expired: Mapping[int, "npt.NDArray[np.bool_]"] = {}
    """By volume id: needles that are known to be dead since before that."""


class Compaction:
    """Compacts volumes of an open store."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        superblock: Superblock,
        table: Table,
        volumes: Volumes,
        checkpoint: Callable[[], None],
    ) -> None:
        """*checkpoint* makes all durable that was appended so far, and vouches for its index."""
        self._disk = disk
        self._directory = directory
        self._superblock = superblock
        self._table = table
        self._memory = table.memory
        self._volumes = volumes
        self._checkpoint = checkpoint

    # -- planning ---------------------------------------------------------------------------------------------

    def survey(self, keep: Keep) -> list[Share]:
        """Return what compacting each sealed volume would do. Damaged, as `plan`."""
        judge = Needed(self._table, keep.held, keep.cutoff_s)
        sequences = self._sequences()
        shares = []
        for row in self._volumes.rows(sealed=True):
            volume, records = self._volumes.get(row).volume, self._records(row)
            needed, sizes = self._judge(judge, row, records, sequences, keep)
            judge.pass_by(records)
            size = NEEDLES_START + int(sizes[needed].sum())
            file_bytes = self._table.volume(row).end
            shares.append(Share(row, volume.header.volume_id, file_bytes, volume.allocated_bytes(), size))
        return shares

    def plan(self, rows: Sequence[int], keep: Keep) -> Plan:
        """Return what compacting *rows*, neighbours among the sealed volumes, would copy.

        Raises:
            Damaged: the index of one of them is not whole; it is made again when the store is opened.
        """
        judge = Needed(self._table, keep.held, keep.cutoff_s)
        order = self._volumes.rows(sealed=True)
        first = order.index(rows[0])
        assert order[first : first + len(rows)] == list(rows), "what lies between them would lose its place"
        for row in order[:first]:
            judge.pass_by(self._records(row))
        sequences = self._sequences()
        plan = Plan(list(rows))
        for row in rows:
            records = self._records(row)
            needed, sizes = self._judge(judge, row, records, sequences, keep)
            index = np.frombuffer(records, INDEX_RECORDS)
            mine = np.unique(index["owner"][needed & (index["kind"] == Kind.OWNER)])
            for other, before in zip(plan.needed, plan.records, strict=True):
                # A number may have got another meaning: the last one counts.
                earlier = np.frombuffer(before, INDEX_RECORDS)
                other &= ~((earlier["kind"] == Kind.OWNER) & np.isin(earlier["owner"], mine))
            plan.needed.append(needed)
            plan.records.append(records)
            plan.bytes_after += int(sizes[needed].sum())  # a few OWNER needles too many
        return plan

    def _sequences(self) -> dict[int, int]:
        return {row: self._table.volume(row).first_sequence for row in range(self._memory.words[Word.VOLUMES])}

    def _judge(
        self, judge: Needed, row: int, records: bytes, sequences: dict[int, int], keep: Keep
    ) -> tuple["npt.NDArray[np.bool_]", "npt.NDArray[np.int64]"]:
        """Return which needles of the volume in *row* are needed, and how long each is."""
        expired = keep.expired.get(self._table.volume(row).volume_id)
        needed = judge.of(records, row, sequences, expired)
        return needed, lengths(np.frombuffer(records, INDEX_RECORDS), self._table.volume(row).end)

    def _records(self, row: int) -> bytes:
        return read_records(self._disk, self._volumes.get(row).volume.path)

    # -- doing it ---------------------------------------------------------------------------------------------

    def run(self, plan: Plan, room_bytes: int, copied: Callable[[int], None] = lambda _: None) -> int:
        """Copy and publish; return the row of the new volume. `unfinished` and `remove` do the rest.

        *copied* is called with the bytes written so far, and may wait or raise to end the compaction.

        Raises:
            Damaged: a needle that is needed is not what was written; nothing has changed.
            StoreFull: less than *room_bytes* more than the copy takes are free; nothing has changed.
            DiskFailure: as the disk says; nothing has changed.
        """
        space = self._disk.space(self._directory)
        if space.f_bavail * space.f_frsize < plan.bytes_after + room_bytes:
            raise StoreFull("not enough room for the copy; delete images, or add space")
        volume_id, path = self._reserve()
        try:
            header = self._copy(plan, volume_id, path, copied)
            # What was left out is undone by needles that power loss must not take any more. Nor may a start replay
            # them one by one, as changes of something that is not there.
            self._checkpoint()
            self._disk.rename(path + COPY, path)
            self._disk.sync_directory(self._directory)
        except OSError as error:
            self._discard(path)
            raise disk_error(error, path) from error
        except BaseException:
            self._discard(path)
            raise
        return self._enter(header, path)

    def _reserve(self) -> tuple[int, str]:
        """Return the id and path of a new volume; what a compaction that was killed has left is removed."""
        with self._memory.lock():
            names = self._disk.names(self._directory)
            for name in names:
                if name.endswith(COPY):
                    self._disk.unlink(f"{self._directory}/{name}")
            volume_id = 1 + max(map(volume_id_of, names), default=0)
            if volume_id > NUMBER_MAX:
                raise StoreLimit(f"{self._directory} holds a file with the highest number a volume can have")
            path = volume_path(self._directory, volume_id)
            self._disk.close(self._disk.open(path + COPY, writable=True, create=True))
            return volume_id, path

    def _discard(self, path: str) -> None:
        for each in (path, *index_paths(path)):
            if self._disk.exists(each + COPY):
                self._disk.unlink(each + COPY)

    def _copy(self, plan: Plan, volume_id: int, path: str, copied: Callable[[int], None]) -> VolumeHeader:
        """Write the new volume and its index, all of it durable but not published."""
        sources = [self._volumes.get(row).volume for row in plan.rows]
        replaces = tuple(source.header.volume_id for source in sources)
        assert len(replaces) <= REPLACES_MAX
        header = VolumeHeader(
            self._superblock.store_id,
            os.urandom(16),
            volume_id,
            sources[0].header.first_sequence,
            time.time_ns(),
            self._superblock.volume_bytes_max,
            sources[0].header.previous,
            replaces,
        )
        volume = Volume.create(self._disk, path + COPY, header, 0)
        try:
            records, names = bytearray(), bytearray(names_header(volume_id))
            offset, last = NEEDLES_START, 0
            for source, needle, at in self._wanted(plan, sources):
                offset = self._copy_needle(volume, offset, source, needle, at, records, names)
                last = max(last, needle.sequence)
                copied(offset)
                if offset > VOLUME_BYTES_LIMIT:
                    raise StoreFull("the copy would be larger than a volume can be")
            seal = checkpoint(state_of(records, names, offset), seal=True)
            seal.sequence, seal.durable, seal.commit_ns = last, offset, time.time_ns()
            volume.sync()
            volume.write_needle(offset, seal, [], None)
            records += pack_record(seal, offset, 0, 0)
            volume.sync()
            for name, data in zip(index_paths(path), (records, names), strict=True):
                self._write_file(name + COPY, bytes(data))
        finally:
            volume.close()
        return header

    def _wanted(self, plan: Plan, sources: Sequence[Volume]) -> Iterator[tuple[Volume, Needle, int]]:
        """Yield (volume, needle, offset) of all that is needed, owners first: what they mean comes before its use.

        Raises:
            Damaged: one of them is not what was written.
        """
        for owners in (True, False):
            for row, source, needed, records in zip(plan.rows, sources, plan.needed, plan.records, strict=True):
                index = np.frombuffer(records, INDEX_RECORDS)
                for record in index[needed & ((index["kind"] == Kind.OWNER) == owners)]:
                    offset = int(record["offset8"]) * ALIGNMENT
                    # What is current cannot have been punched out: its data is verified when it is copied.
                    current = self._is_current(row, record)
                    try:
                        needle = source.header_at(offset)
                        if not current and needle.data_size and not source.whole(needle, offset):
                            raise Damaged(f"{source.path}: the data of the needle at {offset} is damaged")
                    except Damaged:
                        if current or not _is_punched(record, source, offset):
                            raise
                    else:
                        yield source, needle, offset

    def _is_current(self, row: int, record: "np.void") -> bool:
        """Return whether the table points at the needle that the index *record* is about; of most kinds it need not."""
        if record["kind"] not in (Kind.FILE, Kind.SYMLINK, Kind.XATTR):
            return True
        slot, generation = int(record["slot"]) - 1, int(record["hash_generation"]) >> 24
        now = self._table.record(slot)
        place: Record | Entry = self._table.rare.get(slot, generation) if record["kind"] == Kind.XATTR else now
        return now.live and place.volume == row and place.offset8 == int(record["offset8"])

    def _copy_needle(
        self,
        volume: Volume,
        offset: int,
        source: Volume,
        needle: Needle,
        at: int,
        records: bytearray,
        names: bytearray,
    ) -> int:
        """Copy *needle*, which lies in *source* at *at*; return where it ends."""
        pieces = source.pieces(needle, at)
        # Another one: to write a needle sets its checksum, and that of the source verifies the pieces.
        needle = replace(needle, durable=NEEDLES_START)
        if needle.data_size <= _WRITE_BYTES:
            volume.write_needle(offset, needle, list(pieces), None)
        else:
            volume.write_large_needle(offset, needle, pieces)
        name_offset = len(names) if needle.name and names_a_name(needle.kind) else 0
        records += pack_record(needle, offset, name_offset, self._table.hash(needle.name) if name_offset else 0)
        if name_offset:
            names += pack_name(needle.name)
        return offset + needle.length

    def _write_file(self, path: str, data: bytes) -> None:
        file = self._disk.open(path, writable=True, create=True)
        try:
            self._disk.truncate(file, 0)
            self._disk.write(file, 0, [data])
        finally:
            self._disk.close(file)

    # -- making current ---------------------------------------------------------------------------------------

    def unfinished(self) -> list[int]:
        """Return the rows of volumes that replace others, their needles made current, for which `remove` is due."""
        known = {self._table.volume(row).volume_id for row in range(self._memory.words[Word.VOLUMES])}
        for name in self._disk.names(self._directory):
            if name.endswith(SUFFIX) and volume_id_of(name) not in known:
                path = f"{self._directory}/{name}"
                try:
                    volume = Volume.open(self._disk, path)
                except Damaged:
                    continue
                volume.close()
                header = volume.header
                ours = header.store_id == self._superblock.store_id and path == volume_path(
                    self._directory, header.volume_id
                )
                if ours and header.replaces:
                    self._enter(header, path)
        rows = [row for row in self._volumes.rows(sealed=True) if self._replaced_rows(row)]
        for row in rows:
            self._make_current(row)
        return rows

    def _enter(self, header: VolumeHeader, path: str) -> int:
        """Give the published volume with that *header* a row, unless it has one; return it."""
        for each in index_paths(path):
            if self._disk.exists(each + COPY):
                self._disk.rename(each + COPY, each)
        with self._memory.lock():
            for row in range(self._memory.words[Word.VOLUMES]):
                entry = self._table.volume(row)
                if entry.volume_id == header.volume_id and not entry.flags & VOLUME_GONE:
                    return row
            file = self._disk.open(path)
            end = self._disk.size(file)
            self._disk.close(file)
            with self._memory.change():
                entry = VolumeEntry(header.volume_id, end, header.first_sequence, VOLUME_SEALED)
                return self._table.add_volume(entry)

    def _make_current(self, row: int) -> None:
        """Let the table point at the copies in the volume in *row* wherever it points at what that replaces."""
        old = self._replaced_rows(row)
        index = np.frombuffer(self._records(row), INDEX_RECORDS)
        slots = index["slot"].astype(np.int64)
        naming = last_of_each(np.isin(index["kind"], [*PUTS, Kind.RENAME]), slots)
        chosen = naming | last_of_each(index["kind"] == Kind.XATTR, slots) & (index["size"] > 0)
        # Of several puts of an inode the last one counts: others are kept for those who may want them back.
        chosen |= last_of_each(np.isin(index["kind"], PUTS), slots)
        rows = list(zip(index[chosen].tolist(), naming[chosen].tolist(), strict=True))
        for start in range(0, len(rows), _BATCH):
            with self._memory.lock(), self._memory.change():
                for record, names in rows[start : start + _BATCH]:
                    self._move(record, row, old, names=names)

    def _replaced_rows(self, row: int) -> set[int]:
        ids = self._volumes.get(row).volume.header.replaces
        if not ids:
            return set()
        rows = range(self._memory.words[Word.VOLUMES])
        return {each for each in rows if self._table.volume(each).volume_id in ids and each != row}

    def _move(self, record: tuple[int, ...], row: int, old: set[int], *, names: bool) -> None:
        """Let what the index *record* is about point into the volume in *row*, if it points into one of *old*.

        *names*: its needle is the one that gives the name.
        """
        kind, slot, _, name_offset, offset8 = record[0], record[1] - 1, *record[2:5]
        generation = record[9] >> 24
        now = self._table.record(slot)
        if not now.flags & Flag.KIND or now.generation != generation:
            return
        if kind == Kind.XATTR:
            place = self._table.rare.get(slot, generation)
            if place.volume in old:
                self._table.rare.put(slot, generation, place._replace(volume=row, offset8=offset8))
            return
        at = record_at(slot)
        if kind not in (Kind.RENAME, Kind.DIRECTORY) and now.volume in old and not now.flags & Flag.UNBORN:
            self._memory.put_u16(at + AT_VOLUME, row)
            self._memory.put_u32(at + AT_OFFSET8, offset8)
        if names and now.name_offset and now.name_volume in old and not now.flags & Flag.UNBORN:
            self._memory.put_u16(at + AT_NAME_VOLUME, row)
            self._memory.put_u32(at + AT_NAME_OFFSET, name_offset)

    # -- removing ---------------------------------------------------------------------------------------------

    def remove(self, row: int, held: Sequence[int]) -> bool:
        """Remove what the volume in *row* replaces, and free the rows; return whether nothing needed it any more.

        Call it when every worker has answered what it had in hand when `run` returned. *held* are slots that handles
        are open on: the bytes of an unlinked image may be needed still.
        """
        old = self._replaced_rows(row)
        with self._memory.lock():
            if references(self._memory, old, held):
                return False
        for entry in old:
            path = volume_path(self._directory, self._table.volume(entry).volume_id)
            paths = index_paths(path)
            for each in (path, paths.records, paths.names):
                if self._disk.exists(each):
                    self._disk.unlink(each)
        self._disk.sync_directory(self._directory)
        for entry in old:
            with self._memory.lock():
                self._table.free_volume(entry)
        return True


def _is_punched(record: "np.void", source: Volume, offset: int) -> bool:
    """Return whether the needle at *offset*, which the index *record* is about, lost bytes to a hole."""
    size = int(record["size"])
    return source.touches_hole(offset, offset + NEEDLE_HEADER_BYTES_MAX + size + footer_bytes(size))
