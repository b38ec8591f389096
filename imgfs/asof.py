"""Opening a store as it was at some time: what the log says up to then, and nothing of what came later.

Owns where that time lies in the log. Index records do not tell when their needle was appended, headers do; sequence
numbers grow with time, and so one binary search over the headers of one volume finds the place. Volumes that ended
before are loaded whole, the one at the edge up to there, later ones not at all. Nothing is written.

What was dropped since is not there: an image whose bytes were punched out is shown, and cannot be read. The clock is
trusted to have gone forward: where it was set back, the place is one of several that fit.

*Concurrency:* as recover.py; another process may append to the store meanwhile.
"""

import time
from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from imgfs.disk import Disk
from imgfs.errors import Damaged, NotFound
from imgfs.format import ALIGNMENT, INDEX_RECORD_BYTES, NEEDLES_START, Kind, Needle, PreviousEnd, inode_of
from imgfs.index import Names, checkpoint_state, state_of
from imgfs.load import INDEX_RECORDS
from imgfs.records import VolumeEntry
from imgfs.recover import Recovery, Tail, previous_ends
from imgfs.survey import Damage
from imgfs.table import Table
from imgfs.volume import Volume
from imgfs.volumes import OpenVolume

_SECOND_NS = 1_000_000_000
# What stands in a copy of volumes out of its order, or tells of no change.
_UNDATED = [Kind.OWNER, Kind.CHECKPOINT]
# What may have been punched out, its header too. The index says of it all that a table needs.
_PUNCHED = (Kind.FILE, Kind.SYMLINK, Kind.XATTR)


class AsOf(Recovery):
    """A pass over the volumes up to a time."""

    def __init__(
        self, disk: Disk, root: str, table: Table, store_id: bytes, until_ns: int, *, live_writer: bool
    ) -> None:
        """*until_ns*: the time, in ns since 1970; what was appended at that time counts."""
        super().__init__(disk, root, table, store_id, writable=False, live_writer=live_writer)
        self._until_ns = until_ns

    def run(self) -> None:
        """Fill the table and `volumes`.

        Raises:
            NotFound: there was no store then.
            NewerFormat, Damaged: as for `Recovery`.
        """
        super().run()

    def _settle_root(self) -> None:
        if not self._table.is_directory(0):
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._until_ns // _SECOND_NS))
            raise NotFound(f"at {moment} this store was not there yet; name a later time")

    def _needs_mending(self, orphans: list[int]) -> bool:
        if not self.report.damage:
            self._settle_root()  # or else one would be made
        # What was needed then may have been left out since: of what remains, no name may be there twice.
        return True

    def _load_all(self, found: list[Volume]) -> None:
        ends = previous_ends(found)
        for number, volume in enumerate(found):
            previous, last = ends.get(volume.header.volume_id), number == len(found) - 1
            if (last or not self._had_begun(found[number + 1])) and self._load_part(volume, previous, last=last):
                for later in found[number + 1 :]:
                    later.close()
                break
            self._load(volume, previous, last=last)

    def _had_begun(self, volume: Volume) -> bool:
        """Return whether *volume* held anything then, if its first needle tells; so all before it was there."""
        try:
            return volume.header_at(NEEDLES_START).commit_ns <= self._until_ns
        except Damaged:
            return False

    def _load_part(self, volume: Volume, previous: PreviousEnd | None, *, last: bool) -> bool:
        """Load *volume* up to the time, if it goes beyond; return whether it does."""
        _, paths, _, names_data, _, index, survey = self._begin(volume, previous, last=last)
        for offset, needle in survey.needles():
            index.add(needle, offset, self._table)
        records = np.frombuffer(bytes(index.records), INDEX_RECORDS)
        count = rows_until(volume, records, self._until_ns)
        if count == len(records):
            return False
        end = int(records["offset8"][count]) * ALIGNMENT
        self.report.damage += [each for each in survey.damage if each.offset < end]
        with self._table.memory.change():
            row = VolumeEntry(volume.header.volume_id, end, volume.header.first_sequence, 0)
            entry = self._table.add_volume(row)
        settled = _settled(volume, records[:count])
        self._loader.add(bytes(index.records[: settled * INDEX_RECORD_BYTES]), entry)
        names = self._names_of(index, paths, names_data)
        self.volumes.add(entry, OpenVolume(volume, names))
        needles = self._needles(volume, records[settled:count], names)
        state = state_of(index.records[: count * INDEX_RECORD_BYTES], index.names, end)
        self.tail = Tail(volume.path, entry, state, needles, end, 0, sealed=False, checkpointed=False)
        return True

    def _needles(self, volume: Volume, records: npt.NDArray[np.void], names: Names) -> list[tuple[int, int, Needle]]:
        """Return offset, name offset and needle for each of *records*; what is punched out as far as those tell."""
        found = []
        for record in records:
            offset, name_offset = int(record["offset8"]) * ALIGNMENT, int(record["name_offset"])
            try:
                needle = volume.header_at(offset)
                self._know_owner(needle)
            except Damaged as error:
                if record["kind"] not in _PUNCHED:
                    self.report.damage.append(Damage(volume.header.volume_id, offset, ALIGNMENT, str(error)))
                    continue
                needle = _remembered(record, names)
            found.append((offset, name_offset if needle.kind != Kind.OWNER else 0, needle))
        return found


def rows_until(volume: Volume, records: npt.NDArray[np.void], until_ns: int) -> int:
    """Return how many of the index *records* of *volume* tell of needles that were appended up to *until_ns*."""
    dated = np.flatnonzero(is_dated(records))
    place = bisect_right(range(len(dated)), until_ns, key=lambda row: appended_ns(volume, records[dated[row]]))
    return int(dated[place]) if place < len(dated) else len(records)


def is_dated(records: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Return for each of *records* whether it tells of a change, whose time tells its place in the log."""
    return ~np.isin(records["kind"], _UNDATED)


def appended_ns(volume: Volume, record: npt.NDArray[np.void] | np.void) -> int:
    """Return when the needle of an index *record* of *volume* was appended; about then if its header is gone."""
    try:
        return volume.header_at(int(record["offset8"]) * ALIGNMENT).commit_ns
    except Damaged:
        return int(record["ctime"]) * _SECOND_NS


def _settled(volume: Volume, records: npt.NDArray[np.void]) -> int:
    """Return how many of the first *records* of *volume* tell all there is to tell, the times of directories too.

    The rest has to be replayed needle by needle. Where some of it was left out, as in a copy of volumes, it cannot:
    then the times of directories are those of their own last needles.
    """
    settled = 0
    for row in np.flatnonzero(records["kind"] == Kind.CHECKPOINT)[::-1]:
        try:
            state = checkpoint_state(volume.header_at(int(records["offset8"][row]) * ALIGNMENT))
        except Damaged:
            continue
        if state is not None and state.records <= row:
            settled = state.records
            break
    return settled if _is_complete(volume, records[settled:]) else len(records)


def _is_complete(volume: Volume, records: npt.NDArray[np.void]) -> bool:
    """Return whether no needle is missing between those of *records*, as their sequence numbers tell."""
    numbers = []
    for rows in (range(len(records)), range(len(records) - 1, -1, -1)):
        for row in rows:
            try:
                numbers.append(volume.header_at(int(records["offset8"][row]) * ALIGNMENT).sequence - row)
            except Damaged:
                continue
            break
    return not numbers or numbers[0] == numbers[-1]


def _remembered(record: np.void, names: Names) -> Needle:
    """Return what an index *record* remembers of a needle whose header is gone: all that a table needs."""
    return Needle(
        int(record["kind"]),
        inode_of(int(record["slot"]) - 1, int(record["hash_generation"]) >> 24),
        int(record["parent"]),
        names.get(int(record["name_offset"])),
        int(record["size"]),
        owner=int(record["owner"]),
        mtime_ns=int(record["mtime"]),
        ctime_ns=int(record["ctime"]) * _SECOND_NS,
    )
