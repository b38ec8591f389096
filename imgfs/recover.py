"""Opening a store: reads the index files as far as they can be trusted, the rest from the volumes.

The same for a clean start, a start after a crash and a rebuild from volumes alone: they differ in how much a
checkpoint vouches for. Must not know open images, nor what tells torn from corrupt.

*Concurrency:* runs before the store is shared.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from imgfs.disk import Disk
from imgfs.errors import Damaged
from imgfs.format import (
    ALIGNMENT,
    FLAG_SEAL,
    INDEX_RECORD_BYTES,
    NEEDLES_START,
    OWNED_KINDS,
    VOLUME_BYTES_LIMIT,
    IndexState,
    Kind,
    Needle,
    PreviousEnd,
    Tag,
    slot_of,
)
from imgfs.index import (
    Index,
    Names,
    checkpoint_state,
    empty_state,
    index_paths,
    names_a_name,
    names_header,
    pack_name,
    pack_record,
    state_of,
    trusted_state,
)
from imgfs.layout import VOLUME_SEALED, Word
from imgfs.load import Loader, rebuild_free_queue, sound_records
from imgfs.mend import ROOT, Mended, Mender
from imgfs.records import Place, VolumeEntry
from imgfs.survey import Damage, Survey
from imgfs.table import Table
from imgfs.volume import Volume
from imgfs.volumes import SUFFIX, VOLUMES, OpenVolume, Volumes, volume_id_of, volume_path

_PLAIN_PUTS = frozenset(map(int, (Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.SPECIAL)))
_CHANGE_NOTHING = frozenset(map(int, (Kind.OWNER, Kind.CHECKPOINT)))


@dataclass
class RecoveryReport:
    """What opening the store found."""

    torn_bytes: int = 0
    torn_needles: int = 0
    replayed_needles: int = 0
    log_end: int = 0  # of the last volume; what lies behind is torn
    damage: list[Damage] = field(default_factory=list)
    rebuilt: list[str] = field(default_factory=list)
    mended: list[Mended] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)  # a sentence for each entry that damage cost its name


@dataclass
class Tail:
    """Where the last volume ends, and what of it only the volume tells."""

    path: str
    entry: int
    state: IndexState
    needles: list[tuple[int, int, Needle]]  # offset, name offset
    durable: int
    torn_bytes: int
    sealed: bool
    checkpointed: bool


@dataclass
class IndexContent:
    """The content of the index files of a volume, as its needles say it."""

    records: bytearray
    names: bytearray

    def add(self, needle: Needle, offset: int, table: Table) -> int:
        """Append what *needle* at *offset* says; return the offset of its name, 0 without one."""
        name_offset = len(self.names) if needle.name and names_a_name(needle.kind) else 0
        value = table.hash(needle.name) if name_offset else 0
        self.records += pack_record(needle, offset, name_offset, value)
        if name_offset:
            self.names += pack_name(needle.name)
        return name_offset

    def count(self) -> int:
        return len(self.records) // INDEX_RECORD_BYTES


class _Beginning(NamedTuple):
    """What is known of a volume before anything of it is loaded."""

    size: int
    paths: Index
    records: bytes  # as the files hold them
    names: bytes
    trusted: IndexState
    content: IndexContent  # as far as it is trusted
    survey: Survey


class Recovery:
    """One pass over the volumes, in the order of their sequence numbers, into an empty table."""

    def __init__(
        self,
        disk: Disk,
        root: str,
        table: Table,
        store_id: bytes,
        *,
        writable: bool,
        live_writer: bool = False,
        thorough: bool = False,
    ) -> None:
        """Begin with nothing in the *table*.

        *live_writer*: another process appends to the store, so that an unfinished needle at its end is no damage.
        *thorough*: look for contradictions also where no bytes are damaged; what came later counts.
        """
        self._disk = disk
        self._store_id = store_id
        self._directory = f"{root}/{VOLUMES}"
        self._table = table
        self._writable = writable
        self._live_writer = live_writer
        self._thorough = thorough
        self._loader = Loader(table.memory)
        self.report = RecoveryReport()
        self.volumes = Volumes(disk, self._directory, table)
        self.tail: Tail | None = None
        self.mender = Mender(table, self.volumes, writable=writable)
        self.next_sequence = 1
        # By volume: what is higher than all of its sequence numbers, where that is known.
        self._sequence_ends: dict[int, int] = {}
        self._owners: set[int] = set()
        # When directories last changed, by slot, where only needles tell that were loaded as a whole.
        self._touched: dict[int, int] = {}
        # The index records of each volume, for whoever wants to look back.
        self.kept: list[bytes] | None = None
        # After the last volume: its id, and the number the next must begin with, 0 where that cannot be known.
        self._expected = 0, 1

    def run(self) -> None:
        """Fill the table and `volumes`.

        Raises:
            NewerFormat: a newer release wrote one of the volumes.
            Damaged: the superblock is that of another store than the volumes.
        """
        self._load_all(self._open_volumes())
        orphans = self._loader.link()
        for inode, (volume_entry, offset8, bytes_) in self._loader.unclaimed.items():
            self.mender.keep_xattrs(inode, Place(volume_entry, offset8 * ALIGNMENT, 0), bytes_)
        self._table.replaying = True
        for directory, time_ns in self._touched.items():
            with self._table.memory.change():
                self._table.touch(directory, time_ns)
        if self.tail is not None:
            self._replay(self.tail)
            if self._needs_mending(orphans):
                self.mender.mend()
            self.mender.claim_xattrs()
            self.report.mended = self.mender.mended()
        self._settle_root()
        self._table.replaying = False
        rebuild_free_queue(self._table.memory)
        words = self._table.memory.words
        words[Word.NEXT_SEQUENCE] = max(words[Word.NEXT_SEQUENCE], self.next_sequence)

    def _needs_mending(self, orphans: list[int]) -> bool:
        """Return whether needles are missing, now that *orphans* were found and all is replayed."""
        mender = self.mender
        return bool(orphans or self.report.damage or mender.lost_directories or mender.rejected or self._thorough)

    def _settle_root(self) -> None:
        """Make sure that there is a root, also where no volume is left; a writer writes one."""
        if not self._writable:
            self.mender.find_directory(ROOT, of=0)

    def _open_volumes(self) -> list[Volume]:
        volumes = []
        names = self._disk.names(self._directory)
        stems = {name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)}
        for name in names:
            path = f"{self._directory}/{name}"
            stem, _, suffix = name.partition(".")
            if self._writable and stem not in stems and suffix in ("vol.new", "idx", "names"):
                self._disk.unlink(path)  # a crash kept its volume from being published
            if self._writable and suffix.endswith("copy"):
                self._disk.unlink(path)  # a compaction was cut off
            if not name.endswith(SUFFIX):
                continue
            try:
                volumes.append(Volume.open(self._disk, path))
            except Damaged as error:
                self._leave_out(path, str(error))
        if volumes and all(volume.header.store_id != self._store_id for volume in volumes):
            for volume in volumes:
                volume.close()
            raise Damaged("imgfs.json is that of another store; remove it, and it is made again from the volumes")
        for volume in volumes.copy():
            header = volume.header
            text = "" if header.store_id == self._store_id else "this is a volume of another store"
            if volume.path != volume_path(self._directory, header.volume_id):
                text = text or f"this is volume {header.volume_id} under another name; give it back its own"
            if text:
                volumes.remove(volume)
                volume.close()
                self._leave_out(volume.path, text)
        # A copy is newer than what it replaces.
        headers = [volume.header for volume in volumes]
        replaced = {number for header in headers for number in header.replaces if number < header.volume_id}
        for volume in [each for each in volumes if each.header.volume_id in replaced]:
            # A compaction was cut off after it was done, and before this was removed.
            volumes.remove(volume)
            volume.close()
            if self._writable:
                paths = index_paths(volume.path)
                for path in (volume.path, paths.records, paths.names):
                    if self._disk.exists(path):
                        self._disk.unlink(path)
        if self._writable and replaced:
            self._disk.sync_directory(self._directory)
        volumes.sort(key=lambda volume: (volume.header.first_sequence, volume.header.volume_id))
        self._sequence_ends = {
            volume.header.volume_id: following.header.first_sequence
            for volume, following in itertools.pairwise(volumes)
        }
        return volumes

    def _leave_out(self, path: str, text: str) -> None:
        """Report that the file at *path* is no volume of this store, for the reason in *text*."""
        file = self._disk.open(path)
        size = self._disk.size(file)
        self._disk.close(file)
        self.report.damage.append(Damage(volume_id_of(path.rpartition("/")[2]), 0, size, text))

    def _load_all(self, found: list[Volume]) -> None:
        """Load the volumes *found*, which are in order."""
        ends = previous_ends(found)
        if self._unreadable():
            self._expected = 0, 0
        for number, volume in enumerate(found):
            self._miss_before(volume, found)
            self._load(volume, ends.get(volume.header.volume_id), last=number == len(found) - 1)

    def _miss_before(self, volume: Volume, found: list[Volume]) -> None:
        """Note it if a volume is missing before *volume*; *found* are those that can be read."""
        header, (last_id, expected) = volume.header, self._expected
        ids = [each.header.volume_id for each in found]
        # Of a volume that was compacted nobody may speak any more.
        compacted = any(each.header.replaces for each in found)
        missing = min(last_id + 1, header.volume_id)
        if expected and header.first_sequence > expected:
            text = f"missing: no volume has the needles with numbers {expected} to {header.first_sequence - 1}"
        elif header.previous and header.previous.volume_id not in ids and not (compacted or self._unreadable()):
            missing, text = header.previous.volume_id, f"missing: volume {header.volume_id} goes on where it ended"
        else:
            return
        self.report.damage.append(Damage(missing, 0, 0, text + "; put its file back"))

    def _unreadable(self) -> bool:
        """Return whether a file is there whose header cannot be read: it may be any volume that is missed."""
        return any(damage.offset == 0 and damage.length for damage in self.report.damage)

    # -- one volume -------------------------------------------------------------------------------------------

    def _begin(self, volume: Volume, previous: PreviousEnd | None, *, last: bool) -> _Beginning:
        """Read the index files of *volume*, and be ready to survey what they do not cover."""
        header = volume.header
        size = previous.index_state.end if previous else min(volume.size(), VOLUME_BYTES_LIMIT)
        paths = index_paths(volume.path)
        records, names = self._content(paths.records), self._content(paths.names)
        trusted = trusted_state(records, names, volume, size, previous.index_state if previous else None)
        sequence = self._sequence_ends.get(header.volume_id, header.first_sequence + trusted.records)
        if not sound_records(memoryview(records)[: trusted.records * INDEX_RECORD_BYTES], trusted, sequence):
            trusted = empty_state(header.volume_id)
        index = IndexContent(
            bytearray(memoryview(records)[: trusted.records * INDEX_RECORD_BYTES]),
            bytearray(memoryview(names)[: trusted.names_bytes] if trusted.records else names_header(header.volume_id)),
        )
        # What a successor exists for is durable: sealing comes before its first needle.
        survey = Survey(volume, trusted.end, size, all_durable=not last)
        return _Beginning(size, paths, records, names, trusted, index, survey)

    def _load(self, volume: Volume, previous: PreviousEnd | None, *, last: bool) -> None:
        header = volume.header
        size, paths, records, names, trusted, index, survey = self._begin(volume, previous, last=last)
        with self._table.memory.change():
            row = VolumeEntry(header.volume_id, size, header.first_sequence, 0 if last else VOLUME_SEALED)
            entry = self._table.add_volume(row)
        tail: list[tuple[int, int, Needle]] = []
        settled, final = trusted.records, None
        for offset, final in survey.needles():
            self._know_owner(final)
            name_offset = index.add(final, offset, self._table)
            self.report.replayed_needles += 1
            if not last:
                continue
            tail.append((offset, name_offset, final))
            state = checkpoint_state(final)
            if state is not None:
                # Up to there the index says it all; what came after may have changed directories by implication.
                tail = [row for row in tail if row[0] >= state.end]
                settled = index.count() - len(tail)
        self._report(survey)
        self.next_sequence = max(self.next_sequence, header.first_sequence, survey.next_sequence)
        short = max(NEEDLES_START - volume.size(), 0)
        if short:
            text = "the volume was cut short: it ends within its header"
            self.report.damage.append(Damage(header.volume_id, volume.size(), short, text))
        sealed = final is not None and final.kind == Kind.CHECKPOINT and bool(final.flags & FLAG_SEAL)
        if not last:
            settled = index.count()
            if not sealed and not short and previous is None and not self._is_damaged_at(header.volume_id, size):
                text = "the volume was cut short: it does not end with a seal"
                self.report.damage.append(Damage(header.volume_id, size, 0, text))
        # Behind a seal no number is missing, but where a compaction left out the last needles.
        known = sealed and not header.replaces and not self._unreadable()
        self._expected = header.volume_id, survey.next_sequence if known else 0
        self._loader.add(memoryview(index.records)[: settled * INDEX_RECORD_BYTES], entry)
        checkpointed = final is not None and final.kind == Kind.CHECKPOINT and len(tail) == 1
        plain = self._plain(tail)
        if plain:
            at = settled * INDEX_RECORD_BYTES
            self._loader.add(memoryview(index.records)[at : at + plain * INDEX_RECORD_BYTES], entry)
            tail = tail[plain:]
        self.volumes.add(entry, OpenVolume(volume, self._settle_index(index, paths, records, names)))
        if self.kept is not None:
            self.kept.append(bytes(index.records))
        if last:
            torn_bytes = max(survey.torn_bytes, short)
            if not torn_bytes:
                with self._table.memory.change():
                    self._table.set_volume(entry, row._replace(end=survey.end))
            self.report.log_end = survey.end
            self.tail = Tail(
                volume.path,
                entry,
                state_of(index.records, index.names, survey.end),
                tail,
                survey.durable,
                torn_bytes,
                sealed,
                checkpointed=checkpointed,
            )

    def _plain(self, tail: list[tuple[int, int, Needle]]) -> int:
        """Return how many of the first needles of *tail* can be loaded as a whole; note which directories they change.

        Those that put what was not there, in a slot that nothing ever had, into a directory that is there: what most
        crashes leave. All they change by implication is the time of that directory.
        """
        if self._thorough or self.report.damage:
            return 0
        slots, there = self._loader.slots, set[int]()
        for number, (_, _, needle) in enumerate(tail):
            if needle.kind in _CHANGE_NOTHING:
                continue
            slot, parent = slot_of(needle.inode), slot_of(needle.parent)
            if needle.kind not in _PLAIN_PUTS or slot < slots or not needle.name or needle.inode >> 32:
                return number
            if needle.parent not in there:
                record = self._table.record(parent)
                if not self._table.is_directory(parent) or record.generation != needle.parent >> 32:
                    return number
                there.add(needle.parent)
            if needle.kind == Kind.DIRECTORY:
                there.add(needle.inode)
            self._touched[parent] = needle.ctime_ns
            slots = slot + 1
        return len(tail)

    def _settle_index(self, index: IndexContent, paths: Index, records: bytes, names: bytes) -> Names:
        """Make the files at *paths*, which hold *records* and *names*, say what *index* says; return the names.

        Where nothing may be written, what the file of the names lacks stays in memory.
        """
        if index.records != records or index.names != names:
            missing = not records or not names
            if missing or not index.records.startswith(records) or not index.names.startswith(names):
                self.report.rebuilt.append(paths.records)
            if self._writable:
                self._rewrite(paths.records, bytes(index.records), records)
                self._rewrite(paths.names, bytes(index.names), names)
        return self._names_of(index, paths, names)

    def _names_of(self, index: IndexContent, paths: Index, names: bytes) -> Names:
        """Return the names that *index* says, where the file of the names held *names*."""
        if self._writable or names[: len(index.names)] == index.names:
            return Names(self._disk, self._disk.open(paths.names), len(index.names))
        return Names(self._disk, None, 0, bytes(index.names))

    def _report(self, survey: Survey) -> None:
        self.report.damage += survey.damage
        if not self._live_writer:
            self.report.torn_bytes += survey.torn_bytes
            self.report.torn_needles += survey.torn_needles

    def _is_damaged_at(self, volume_id: int, end: int) -> bool:
        damage = self.report.damage[-1] if self.report.damage else None
        return damage is not None and damage.volume == volume_id and damage.offset + damage.length == end

    def _know_owner(self, needle: Needle) -> None:
        """Define the owner of a put even where the needle that did is damaged: each needle says it itself."""
        words = self._table.memory.words
        if needle.kind not in OWNED_KINDS or needle.owner in self._owners:
            return
        self._owners.add(needle.owner)
        known = needle.owner < words[Word.OWNERS] and self._table.owner(needle.owner) != (0, 0, 0)
        if not known:
            with self._table.memory.change():
                self._table.define_owner(needle.owner, needle.uid, needle.gid, needle.mode, -1)

    def _content(self, path: str) -> bytes:
        return self._disk.read_file(path) if self._disk.exists(path) else b""

    def _rewrite(self, path: str, data: bytes, old: bytes) -> None:
        """Make *data* the content of an index file that holds *old*."""
        file = self._disk.open(path, writable=True, create=True)
        try:
            same = min(len(old), len(data)) if data.startswith(old) or old.startswith(data) else 0
            if len(old) > same:
                self._disk.truncate(file, same)
            self._disk.write(file, same, [data[same:]])
        finally:
            self._disk.close(file)

    # -- what the index does not say --------------------------------------------------------------------------

    def _replay(self, tail: Tail) -> None:
        """Apply the last needles one by one, as when they were appended."""
        for offset, name_offset, needle in tail.needles:
            try:
                self._apply(needle, Place(tail.entry, offset, name_offset))
            except Damaged as error:
                volume_id = self._table.volume(tail.entry).volume_id
                text = f"this contradicts what was written before: {error}"
                self.report.damage.append(Damage(volume_id, offset, needle.length, text, needle.inode))

    def _apply(self, needle: Needle, place: Place) -> None:
        named = names_a_name(needle.kind) and needle.parent
        if named:
            self.mender.find_directory(needle.parent, of=needle.inode)
        if self.report.damage or self._thorough:
            for inode in (needle.inode, needle.extra_u64(Tag.REPLACED), needle.extra_u64(Tag.TARGET)):
                self.mender.link_again(slot_of(inode))
        self.mender.note_xattrs(needle, place)
        self.mender.note_names(needle)
        told = [needle]
        if named and self.mender.is_taken(needle.parent):
            told = self.mender.without_directory(needle)
        if self._thorough:
            told = self.mender.make_way(told)
        with self._table.memory.change():
            for each in told:
                self._table.apply(each, place)


def previous_ends(volumes: Iterable[Volume]) -> dict[int, PreviousEnd]:
    """Return what *volumes*, in their order, say of those before them that end before their file does, by id."""
    found: dict[int, PreviousEnd] = {}
    before: set[int] = set()
    for volume in volumes:
        previous = volume.header.previous
        if previous is not None and previous.volume_id in before:
            found[previous.volume_id] = previous
        before.add(volume.header.volume_id)
    return found
