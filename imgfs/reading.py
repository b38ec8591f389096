"""Reads a volume from one place to another, with its index beside it, and finds every byte that was not written so.

Owns what is wrong with bytes: headers, names, data, footers, padding, the seal, index records. Must not know the
table: which image needs what is damaged is said by check.py, for a check of an open store and for a scrub alike.

*Concurrency:* bytes below the end it is given must not change, but that whole blocks of what nobody needs may be freed.
"""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from imgfs.errors import Damaged
from imgfs.format import (
    ALIGNMENT,
    FLAG_SEAL,
    NEEDLES_START,
    VOLUME_BYTES_LIMIT,
    VOLUME_HEADER,
    VOLUME_HEADER_COPIES,
    IndexState,
    Kind,
    Needle,
    footer_bytes,
    unpack_volume_header,
)
from imgfs.index import checkpoint_state
from imgfs.index_reading import IndexReading, IndexRow
from imgfs.volume import Gap, Volume

# The kinds of needles that the table points at; of a directory it holds all that its needle says.
POINTED_AT = (Kind.FILE, Kind.SYMLINK, Kind.SPECIAL, Kind.LINK, Kind.XATTR)
_LENGTH_FIELD = 2  # of a volume header


class Bad(NamedTuple):
    """Bytes that are not those that were written."""

    start: int
    end: int
    text: str
    needle: Needle | None = None
    suffix: str = ".vol"  # of the file they are in
    offset: int = -1  # in the volume, of the needle that is concerned
    name_offset: int = 0  # where the name that is concerned stands in the index
    readable: bool = False  # what the needle holds is whole all the same
    hole: bool = False  # no damage, if nobody needs it

    @property
    def at(self) -> int:
        """Where in the volume it is, or what it is about."""
        return self.start if self.offset < 0 else self.offset


class VolumeReading:
    """One pass over a volume, or over a part of it."""

    def __init__(
        self,
        volume: Volume,
        index: IndexReading | None,
        start: int,
        end: int,
        *,
        last: bool = False,
        index_end: int = VOLUME_BYTES_LIMIT,
    ) -> None:
        """*last*: the log goes on here, so that only what lies below its durable marks is promised to be whole.

        The index is promised to be whole as far as it speaks of what lies below *index_end*.
        """
        self.volume = volume
        self.start = self.position = start
        self.end = end
        self.last = last
        self.index_end = index_end
        self.needles = 0
        self.durable = NEEDLES_START
        # Whether the last that was read is a whole needle: only there another pass may go on.
        self.at_needle = False
        # Offset / 8 and slot + 1 of each whole needle that the table may point at: 12 bytes for each.
        self.offsets = array("I")
        self.slots = array("I")
        self._bad: list[Bad] = []
        self._index = index
        self._sealed = False

    def read(self) -> Iterator[int]:
        """Read; yield the offset it came to, after every MiB of an image and after every needle."""
        if self.start == NEEDLES_START:
            self._read_header()
        for item in self.volume.scan(self.start, self.end):
            self._sealed = self.at_needle = False
            if isinstance(item, Gap):
                # What is zeros may have been freed; then nobody needs it.
                hole = self.volume.is_hole(item.start, item.end)
                self._bad.append(Bad(item.start, item.end, "no needle can be recognised here", hole=hole))
                if self._index is not None:
                    self._index.gap(item.start, item.end)
                self.position = item.end
            else:
                yield from self._read_needle(*item)
            yield self.position
        if self._index is not None:
            self._index.finish()

    def must_be_sealed(self, previous: IndexState | None) -> None:
        """Know that the volume ends here: with its seal, or where the next volume says that this one, *previous*, does.

        Comes after `read`.
        """
        if previous is not None:
            if self._index is not None:
                self._index.vouch(previous)
        elif not self._sealed and self.position > self.start and not (self._bad and self._bad[-1].end == self.end):
            text = "the volume was cut short: it does not end with a seal"
            self._bad.append(Bad(self.end, self.end, text))

    def _read_needle(self, offset: int, needle: Needle) -> Iterator[int]:
        self.needles += 1
        self.durable = max(self.durable, needle.durable)
        end = offset + needle.length
        try:
            read = offset + needle.data_start
            for piece in self.volume.pieces(needle, offset):
                read += len(piece)
                yield read
        except Damaged:
            hole = self.volume.touches_hole(offset, end)
            self._bad.append(Bad(offset, end, "the data does not match its checksum", needle, hole=hole))
        else:
            if needle.kind in POINTED_AT:
                self.offsets.append(offset // ALIGNMENT)
                self.slots.append(needle.inode & 0xFFFF_FFFF)
            padding = offset + needle.data_start + needle.data_size + footer_bytes(needle.data_size)
            if self.volume.read(padding, end - padding).strip(b"\0"):
                text = "the zeros behind it are damaged, and nothing else"
                self._bad.append(Bad(padding, end, text, needle, offset=offset, readable=True))
        state = checkpoint_state(needle)
        if self._index is not None:
            if state is not None:
                self._index.vouch(state)
            self._index.expect(needle, offset)
        self._sealed = state is not None and bool(needle.flags & FLAG_SEAL)
        self.position, self.at_needle = end, True

    def _read_header(self) -> None:
        """Verify both copies of the header, and the zeros behind them; opening the volume took whichever was whole."""
        data = self.volume.read(0, NEEDLES_START)
        page = VOLUME_HEADER_COPIES[1]
        for start in VOLUME_HEADER_COPIES:
            copy = data[start : start + page]
            text = "one of the two copies of the volume's header is damaged"
            try:
                unpack_volume_header(bytes(start) + copy + bytes(NEEDLES_START - start - page))
                if not copy[VOLUME_HEADER.unpack_from(copy)[_LENGTH_FIELD] :].strip(b"\0"):
                    continue
                text = "the zeros behind a copy of the volume's header are damaged"
            except Damaged:
                pass
            self._bad.append(Bad(start, start + page, text, readable=True))

    # -- what was found ---------------------------------------------------------------------------------------

    @property
    def lost_rows(self) -> list[IndexRow]:
        """What the index says of needles that are not whole."""
        return self._index.lost if self._index is not None else []

    @property
    def suspicious(self) -> bool:
        """Whether there is anything to be judged."""
        return bool(self._bad) or (self._index is not None and bool(self._index.wrong))

    def bad(self) -> list[Bad]:
        """Return what is wrong; above the durable mark of the last volume nothing was promised: that is torn."""
        found = [item for item in self._bad if not self.last or item.at < self.durable]
        for wrong in self._index.wrong if self._index is not None else ():
            if wrong.offset < self.index_end and (not self.last or wrong.offset < self.durable):
                suffix, start, end, text, offset, needle, name_offset = wrong
                found.append(Bad(start, end, text, needle, suffix, offset, name_offset, readable=True))
        return found
