"""Finds images that an opened store does not know: their needle is not whole, and no checkpoint vouches for it yet.

Owns nothing. Must not be asked for more than that: the index may say anything of what was deleted since. A daemon that
has the store open knows such an image, and answers EIO.

*Concurrency:* none; what is read of the index does not change, but more may come.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.disk import Disk
from imgfs.errors import ImgfsError
from imgfs.format import ALIGNMENT, INDEX_RECORD_BYTES, Kind, hash_seed, inode_of, name_hash, slot_of
from imgfs.index import Names, index_paths
from imgfs.load import INDEX_RECORDS
from imgfs.store import Spot, Store
from imgfs.volumes import SUFFIX, VOLUMES, volume_path

_IMAGES = (Kind.FILE, Kind.SYMLINK)


class LostImage(NamedTuple):
    """What the index says of an image."""

    inode: int
    spot: Spot
    name: bytes
    parent_slot: int


def find_inode(store: Store, inode: int, disk: Disk | None = None) -> LostImage | None:
    """Return what the index says of *inode*, which *store* does not know or knows an older version of."""
    return next(_matching(store, disk or Disk(), slot=slot_of(inode), generation=inode >> 32), None)


def find_path(store: Store, path: bytes, disk: Disk | None = None) -> LostImage | None:
    """Return what the index says of the image at *path*, whose directory *store* knows."""
    directory, _, name = path.rstrip(b"/").rpartition(b"/")
    with suppress(ImgfsError):
        parent = slot_of(store.resolve(directory))
        hashed = name_hash(name, hash_seed(store.superblock.store_id))
        for found in _matching(store, disk or Disk(), parent=parent, hashed=hashed):
            if found.name == name:
                return found
    return None


def path_of(store: Store, lost: LostImage) -> bytes:
    """Return the path of *lost* from the top of the store. ImgfsError where its directory has none."""
    directory = store.path_of(store.inode_in(lost.parent_slot))
    return directory + b"/" + lost.name if directory else lost.name


def _matching(store: Store, disk: Disk, **wanted: int) -> Iterator[LostImage]:
    """Yield the images whose record has the *wanted* fields, the latest first, as long as it says of no end of them."""
    directory = f"{store.path}/{VOLUMES}"
    stems = [name.removesuffix(SUFFIX) for name in disk.names(directory) if name.endswith(SUFFIX)]
    for volume_id in sorted((int(stem) for stem in stems if stem.isdigit()), reverse=True):
        paths = index_paths(volume_path(directory, volume_id))
        with suppress(FileNotFoundError):
            index = _records(disk, paths.records)
            names = Names(disk, disk.open(paths.names))
            try:
                yield from _in_volume(index, names, volume_id, wanted)
            finally:
                names.close()


def _records(disk: Disk, path: str) -> npt.NDArray[np.void]:
    file = disk.open(path)
    try:
        size = disk.size(file) // INDEX_RECORD_BYTES * INDEX_RECORD_BYTES
        data = disk.read(file, 0, size)
    finally:
        disk.close(file)
    return np.frombuffer(data[: len(data) // INDEX_RECORD_BYTES * INDEX_RECORD_BYTES], INDEX_RECORDS)


def _in_volume(
    index: npt.NDArray[np.void], names: Names, volume_id: int, wanted: dict[str, int]
) -> Iterator[LostImage]:
    columns = {
        "slot": index["slot"].astype(np.int64) - 1,
        "generation": index["hash_generation"] >> 24,
        "parent": index["parent"].astype(np.int64) - 1,
        "hashed": index["hash_generation"] & 0xFF_FFFF,
    }
    chosen = np.isin(index["kind"], _IMAGES)
    for field, value in wanted.items():
        chosen &= columns[field] == value
    for at in reversed(np.flatnonzero(chosen).tolist()):
        slot, generation = int(columns["slot"][at]), int(columns["generation"][at])
        after = (columns["slot"][at:] == slot) & (columns["generation"][at:] == generation)
        if (index["kind"][at:][after] == Kind.DELETE).any():
            continue
        spot = Spot(volume_id, int(index["offset8"][at]) * ALIGNMENT, int(index["size"][at]))
        with suppress(ImgfsError):
            name = names.get(int(index["name_offset"][at]))
            yield LostImage(inode_of(slot, generation), spot, name, int(columns["parent"][at]))
