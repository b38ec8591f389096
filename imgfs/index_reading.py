"""Reads the index files of a volume beside its needles, and finds every byte that they do not say.

Owns where it is in the two files. Must not know the table. What the needles cannot tell, because they are damaged or
freed, is vouched for by the seal's checksums of both files.

*Concurrency:* none; one reader.
"""

from typing import NamedTuple

from crc32c import crc32c

from imgfs.disk import Disk
from imgfs.format import (
    ALIGNMENT,
    INDEX_RECORD,
    INDEX_RECORD_BYTES,
    NEEDLES_START,
    IndexState,
    Needle,
    hash_seed,
    inode_of,
    name_hash,
)
from imgfs.index import Index, names_a_name, names_header, pack_name, pack_record

_BUFFER_BYTES = 1 << 16
# Where one record is not the expected one, so many behind it are searched for that.
_AHEAD = 64
# More wrong records than this in one volume are one finding.
_WRONG_MAX = 1000
_KIND, _SLOT, _NAME_OFFSET, _OFFSET8, _HASH = 0, 1, 3, 4, 9  # fields of a record
_NAME_AT, _NAME_END = 9, 13  # bytes of the offset of its name


class IndexRow(NamedTuple):
    """What a record says of a needle that is not whole any more."""

    kind: int
    inode: int
    offset: int


class Wrong(NamedTuple):
    """Bytes of an index file that are not what its volume says."""

    suffix: str  # of the file
    start: int
    end: int
    text: str
    offset: int  # of the needle in the volume
    needle: Needle | None
    name_offset: int  # where its name stands, 0 for none


class _Stream:
    """A file that is read from one end to the other, with the checksum of what was."""

    def __init__(self, disk: Disk, file: int, position: int, crc: int) -> None:
        self.position = position
        self.crc = crc
        self._disk = disk
        self._file = file
        self._buffer = b""
        self._at = 0  # of `position` in the buffer

    def peek(self, size: int) -> bytes:
        """Return the next *size* bytes, fewer at the end of the file."""
        if len(self._buffer) - self._at < size:
            self._buffer, self._at = self._disk.read(self._file, self.position, max(size, _BUFFER_BYTES)), 0
        return self._buffer[self._at : self._at + size]

    def take(self, size: int) -> bytes:
        """Return them, and go on behind them."""
        data = self.peek(size)
        self.crc = crc32c(data, self.crc)
        self.position += len(data)
        self._at += len(data)
        return data

    def seek(self, position: int) -> None:
        """Go on at *position*; the checksum of all so far is kept only if that lies ahead and in the file."""
        if position >= self.position:
            self.take(position - self.position)
        self.crc ^= position != self.position
        self.position, self._buffer, self._at = position, b"", 0


class IndexReading:
    """One pass over the index files of a volume, in step with its needles."""

    def __init__(self, disk: Disk, paths: Index, store_id: bytes, volume_id: int, start: IndexState) -> None:
        """*start* is how far an earlier pass came. OSError as the disk says, if one of the files is missing too."""
        self._disk = disk
        self._seed = hash_seed(store_id)
        self._files = [disk.open(paths.records)]
        try:
            self._files.append(disk.open(paths.names))
        except BaseException:
            disk.close(self._files[0])
            raise
        self._records = _Stream(disk, self._files[0], start.records * INDEX_RECORD_BYTES, start.records_crc)
        self._names = _Stream(disk, self._files[1], start.names_bytes, start.names_crc)
        self._gap = (0, 0)
        # Behind a gap the next name may lie elsewhere than the records of what was in it say.
        self._loose = False
        self._over = False
        self.wrong: list[Wrong] = []
        self.lost: list[IndexRow] = []
        """What the records say of needles in gaps."""
        if start.end == NEEDLES_START:
            # An earlier pass that found nothing behind the header may do it again.
            self._names = _Stream(disk, self._files[1], 0, 0)
            header = names_header(volume_id)
            if self._names.take(len(header)) != header:
                self._note(".names", 0, len(header), "the header of .names is damaged", None, NEEDLES_START)

    def close(self) -> None:
        for file in self._files:
            self._disk.close(file)

    def state(self, end: int) -> IndexState:
        """Return how far this pass came, when the needles up to *end* were expected."""
        records = self._records.position // INDEX_RECORD_BYTES
        return IndexState(end, records, self._records.crc, self._names.position, self._names.crc)

    # -- in the order of the volume ---------------------------------------------------------------------------

    def gap(self, start: int, end: int) -> None:
        """Know that between *start* and *end* no needle is whole; what the records say of them goes to `lost`."""
        self._gap = (self._gap[0] or start, end)

    def expect(self, needle: Needle, offset: int) -> None:
        """Hold the next record, and the next name, against *needle*, which lies at *offset* and is whole."""
        if self._over:
            return
        self._pass_gap()
        name = pack_name(needle.name) if names_a_name(needle.kind) else b""
        value = name_hash(needle.name, self._seed) if name else 0
        expected = pack_record(needle, offset, self._names.position if name else 0, value)
        if self._records.peek(INDEX_RECORD_BYTES) == expected:
            self._records.take(INDEX_RECORD_BYTES)
        else:
            self._search(expected, needle, offset, loose=self._loose and bool(name))
        if name and not self._over:
            self._loose = False
            at = self._names.position
            if self._names.take(len(name)) != name:
                self._note(".names", at, len(name), "its name in the index is damaged", needle, offset)

    def _note(self, suffix: str, start: int, size: int, text: str, needle: Needle | None, offset: int) -> None:
        self.wrong.append(Wrong(suffix, start, start + size, text, offset, needle, start if suffix == ".names" else 0))
        self._over = self._over or len(self.wrong) > _WRONG_MAX

    def _pass_gap(self) -> None:
        start, end = self._gap
        if not end:
            return
        self._gap = (0, 0)
        self._loose = True
        while True:
            data = self._records.peek(INDEX_RECORD_BYTES)
            if len(data) < INDEX_RECORD_BYTES:
                return
            fields = INDEX_RECORD.unpack(data)
            offset = fields[_OFFSET8] * ALIGNMENT
            if not start <= offset < end:
                return
            self._records.take(INDEX_RECORD_BYTES)
            kind, inode = fields[_KIND], inode_of(fields[_SLOT] - 1, fields[_HASH] >> 24)
            self.lost.append(IndexRow(kind, inode, offset))
            if names_a_name(kind) and fields[_NAME_OFFSET] == self._names.position:
                length = self._names.peek(1)
                self._names.take(1 + length[0] if length else 0)

    def _search(self, expected: bytes, needle: Needle, offset: int, *, loose: bool) -> None:
        """Find the record *expected* of *needle*, which is not the next; with *loose* its name may lie elsewhere."""
        at = self._records.position
        ahead = self._records.peek(_AHEAD * INDEX_RECORD_BYTES)
        if len(ahead) < INDEX_RECORD_BYTES:
            self._note(".idx", at, INDEX_RECORD_BYTES, "the index ends too early", None, offset)
            self._over = True
            return
        for start in range(0, len(ahead) - INDEX_RECORD_BYTES + 1, INDEX_RECORD_BYTES):
            found = ahead[start : start + INDEX_RECORD_BYTES]
            if found == expected or (loose and self._names_elsewhere(found, expected, needle)):
                if start:
                    self._records.take(start)
                    self._note(".idx", at, start, "the index of what was here is damaged", None, offset)
                break
        else:
            self._note(".idx", at, INDEX_RECORD_BYTES, "its record in the index is damaged", needle, offset)
        self._records.take(INDEX_RECORD_BYTES)

    def _names_elsewhere(self, found: bytes, expected: bytes, needle: Needle) -> bool:
        """Return whether *found* is *expected*, but for where the name of *needle* is; then go on there."""
        if found[:_NAME_AT] != expected[:_NAME_AT] or found[_NAME_END:] != expected[_NAME_END:]:
            return False
        position = INDEX_RECORD.unpack(found)[_NAME_OFFSET]
        name = pack_name(needle.name)
        if self._disk.read(self._files[1], position, len(name)) != name:
            return False
        self._names.seek(position)
        return True

    def vouch(self, state: IndexState) -> None:
        """Hold all so far against what a checkpoint says: only it knows what no whole needle tells any more."""
        self._pass_gap()
        records, names = self._records, self._names
        if self.wrong or state.records * INDEX_RECORD_BYTES != records.position:
            return
        text = "the index of what was deleted is damaged"
        if records.crc != state.records_crc:
            self._note(".idx", 0, records.position, text, None, state.end)
        if (names.position, names.crc) != (state.names_bytes, state.names_crc):
            self._note(".names", 0, state.names_bytes, text, None, state.end)

    def finish(self) -> None:
        """Know that no needle follows."""
        self._pass_gap()
