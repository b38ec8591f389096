"""Tiny images as bytes of a volume and its index, many at a time: NumPy lays them out, one pass adds the checksums.

Owns their layout, which is that of the format for an image of `DATA_BYTES` with a name of `NAME_BYTES`. Must not
know files.
"""

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash
from crc32c import crc32c

from imgfs.format import (
    ALIGNMENT,
    CHECKSUM,
    FOOTER,
    NEEDLE_HEADER,
    NEEDLE_HEADER_BYTES,
    NEEDLE_MAGIC,
    Kind,
)
from imgfs.load import INDEX_RECORDS

Int64s = npt.NDArray[np.int64]

NAME_BYTES = 16  # img_00000001.jpg
DATA_BYTES = 32
IMAGE_MODE = 0o644
IMAGE_OWNER = 1
TIME_NS = 1_700_000_000 * 10**9
_ALL_ONES = 0xFFFF_FFFF_FFFF_FFFF

# As format.NEEDLE_HEADER, and what follows it in a needle of such an image.
_NEEDLE = np.dtype(
    [
        ("magic", "<u4"),
        ("header_bytes", "<u2"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("sequence", "<u8"),
        ("inode", "<u8"),
        ("parent", "<u8"),
        ("mtime", "<i8"),
        ("ctime", "<i8"),
        ("commit", "<i8"),
        ("durable", "<u8"),
        ("data_size", "<u4"),
        ("uid", "<u4"),
        ("gid", "<u4"),
        ("mode", "<u2"),
        ("owner", "<u2"),
        ("name_length", "<u2"),
        ("kept", "V6"),
        ("checksum", "<u8"),
        ("name", "V16"),
        ("data", "<u8", (DATA_BYTES // 8,)),
        ("data_crc", "<u4"),
        ("footer_crc", "<u4"),
    ]
)
NEEDLE_BYTES = _NEEDLE.itemsize
assert NEEDLE_HEADER.size + CHECKSUM.size + NAME_BYTES + DATA_BYTES + FOOTER.size == NEEDLE_BYTES
assert NEEDLE_BYTES % ALIGNMENT == 0


def image_name(number: int) -> bytes:
    """Return the name of image *number*, counted from 0."""
    return b"img_%08d.jpg" % number


def image_data(number: int) -> bytes:
    """Return the bytes of image *number*."""
    return number.to_bytes(8, "little") * (DATA_BYTES // 8)


@dataclass(frozen=True)
class Place:
    """Where the next needle comes to lie, and what a volume mixes into checksums."""

    offset: int
    names_offset: int
    sequence: int
    durable: int
    seed: int
    name_seed: int


def pack_images(numbers: Int64s, inodes: Int64s, parents: Int64s, place: Place) -> tuple[bytes, bytes, bytes]:
    """Return needles, index records and names of the images with these numbers, inodes and parents."""
    count = len(numbers)
    offsets = place.offset + NEEDLE_BYTES * np.arange(count)
    names = _names(numbers)
    needles = np.zeros(count, _NEEDLE)
    needles["magic"] = NEEDLE_MAGIC
    needles["header_bytes"] = NEEDLE_HEADER_BYTES
    needles["kind"] = Kind.FILE
    needles["sequence"] = place.sequence + np.arange(count)
    needles["inode"], needles["parent"] = inodes, parents
    needles["mtime"] = needles["ctime"] = needles["commit"] = TIME_NS
    needles["durable"] = place.durable
    needles["data_size"] = DATA_BYTES
    needles["uid"], needles["gid"] = os.geteuid(), os.getegid()
    needles["mode"], needles["owner"] = IMAGE_MODE, IMAGE_OWNER
    needles["name_length"] = NAME_BYTES
    needles["name"] = names.view(f"V{NAME_BYTES}")[:, 0]
    needles["data"] = numbers[:, None]
    _add_checksums(needles, names, offsets, place.seed)

    records = np.zeros(count, INDEX_RECORDS)
    records["kind"] = Kind.FILE
    records["slot"], records["parent"] = inodes, parents
    records["name_offset"] = place.names_offset + (1 + NAME_BYTES) * np.arange(count)
    records["offset8"] = offsets // ALIGNMENT
    records["size"] = DATA_BYTES
    records["mtime"] = TIME_NS
    records["ctime"] = TIME_NS // 10**9
    records["owner"] = IMAGE_OWNER
    records["hash_generation"] = _hashes(names, place.name_seed)
    lengths = np.full((count, 1), NAME_BYTES, np.uint8)
    return needles.tobytes(), records.tobytes(), np.hstack([lengths, names]).tobytes()


def _add_checksums(needles: npt.NDArray[np.void], names: npt.NDArray[np.uint8], offsets: Int64s, seed: int) -> None:
    """Fill in the three checksums of each needle."""
    size = NEEDLE_HEADER.size + NAME_BYTES
    raw = needles.view(np.uint8).reshape(len(needles), NEEDLE_BYTES)
    headed = memoryview(np.hstack([raw[:, : NEEDLE_HEADER.size], names]).tobytes())
    data = memoryview(needles["data"].tobytes())
    digest = xxhash.xxh3_64_intdigest
    headers = [
        digest(headed[at : at + size], seed + offset & _ALL_ONES)
        for at, offset in zip(range(0, len(headed), size), offsets.tolist(), strict=True)
    ]
    needles["checksum"] = headers
    crcs = np.array([crc32c(data[at : at + DATA_BYTES]) for at in range(0, len(data), DATA_BYTES)], "<u4")
    needles["data_crc"] = crcs
    body = memoryview(crcs.tobytes())
    needles["footer_crc"] = [
        crc32c(body[4 * number : 4 * number + 4], checksum & 0xFFFF_FFFF) for number, checksum in enumerate(headers)
    ]


def _hashes(names: npt.NDArray[np.uint8], seed: int) -> list[int]:
    """Return `format.name_hash` of each name."""
    digest, named = xxhash.xxh3_64_intdigest, memoryview(names.tobytes())
    return [digest(named[at : at + NAME_BYTES], seed) & 0xFF_FFFF for at in range(0, len(named), NAME_BYTES)]


def _names(numbers: Int64s) -> npt.NDArray[np.uint8]:
    """Return `image_name` of each number as a row of bytes."""
    names = np.empty((len(numbers), NAME_BYTES), np.uint8)
    names[:] = np.frombuffer(image_name(0), np.uint8)
    for place in range(8):
        names[:, 4 + place] = numbers // 10 ** (7 - place) % 10 + ord("0")
    return names
