"""Opening a store: reads the index files as far as they can be trusted, the rest from the volumes.

The same for a clean start, a start after a crash and a rebuild from volumes alone: they differ in how much a
checkpoint vouches for. Owns the rule that tells torn from corrupt (docs/crash.md). Must not know open images.

*Concurrency:* runs before the store is shared.
"""

from dataclasses import dataclass, field

from imgfs.disk import Disk
from imgfs.errors import Damaged
from imgfs.format import (
    FLAG_SEAL,
    INDEX_RECORD_BYTES,
    IndexState,
    Kind,
    Needle,
    PreviousEnd,
    slot_of,
)
from imgfs.index import (
    Names,
    checkpoint_state,
    index_paths,
    names_a_name,
    names_header,
    pack_name,
    pack_record,
    state_of,
    trusted_state,
)
from imgfs.layout import VOLUME_SEALED, Word
from imgfs.load import Loader, rebuild_free_queue
from imgfs.table import Place, Table, VolumeEntry
from imgfs.volume import Gap, Volume
from imgfs.volumes import SUFFIX, OpenVolume, Volumes

VOLUMES = "volumes"


@dataclass(frozen=True)
class Damage:
    """Bytes that are not those that were written, and what is known of them."""

    volume: int
    offset: int
    length: int
    text: str
    inode: int = 0

    def __str__(self) -> str:
        image = f", inode {self.inode:#x}" if self.inode else ""
        return f"volume {self.volume}, offset {self.offset}, {self.length} bytes{image}: {self.text}"


@dataclass
class RecoveryReport:
    """What opening the store found."""

    torn_bytes: int = 0
    torn_needles: int = 0
    replayed_needles: int = 0
    damage: list[Damage] = field(default_factory=list)
    rebuilt: list[str] = field(default_factory=list)


@dataclass
class Tail:
    """Where the last volume ends, and what of it only the volume tells."""

    path: str
    entry: int
    state: IndexState
    needles: list[tuple[int, int, Needle]]  # offset, name offset
    torn_bytes: int
    sealed: bool
    checkpointed: bool


class Recovery:
    """One pass over the volumes, in the order of their sequence numbers, into an empty table."""

    def __init__(self, disk: Disk, root: str, table: Table, *, writable: bool, live_writer: bool = False) -> None:
        """*live_writer*: another process appends to the store, so that an unfinished needle at its end is no damage."""
        self._disk = disk
        self._directory = f"{root}/{VOLUMES}"
        self._table = table
        self._writable = writable
        self._live_writer = live_writer
        self._loader = Loader(table.memory)
        self.report = RecoveryReport()
        self.volumes = Volumes(disk, self._directory, table)
        self.tail: Tail | None = None
        self.orphans: list[int] = []
        self.next_sequence = 1
        self._owners: set[int] = set()

    def run(self) -> None:
        """Fill the table and `volumes`.

        Raises:
            NewerFormat: a newer release wrote one of the volumes.
        """
        found = self._open_volumes()
        ends = {volume.header.previous.volume_id: volume.header.previous for volume in found if volume.header.previous}
        for number, volume in enumerate(found):
            last = number == len(found) - 1
            self._load(volume, ends.get(volume.header.volume_id), last=last)
        self.orphans = self._loader.link()
        if self.tail is not None:
            self._replay(self.tail)
        rebuild_free_queue(self._table.memory)
        words = self._table.memory.words
        words[Word.NEXT_SEQUENCE] = max(words[Word.NEXT_SEQUENCE], self.next_sequence)

    def _open_volumes(self) -> list[Volume]:
        volumes = []
        for name in self._disk.names(self._directory):
            path = f"{self._directory}/{name}"
            if name.endswith(".new") and self._writable:
                self._disk.unlink(path)  # a volume that a crash kept from being published
            if not name.endswith(SUFFIX):
                continue
            try:
                volumes.append(Volume.open(self._disk, path))
            except Damaged as error:
                file = self._disk.open(path)
                size = self._disk.size(file)
                self._disk.close(file)
                number = int(name.removesuffix(SUFFIX)) if name.removesuffix(SUFFIX).isdigit() else 0
                self.report.damage.append(Damage(number, 0, size, str(error)))
        return sorted(volumes, key=lambda volume: (volume.header.first_sequence, volume.header.volume_id))

    # -- one volume -------------------------------------------------------------------------------------------

    def _load(self, volume: Volume, previous: PreviousEnd | None, *, last: bool) -> None:
        header = volume.header
        size = previous.index_state.end if previous else volume.size()
        paths = index_paths(volume.path)
        records, names = self._content(paths.records), self._content(paths.names)
        trusted = trusted_state(records, names, volume, size, previous.index_state if previous else None)
        fresh_records = bytearray(records[: trusted.records * INDEX_RECORD_BYTES])
        fresh_names = bytearray(names[: trusted.names_bytes] if trusted.records else names_header(header.volume_id))

        with self._table.memory.change():
            row = VolumeEntry(header.volume_id, size, header.first_sequence, 0 if last else VOLUME_SEALED)
            entry = self._table.add_volume(row)
        # What a successor exists for is durable: sealing comes before its first needle.
        needles, torn = self._survey(volume, trusted.end, size, all_durable=not last)
        end = trusted.end
        settled = trusted.records
        tail: list[tuple[int, int, Needle]] = []
        for number, (offset, needle) in enumerate(needles):
            self._know_owner(needle)
            name_offset = len(fresh_names) if needle.name and names_a_name(needle.kind) else 0
            value = self._table.hash(needle.name) if name_offset else 0
            fresh_records += pack_record(needle, offset, name_offset, value)
            if name_offset:
                fresh_names += pack_name(needle.name)
            end = offset + needle.length
            tail.append((offset, name_offset, needle))
            state = checkpoint_state(needle)
            if state is not None:
                # Up to there the index says it all; what came after may have changed directories by implication.
                tail = [row for row in tail if row[0] >= state.end]
                settled = trusted.records + number + 1 - len(tail)
        sequences = [needle.sequence + 1 for _, needle in needles]
        self.next_sequence = max(self.next_sequence, header.first_sequence, *sequences)
        self.report.replayed_needles += len(needles)
        if not last:
            settled, end = trusted.records + len(needles), size
        self._loader.add(bytes(fresh_records[: settled * INDEX_RECORD_BYTES]), entry)

        if fresh_records != records or fresh_names != names:
            if not records or not fresh_records.startswith(records) or not fresh_names.startswith(names):
                self.report.rebuilt.append(paths.records)
            if self._writable:
                self._rewrite(paths.records, bytes(fresh_records), records)
                self._rewrite(paths.names, bytes(fresh_names), names)
        in_file = self._writable or names[: len(fresh_names)] == fresh_names
        file = self._disk.open(paths.names) if in_file else None
        self.volumes.add(entry, OpenVolume(volume, Names(self._disk, file, 0, b"" if in_file else bytes(fresh_names))))
        if last:
            final = needles[-1][1] if needles else None
            sealed = final is not None and final.kind == Kind.CHECKPOINT and bool(final.flags & FLAG_SEAL)
            self.tail = Tail(
                volume.path,
                entry,
                state_of(fresh_records, fresh_names, end),
                tail,
                torn,
                sealed,
                checkpointed=final is not None and final.kind == Kind.CHECKPOINT and len(tail) == 1,
            )

    def _survey(
        self, volume: Volume, start: int, size: int, *, all_durable: bool
    ) -> tuple[list[tuple[int, Needle]], int]:
        """Return the good needles from *start* on, and how many bytes at the end are torn.

        Bytes below the highest durable mark were once on the disk: what is bad there is damage, reported and stepped
        over. Above it the log ends at the first needle that is not whole.
        """
        items = list(volume.scan(start, size))
        marks = [item[1].durable for item in items if not isinstance(item, Gap)]
        durable = size if all_durable else max(marks, default=0)
        good: list[tuple[int, Needle]] = []
        for number, item in enumerate(items):
            offset = item.start if isinstance(item, Gap) else item[0]
            if offset >= durable and (isinstance(item, Gap) or not volume.whole(item[1], offset)):
                if not self._live_writer:
                    self.report.torn_bytes += size - offset
                    self.report.torn_needles += sum(not isinstance(rest, Gap) for rest in items[number:])
                return good, size - offset
            if isinstance(item, Gap):
                damage = Damage(volume.header.volume_id, offset, item.end - offset, "no image can be recognised here")
                self.report.damage.append(damage)
            else:
                good.append(item)
        return good, 0

    def _know_owner(self, needle: Needle) -> None:
        """Define the owner of a put even where the needle that did is damaged: each needle says it itself."""
        words = self._table.memory.words
        if needle.kind in (Kind.DELETE, Kind.RENAME, Kind.CHECKPOINT, Kind.OWNER) or needle.owner in self._owners:
            return
        self._owners.add(needle.owner)
        known = needle.owner < words[Word.OWNERS] and self._table.owner(needle.owner) != (0, 0, 0)
        if not known:
            with self._table.memory.change():
                self._table.define_owner(needle.owner, needle.uid, needle.gid, needle.mode, -1)

    def _content(self, path: str) -> bytes:
        if not self._disk.exists(path):
            return b""
        file = self._disk.open(path)
        try:
            return self._disk.read(file, 0, self._disk.size(file))
        finally:
            self._disk.close(file)

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
        table = self._table
        table.replaying = True
        for offset, name_offset, needle in tail.needles:
            try:
                with table.memory.change():
                    table.apply(needle, Place(tail.entry, offset, name_offset))
            except Damaged:
                self._keep_orphan(needle, Place(tail.entry, offset, name_offset))
        table.replaying = False

    def _keep_orphan(self, needle: Needle, place: Place) -> None:
        """Keep an image whose directory was lost: `Store` gives the directory another name."""
        self.orphans.append(slot_of(needle.inode))
        with self._table.memory.change():
            self._table.add_orphan(needle, place)
