"""Reads a damaged image as far as that is possible, and says which bytes of it are not known to be right.

Owns how bytes are believed: by any checksum that still speaks for them. Must not write to a store, which is opened for
reading, also beside a mount.

*Concurrency:* none; what is read of a volume does not change.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from imgfs.direct import UNREADABLE, DirectDisk
from imgfs.errors import Damaged, NotFound, Stale, disk_error
from imgfs.format import (
    CHUNK_BYTES,
    NEEDLE_HEADER,
    NEEDLE_HEADER_BYTES,
    NEEDLE_HEADER_BYTES_MAX,
    ChecksumBuilder,
    Checksums,
    checksums,
    footer_bytes,
    pack_footer,
    unpack_footer,
)
from imgfs.lost_image import find_inode
from imgfs.store import Spot, Store
from imgfs.volume import Volume
from imgfs.volumes import VOLUMES, volume_path

# Fields of a needle's header.
_HEADER_BYTES, _NAME_BYTES = 1, -1
_CRC = struct.Struct("<I")


class Piece(NamedTuple):
    """Some bytes of an image, in their order: a MiB, or the rest; not *good*: no checksum speaks for them."""

    offset: int
    data: bytes
    good: bool


def salvage(store: Store, inode: int, direct: DirectDisk | None = None) -> Iterator[Piece]:
    """Yield the bytes of the image *inode* as its volume has them; what the disk cannot read is zeros.

    Raises:
        Stale, IsADirectory, InvalidArgument, NotFound: as `Store.spot`.
        Damaged: its volume, or the index of the store, does not tell where it is.
        DiskFailure: as the disk says, but for bytes that it cannot read.
    """
    direct = direct or DirectDisk()
    spot, name = _latest(store, inode)
    path = volume_path(f"{store.path}/{VOLUMES}", spot.volume)
    try:
        volume = Volume.open(direct, path)
        try:
            for piece in _Image(volume, inode, spot, name).pieces():
                yield piece if piece.good else piece._replace(data=_readable(piece, path, direct))
        finally:
            volume.close()
    except OSError as error:
        raise disk_error(error, path) from error


def _latest(store: Store, inode: int) -> tuple[Spot, bytes]:
    """Return where the last version of *inode* lies, also one that a daemon knows and *store* does not; and a name."""
    lost = find_inode(store, inode)
    try:
        spot, name = store.spot(inode), store.name(inode)
    except (Stale, NotFound):
        if lost is None:
            raise
        return lost.spot, lost.name
    if lost is not None and lost.spot.volume == spot.volume and lost.spot.offset > spot.offset:
        return lost.spot, lost.name
    return spot, name


def _readable(piece: Piece, path: str, direct: DirectDisk) -> bytes:
    # Where exactly the data lies is of no use here: what cannot be read is one pattern, which nothing else has.
    if not any(each == path for each, _ in direct.unreadable):
        return piece.data
    return piece.data.replace(UNREADABLE, bytes(len(UNREADABLE)))


class _Image:
    """One image that may be damaged."""

    def __init__(self, volume: Volume, inode: int, spot: Spot, name: bytes) -> None:
        self._volume = volume
        self._spot = spot
        self._size = spot.size
        header = volume.read(spot.offset, NEEDLE_HEADER_BYTES_MAX)
        needle = volume.unpack(header, spot.offset)
        if needle is not None and needle.inode != inode:
            raise Damaged(f"volume {spot.volume}, offset {spot.offset}: another image is there; run imgfs check")
        if needle is not None:
            self._checksum, data_start = needle.checksum, needle.data_start
        else:
            header = header.ljust(NEEDLE_HEADER_BYTES, b"\0")
            (self._checksum,) = struct.unpack_from("<Q", header, NEEDLE_HEADER.size)
            data_start = self._find(header, name)
        self._start = spot.offset + data_start

    def _find(self, header: bytes, name: bytes) -> int:
        """Return where the data begins, from the start of the needle, whose *header* is damaged."""
        fields = NEEDLE_HEADER.unpack_from(header)
        # Most likely what the damaged header says; else the name it has now is the one it was put with; else any.
        likely: list[int] = [fields[_HEADER_BYTES] + fields[_NAME_BYTES], NEEDLE_HEADER_BYTES + len(name)]
        possible = range(NEEDLE_HEADER_BYTES, NEEDLE_HEADER_BYTES_MAX + 1)
        candidates = [each for each in likely if each in possible]
        for candidate in [*candidates, *possible]:
            footer = self._footer(candidate)
            for number in {0, len(footer) // 2, len(footer) - 1}:
                if footer and checksums(self._chunk(candidate, number)).data == footer[number]:
                    return int(candidate)
        return (candidates or possible)[0]

    def _raw_footer(self, data_start: int) -> bytes:
        size = footer_bytes(self._size)
        return self._volume.read(self._spot.offset + data_start + self._size, size).ljust(size, b"\0")

    def _footer(self, data_start: int) -> tuple[int, ...]:
        """Return the checksums of all chunks as they stand there, whether or not they are whole."""
        values = [value for (value,) in _CRC.iter_unpack(self._raw_footer(data_start))]
        return tuple(values[:-2] if self._size > CHUNK_BYTES else values[:-1])

    def _chunk(self, data_start: int, number: int) -> bytes:
        at = number * CHUNK_BYTES
        size = min(CHUNK_BYTES, self._size - at)
        return self._volume.read(self._spot.offset + data_start + at, size).ljust(size, b"\0")

    def pieces(self) -> Iterator[Piece]:
        """Yield all of it."""
        data_start = self._start - self._spot.offset
        footer = self._footer(data_start)
        whole = not footer or self._vouched(data_start)
        for number, expected in enumerate(footer):
            data = self._chunk(data_start, number)
            yield Piece(number * CHUNK_BYTES, data, whole or checksums(data).data == expected)

    def _vouched(self, data_start: int) -> bool:
        """Return whether all data is whole, though the footer is damaged: it is what one of its parts was made of."""
        raw = self._raw_footer(data_start)
        if unpack_footer(raw, self._size, self._checksum) is not None:
            return False  # each chunk has a checksum that can be believed
        builder = ChecksumBuilder()
        for number in range(len(self._footer(data_start))):
            builder.add(self._chunk(data_start, number))
        sums: Checksums = builder.finish()
        made = pack_footer(sums, self._size, self._checksum)
        return made[-4:] == raw[-4:] or made[-8:-4] == raw[-8:-4]
