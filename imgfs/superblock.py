"""The superblock of a store, `imgfs.json`: what a store is, in JSON that people can read.

Owns its keys and its checksum. Must not know files.
"""

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from crc32c import crc32c

from imgfs.errors import Damaged, NewerFormat
from imgfs.format import FORMAT_VERSION, KNOWN_INCOMPATIBLE, NEEDLES_START, READABLE_BY, VOLUME_BYTES_LIMIT


@dataclass(frozen=True)
class Superblock:
    """What `imgfs.json` holds."""

    store_id: bytes
    volume_bytes_max: int


def new_superblock(volume_bytes_max: int) -> Superblock:
    """Return the superblock of a store that did not exist before."""
    return Superblock(uuid.UUID(bytes=os.urandom(16), version=4).bytes, volume_bytes_max)


def pack_superblock(superblock: Superblock) -> bytes:
    """Return *superblock* as JSON, readable by people, with a checksum over the rest."""
    fields: dict[str, object] = {
        "format": FORMAT_VERSION,
        "incompatible": 0,
        "compatible": 0,
        "readable_by": READABLE_BY,
        "store": str(uuid.UUID(bytes=superblock.store_id)),
        "volume_bytes_max": superblock.volume_bytes_max,
    }
    return (json.dumps(fields | {"checksum": superblock_checksum(fields)}, indent=2) + "\n").encode()


def unpack_superblock(data: bytes) -> Superblock:
    """Return the superblock in *data*.

    Raises:
        NewerFormat: the store needs a newer release; the text says which.
        Damaged: these are not the bytes that were written.
    """
    try:
        fields = json.loads(data)
        checksum = fields.pop("checksum")
        if checksum != superblock_checksum(fields):
            raise ValueError("checksum")
        version, incompatible, release = fields["format"], fields["incompatible"], fields["readable_by"]
        if version > FORMAT_VERSION or incompatible & ~KNOWN_INCOMPATIBLE:
            raise NewerFormat(f"this store has format {version}; install imgfs {release} or newer to read it")
        volume_bytes_max = fields["volume_bytes_max"]
        if type(volume_bytes_max) is not int or not NEEDLES_START < volume_bytes_max <= VOLUME_BYTES_LIMIT:
            raise ValueError("volume_bytes_max")
        return Superblock(uuid.UUID(fields["store"]).bytes, volume_bytes_max)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("imgfs.json is damaged; it can be made again from the volumes") from None


def superblock_checksum(fields: Mapping[str, object]) -> str:
    """Return the checksum that belongs to *fields*, which are all the others."""
    return f"{crc32c(json.dumps(fields, sort_keys=True).encode()):08x}"
