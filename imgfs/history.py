"""The past of a store, as its index records tell it: what had which name, which owner and which attributes when.

Owns the arrays that such questions are answered from: all records of all volumes, in the order of the log. A moment is
the number of a row; what is asked for is so just before that. Must not know what anybody wants to know it for, and
reads no volume but where a time or a name is asked for.

*Concurrency:* what was read does not change, whatever a writer appends meanwhile.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.asof import appended_ns, is_dated, rows_until
from imgfs.errors import Damaged
from imgfs.format import ALIGNMENT, Kind, unpack_xattrs
from imgfs.load import INDEX_RECORDS, PUTS
from imgfs.volumes import OpenVolume

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

ROOT_SLOT = 0
# Deeper is no path that a system call could take.
_DEPTH_MAX = 4096
# In place of a row: nothing is above the root; the name is lost.
_TOP, _LOST = -1, -2
_UNKNOWN = b"?"


class Attributes(NamedTuple):
    """Owner, mode and time; the mode of a special file also says its type."""

    uid: int
    gid: int
    mode: int
    mtime_ns: int


class Latest:
    """Finds, of some rows, the last one about a slot before a moment."""

    def __init__(self, slots: Rows, rows: Rows, count: int) -> None:
        """*slots* and *rows* belong together; there are *count* rows in all."""
        self._count = count
        self._keys = np.sort(slots * count + rows)

    def before(self, slots: Rows, moments: Rows) -> Rows:
        """Return the last row about each of *slots* before each of *moments*; -1 where there is none."""
        if not len(self._keys):
            return np.full(len(slots), -1, np.int64)
        place = np.searchsorted(self._keys, slots * self._count + moments) - 1
        key = self._keys[np.maximum(place, 0)]
        known = (place >= 0) & (key // self._count == slots) & (slots >= 0)
        return np.where(known, key % self._count, -1)

    def one_before(self, slot: int, moment: int) -> int:
        """Return the same for one."""
        return int(self.before(np.array([slot]), np.array([moment]))[0])


class History:
    """The index records of a store, and the volumes they speak of."""

    def __init__(self, volumes: Sequence[OpenVolume], records: Sequence[bytes]) -> None:
        """*records* are those of each of *volumes*, which are in the order of the log."""
        self._volumes = volumes
        parts = [np.frombuffer(part, INDEX_RECORDS) for part in records]
        self.rows = np.concatenate(parts) if parts else np.zeros(0, INDEX_RECORDS)
        self._starts = list(accumulate(map(len, parts), initial=0))
        self.kind = np.ascontiguousarray(self.rows["kind"])
        self.slot = self.rows["slot"].astype(np.int64) - 1
        self.generation = self.rows["hash_generation"] >> 24
        named = (self.rows["name_offset"] > 0) & (self.kind != Kind.OWNER)
        self.names = self._latest(named)
        self._attributes = self._latest(self.kind == Kind.ATTRIBUTES)
        self._xattrs = self._latest(self.kind == Kind.XATTR)
        self._directories = self._latest(self.kind == Kind.DIRECTORY)
        self._touches: Latest | None = None
        owners = self.rows[self.kind == Kind.OWNER]
        self._owners = {
            int(row["owner"]): (int(row["parent"]), int(row["size"]), int(row["name_offset"]))
            for row in owners[np.unique(owners["owner"], return_index=True)[1]]
        }

    def __len__(self) -> int:
        return len(self.rows)

    def _latest(self, chosen: Mask) -> Latest:
        rows = np.flatnonzero(chosen)
        return Latest(self.slot[rows], rows, max(1, len(self.rows)))

    # -- times ------------------------------------------------------------------------------------------------

    def row_at(self, moment_ns: int) -> int:
        """Return the first row that was appended after *moment_ns*."""
        for number in range(len(self._volumes) - 1, -1, -1):
            start, end = self._starts[number], self._starts[number + 1]
            dated = np.flatnonzero(is_dated(self.rows[start:end]))
            count = rows_until(self._volumes[number].volume, self.rows[start:end], moment_ns)
            if len(dated) and count > dated[0]:
                return start + count
        return 0

    def appended_ns(self, row: int) -> int:
        """Return when the needle of *row* was appended."""
        return appended_ns(self.volume(row).volume, self.rows[row])

    # -- places -----------------------------------------------------------------------------------------------

    def volume(self, row: int) -> OpenVolume:
        """Return the volume that the needle of *row* lies in."""
        return self._volumes[bisect_right(self._starts, row) - 1]

    def offset(self, row: int) -> int:
        """Return where in its volume the needle of *row* lies, in bytes."""
        return int(self.rows["offset8"][row]) * ALIGNMENT

    # -- names ------------------------------------------------------------------------------------------------

    def paths(self, naming: Rows, moments: Rows) -> list[bytes]:
        """Return the paths that the names in the rows *naming* had at *moments*, without a slash at their start."""
        levels: list[Rows] = []
        row = np.where(naming < 0, _LOST, naming)
        while len(levels) < _DEPTH_MAX:
            levels.append(row)
            parent = np.where(row >= 0, self.rows["parent"][np.maximum(row, 0)].astype(np.int64) - 1, ROOT_SLOT)
            inside = parent > ROOT_SLOT
            if not inside.any():
                break
            above = self.names.before(parent, moments)
            row = np.where(inside, np.where(above < 0, _LOST, above), _TOP)
        texts = {number: self._name(number) for number in np.unique(np.concatenate(levels)).tolist()}
        columns = [level.tolist() for level in reversed(levels)]
        return [b"/".join(texts[part] for part in parts if part != _TOP) for parts in zip(*columns, strict=True)]

    def _name(self, row: int) -> bytes:
        if row < 0:
            return _UNKNOWN
        try:
            return self.volume(row).names.get(int(self.rows["name_offset"][row]))
        except Damaged:
            return _UNKNOWN

    def ancestors(self, naming: int, moment: int) -> list[int]:
        """Return the slots of the directories above the name in row *naming* at *moment*, from the top down."""
        slots: list[int] = []
        row = naming
        while row >= 0 and len(slots) < _DEPTH_MAX:
            parent = int(self.rows["parent"][row]) - 1
            if parent <= ROOT_SLOT:
                break
            slots.append(parent)
            row = self.names.one_before(parent, moment)
        return slots[::-1]

    # -- attributes -------------------------------------------------------------------------------------------

    def attributes(self, put: int, moment: int) -> Attributes:
        """Return what was at *moment* the owner, mode and time of what the put in *row* put."""
        return self.all_attributes(np.array([put]), np.array([moment]))[0]

    def all_attributes(self, puts: Rows, moments: Rows) -> list[Attributes]:
        """Return the same for each of *puts*."""
        rows = self._attributes_rows(puts, moments)
        times = self.rows["mtime"][rows].tolist()
        return [Attributes(*self._owner(row), time) for row, time in zip(rows.tolist(), times, strict=True)]

    def _attributes_rows(self, puts: Rows, moments: Rows) -> Rows:
        rows = self._attributes.before(self.slot[puts], moments)
        return np.where((rows > puts) & (self.generation[rows] == self.generation[puts]), rows, puts)

    def _owner(self, row: int) -> tuple[int, int, int]:
        known = self._owners.get(int(self.rows["owner"][row]))
        if known is not None:
            return known
        try:
            needle = self.volume(row).volume.header_at(self.offset(row))
        except Damaged:
            return 0, 0, 0
        return needle.uid, needle.gid, needle.mode

    def directory(self, slot: int, moment: int) -> int:
        """Return the row that put the directory which was in *slot* at *moment*; -1 if none did."""
        return self._directories.one_before(slot, moment)

    def directory_attributes(self, put: int, moment: int) -> Attributes:
        """Return the same of a directory, whose time its entries have moved on, too.

        Not by those that went to another directory: only their needle says from where.
        """
        found = self.attributes(put, moment)
        if self._touches is None:
            self._touches = self._find_touches()
        row = self._touches.one_before(int(self.slot[put]), moment)
        if row < put:
            return found
        try:
            touched_ns = self.volume(row).volume.header_at(self.offset(row)).ctime_ns
        except Damaged:
            return found
        told = self._attributes_rows(np.array([put]), np.array([moment]))[0]
        return found._replace(mtime_ns=touched_ns) if row > told else found

    def _find_touches(self) -> Latest:
        """Return what finds the last change of the entries of a directory."""
        puts = np.flatnonzero(np.isin(self.kind, PUTS))
        puts = puts[np.argsort(self.slot[puts], kind="stable")]
        again = np.zeros(len(puts), bool)
        again[1:] = self.slot[puts[1:]] == self.slot[puts[:-1]]
        again[1:] &= self.generation[puts[1:]] == self.generation[puts[:-1]]
        rows = np.concatenate([puts[~again], np.flatnonzero(np.isin(self.kind, [Kind.RENAME, Kind.DELETE]))])
        return Latest(self.rows["parent"][rows].astype(np.int64) - 1, rows, max(1, len(self.rows)))

    def xattrs(self, put: int, moment: int) -> dict[bytes, bytes]:
        """Return the extended attributes at *moment* of what the put in row *put* put.

        Raises:
            Damaged: they are not what was written, or punched out.
        """
        row = self._xattrs.one_before(int(self.slot[put]), moment)
        if row < 0 or self.generation[row] != self.generation[put] or not self.rows["size"][row]:
            return {}
        return unpack_xattrs(b"".join(self.pieces(row)))

    def pieces(self, row: int) -> Iterator[bytes]:
        """Yield the data of the needle of *row*, at most 1 MiB at a time, each piece verified.

        Raises:
            Damaged: the next piece is not what was written, or punched out.
        """
        volume, offset = self.volume(row).volume, self.offset(row)
        yield from volume.pieces(volume.header_at(offset), offset)
