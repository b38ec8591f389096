"""A volume: one append-only file of needles, read, checked and scanned.

Owns the file of one volume. Must not know the table or the index; it finds needles by offset only.

*Concurrency:* reading keeps no state, so any thread may; appending is for the holder of the table's lock.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from crc32c import crc32c

from imgfs.disk import Buffer, Disk
from imgfs.errors import Damaged
from imgfs.format import (
    ALIGNMENT,
    CHECKSUM,
    CHUNK_BYTES,
    FOOTER,
    NEEDLE_HEADER,
    NEEDLE_HEADER_BYTES,
    NEEDLE_HEADER_BYTES_MAX,
    NEEDLE_MAGIC,
    NEEDLES_START,
    ChecksumBuilder,
    Checksums,
    Needle,
    VolumeHeader,
    checksums,
    footer_bytes,
    header_checksum,
    pack_footer,
    pack_needle_header,
    pack_volume_header,
    unpack_footer,
    unpack_needle_header,
    unpack_volume_header,
)
from imgfs.plausible import plausible_header, plausible_needle

# A scan reads so much at once: many small needles, or one header and a little of a large image.
_WINDOW_BYTES = 256 << 10
HOLE_BYTES = 4096  # what is freed is a multiple of this, at multiples of it
# Magic, header length, kind, inode, data size and name length in a header.
_PLACING = operator.itemgetter(0, 1, 2, 5, 11, 16)
_ZEROS = bytes(64 << 10)
_MAGIC = NEEDLE_MAGIC.to_bytes(4, "little")


@dataclass(frozen=True)
class Gap:
    """Bytes of a volume, from *start* to *end*, that hold no needle that could be recognised."""

    start: int
    end: int


class Volume:
    """An open volume file."""

    def __init__(self, disk: Disk, path: str, file: int, header: VolumeHeader, *, doubting: bool = True) -> None:
        """*doubting*: what no writer can have written is no needle, though its checksum is right."""
        self.header = header
        self._doubting = doubting
        self.path = path
        self._disk = disk
        self._file = file
        self._seed = header.seed()

    @classmethod
    def create(cls, disk: Disk, path: str, header: VolumeHeader, extent_bytes: int) -> "Volume":
        """Make a volume file that holds nothing but its header; it is not durable yet."""
        file = disk.open(path, writable=True, create=True)
        try:
            disk.truncate(file, 0)
            if extent_bytes:
                disk.hint_extent_size(file, extent_bytes)
            disk.write(file, 0, [pack_volume_header(header)])
        except BaseException:
            disk.close(file)
            raise
        return cls(disk, path, file, header)

    @classmethod
    def open(cls, disk: Disk, path: str, *, writable: bool = False) -> "Volume":
        """Open the volume at *path*.

        Raises:
            NewerFormat: a newer release wrote it.
            Damaged: its header cannot be read.
        """
        file = disk.open(path, writable=writable)
        try:
            header = unpack_volume_header(disk.read(file, 0, NEEDLES_START))
            if not plausible_header(header):
                raise Damaged("the volume header says what no release of imgfs writes")
        except BaseException:
            disk.close(file)
            raise
        return cls(disk, path, file, header)

    def close(self) -> None:
        self._disk.close(self._file)

    def duplicate(self) -> "Volume":
        """Return the same volume on a descriptor of its own: a sync may outlast the log's."""
        return Volume(self._disk, self.path, self._disk.duplicate(self._file), self.header)

    def size(self) -> int:
        """Return the length of the file in bytes."""
        return self._disk.size(self._file)

    def sync(self) -> None:
        """Make all needles durable that were appended before the call."""
        self._disk.sync(self._file)

    def content_end(self, start: int, end: int) -> int:
        """Return where between *start* and *end* nothing but zeros follows; *start* if there is nothing else."""
        return self._disk.content_end(self._file, start, end)

    def holes(self, end: int) -> Iterator[tuple[int, int]]:
        """Yield where each hole of the file begins and ends, in bytes, up to *end*."""
        return self._disk.holes(self._file, 0, end)

    # -- reading ----------------------------------------------------------------------------------------------

    def prefetch(self, offset: int, size: int) -> None:
        """Let the disk start to read a needle of about *size* bytes of data."""
        self._disk.prefetch(self._file, offset, NEEDLE_HEADER_BYTES_MAX + size)

    def read(self, offset: int, size: int, *, nowait: bool = False) -> bytes:
        """Return *size* bytes at *offset*, fewer only at the end of the file; WouldBlock as Disk.read."""
        return self._disk.read(self._file, offset, size, nowait=nowait)

    def read_resident(self, offset: int, size: int) -> bytearray:
        """As `read`, of what is in memory; WouldBlock as Disk.read_resident."""
        return self._disk.read_resident(self._file, offset, size)

    def header_at(self, offset: int, *, nowait: bool = False) -> Needle:
        """Return the needle whose header stands at *offset*.

        Raises:
            Damaged: none does.
        """
        needle = self.unpack(self.read(offset, NEEDLE_HEADER_BYTES_MAX, nowait=nowait), offset)
        if needle is None:
            raise Damaged(f"volume {self.header.volume_id}, offset {offset}: the header of this image is damaged")
        return needle

    def data_of(self, inode: int, kind: int, offset: int, size: int) -> memoryview | None:
        """Return the *size* bytes of data, at most a MiB, of *inode*; None unless its whole needle lies at *offset*.

        As good as `unpack`, `footer_of` and a checksum, in a third of the time: every `open` asks for this.

        Raises:
            WouldBlock: some of it is not in memory.
        """
        data = self.read_resident(offset, NEEDLE_HEADER_BYTES_MAX + size + FOOTER.size)
        if len(data) < NEEDLE_HEADER_BYTES:
            return None
        fields = NEEDLE_HEADER.unpack_from(data)
        magic, header_bytes, its_kind, its_inode, its_size, name_bytes = _PLACING(fields)
        start = header_bytes + name_bytes
        if (magic, its_kind, its_inode, its_size) != (NEEDLE_MAGIC, kind, inode, size) or start > len(data):
            return None
        (checksum,) = CHECKSUM.unpack_from(data, NEEDLE_HEADER.size)
        if checksum != header_checksum(data, start, self._seed, offset):
            return None
        view = memoryview(data)
        content = view[start : start + size]
        if size:
            sums = unpack_footer(view[start + size :], size, checksum)
            if sums is None or sums.data != crc32c(content):
                return None
        return content

    def unpack(self, data: Buffer, offset: int) -> Needle | None:
        """Return the needle whose header starts *data*, read at *offset*; None if it is not whole or makes no sense."""
        needle = unpack_needle_header(data, self._seed, offset)
        if needle is None or (self._doubting and not plausible_needle(needle, offset, self.header.first_sequence)):
            return None
        return needle

    def footer_of(self, needle: Needle, offset: int, *, nowait: bool = False) -> Checksums:
        """Return the checksums in the footer of *needle*, which lies at *offset*.

        Raises:
            Damaged: the footer is not the one that was written.
        """
        at = offset + needle.data_start + needle.data_size
        sums = unpack_footer(
            self.read(at, footer_bytes(needle.data_size), nowait=nowait), needle.data_size, needle.checksum
        )
        if sums is None:
            raise Damaged(f"volume {self.header.volume_id}, offset {offset}: the footer of this image is damaged")
        return sums

    def is_kept(self, needle: Needle, offset: int) -> bool:
        """Return whether the bytes of *needle*, which lies at *offset*, are still there; reads none unless it must."""
        try:
            self.footer_of(needle, offset)
        except Damaged:
            return False
        if not needle.data_size or self._disk.next_hole(self._file, offset) >= offset + needle.length:
            return True
        # A copy of the file may have holes where an image has zeros.
        return self.whole(needle, offset)

    def pieces(self, needle: Needle, offset: int) -> Iterator[bytes]:
        """Yield the data of *needle*, 1 MiB at a time, each piece verified before it is yielded.

        Raises:
            Damaged: the footer or the next piece is not what was written.
        """
        sums = self.footer_of(needle, offset)
        start = offset + needle.data_start
        for index, at in enumerate(range(0, needle.data_size, CHUNK_BYTES)):
            piece = self.read(start + at, min(CHUNK_BYTES, needle.data_size - at))
            expected = sums.chunks[index] if sums.chunks else sums.data
            if len(piece) < min(CHUNK_BYTES, needle.data_size - at) or checksums(piece).data != expected:
                raise Damaged(
                    f"volume {self.header.volume_id}, offset {offset}: bytes {at} to {at + CHUNK_BYTES} are damaged"
                )
            yield piece

    def whole(self, needle: Needle, offset: int) -> bool:
        """Return whether the data of *needle* is what was written."""
        size = needle.data_size
        if 0 < size <= CHUNK_BYTES:
            # One read for both: a start after a crash does this for every needle behind the last mark.
            data = memoryview(self.read(offset + needle.data_start, size + footer_bytes(size)))
            sums = unpack_footer(data[size:], size, needle.checksum)
            return sums is not None and checksums(data[:size]) == sums
        try:
            for _ in self.pieces(needle, offset):
                pass
        except Damaged:
            return False
        return True

    def allocated_bytes(self) -> int:
        """Return how much of the disk the volume takes."""
        return self._disk.allocated_bytes(self._file)

    def punch(self, start: int, end: int) -> int:
        """Free the whole blocks between *start* and *end*; return how many bytes, -1 where it cannot be done."""
        first, last = -(-start // HOLE_BYTES) * HOLE_BYTES, end // HOLE_BYTES * HOLE_BYTES
        if last <= first:
            return 0
        return last - first if self._disk.punch(self._file, first, last - first) else -1

    def is_hole(self, start: int, end: int) -> bool:
        """Return whether the bytes from *start* to *end*, where no needle was found, are what `punch` leaves.

        Before the first of its blocks there may stand the beginning of a header, which it has cut; behind the last
        one the rest of a needle.
        """
        first, last = start // HOLE_BYTES * HOLE_BYTES, end // HOLE_BYTES * HOLE_BYTES
        if not self._is_zero(first, first + HOLE_BYTES):
            first += HOLE_BYTES
            if first - start >= self._header_bytes(start):
                return False
        return first < last and self._is_zero(first, last)

    def _is_zero(self, start: int, end: int) -> bool:
        """Return whether all bytes from *start* to *end* are zeros. A copy of the file may have them for holes."""
        for position in range(start, end, _WINDOW_BYTES):
            if self._disk.next_data(self._file, position) >= end:
                return True
            data = self.read(position, min(_WINDOW_BYTES, end - position))
            if not data or data.count(0) != len(data):
                return False
        return True

    def _header_bytes(self, offset: int) -> int:
        """Return how long the header and name at *offset* are, which need not be whole; at most what they can be."""
        data = self.read(offset, NEEDLE_HEADER.size)
        if len(data) < NEEDLE_HEADER.size or not data.startswith(_MAGIC):
            return NEEDLE_HEADER_BYTES_MAX
        fields = NEEDLE_HEADER.unpack(data)
        header_bytes, name_bytes = int(fields[1]), int(fields[-1])
        return min(NEEDLE_HEADER_BYTES_MAX, header_bytes + (name_bytes or NEEDLE_HEADER_BYTES_MAX))

    def touches_hole(self, start: int, end: int) -> bool:
        """Return whether any of the blocks that hold the bytes from *start* to *end* is one that `punch` left."""
        blocks = range(start // HOLE_BYTES * HOLE_BYTES, end, HOLE_BYTES)
        return any(self._is_zero(block, block + HOLE_BYTES) for block in blocks)

    def scan(self, start: int, end: int) -> Iterator[tuple[int, Needle] | Gap]:
        """Yield (offset, needle) for each needle between *start* and *end*, and the gaps; reads headers only."""
        window, window_start = b"", start
        offset = start
        while offset < end:
            at = offset - window_start
            if len(window) - at < NEEDLE_HEADER_BYTES_MAX and window_start + len(window) < end:
                window, window_start, at = self.read(offset, min(_WINDOW_BYTES, end - offset)), offset, 0
            needle = self.unpack(memoryview(window)[at : at + NEEDLE_HEADER_BYTES_MAX], offset)
            behind = offset + needle.length if needle is not None else end + 1
            if needle is not None and behind <= end:
                yield offset, needle
                offset = behind
            else:
                following = self._next_needle(offset + ALIGNMENT, end)
                yield Gap(offset, following)
                offset = following

    def _next_needle(self, start: int, end: int) -> int:
        """Return where the next needle at or after *start* lies; *end* if there is none."""
        position = start
        while position + NEEDLE_HEADER_BYTES <= end:
            position = max(position, self._disk.next_data(self._file, position) // ALIGNMENT * ALIGNMENT)
            window = self.read(position, min(_WINDOW_BYTES, end - position))
            found = window.find(_MAGIC)
            while found >= 0:
                offset = position + found
                if offset % ALIGNMENT == 0:
                    needle = self.unpack(self.read(offset, NEEDLE_HEADER_BYTES_MAX), offset)
                    if needle is not None and offset + needle.length <= end:
                        return offset
                found = window.find(_MAGIC, found + 1)
            if len(window) < _WINDOW_BYTES:
                break
            # The magic is four bytes at a multiple of eight: it does not cross the edge of a window.
            position += _WINDOW_BYTES
        return end

    # -- writing ----------------------------------------------------------------------------------------------

    def write_needle(self, offset: int, needle: Needle, data: Sequence[Buffer], sums: Checksums | None) -> None:
        """Write *needle* at *offset*; *data* is its `data_size` bytes in pieces, *sums* their checksums.

        Raises:
            OSError: as the disk says; part of the needle may have been written.
        """
        header = pack_needle_header(needle, self._seed, offset)
        if sums is None:
            sums = checksums(b"".join(data)) if len(data) != 1 else checksums(data[0])
        self._disk.write(self._file, offset, [header, *data, self._end_of(needle, sums)])

    def around(self, offset: int, needle: Needle, data: Buffer) -> tuple[bytes, bytes]:
        """Return what *needle* has at *offset* before its *data*, at most a MiB, and behind it."""
        header = pack_needle_header(needle, self._seed, offset)
        return header, self._end_of(needle, checksums(data))

    def write(self, offset: int, needles: Sequence[Buffer]) -> None:
        """Write *needles*, packed, at *offset*. OSError as `write_needle`."""
        self._disk.write(self._file, offset, needles)

    def write_large_needle(self, offset: int, needle: Needle, pieces: Iterable[Buffer]) -> None:
        """Write *needle* at *offset* with data that comes in *pieces*, never all of it in memory.

        Raises:
            Damaged: the pieces do not add up to `data_size` bytes.
            OSError: as the disk says. In both cases part of the needle may have been written.
        """
        header = pack_needle_header(needle, self._seed, offset)
        self._disk.write(self._file, offset, [header])
        at = offset + len(header)
        left = needle.data_size
        builder = ChecksumBuilder()
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                break
            builder.add(piece)
            self._disk.write(self._file, at, [piece])
            at += len(piece)
        if left:
            raise Damaged(f"the data of this image is {abs(left)} bytes {'short' if left > 0 else 'too long'}")
        self._disk.write(self._file, at, [self._end_of(needle, builder.finish())])

    def write_again(self, start: int, end: int) -> None:
        """Write the bytes from *start* to *end* once more, as they are."""
        for offset in range(start, end, CHUNK_BYTES):
            self._disk.write(self._file, offset, [self.read(offset, min(CHUNK_BYTES, end - offset))])

    def write_zeros(self, start: int, end: int) -> None:
        """Fill the file from *start* to *end*, behind its last needle, with zeros."""
        whole, rest = divmod(end - start, len(_ZEROS))
        self._disk.write(self._file, start, [_ZEROS] * whole + [_ZEROS[:rest]])

    def truncate(self, size: int) -> None:
        """Cut away what lies behind *size*."""
        self._disk.truncate(self._file, size)

    @staticmethod
    def _end_of(needle: Needle, sums: Checksums) -> bytes:
        footer = pack_footer(sums, needle.data_size, needle.checksum)
        size = needle.data_start + needle.data_size + len(footer)
        return footer + bytes(-size % ALIGNMENT)
