"""Stores of millions of tiny images, written as the log would have written them, but many needles at a time.

Volumes, `.idx` and `.names` are those of the format, with every checksum, seal and checkpoint: `imgfs check` accepts
them, and they are opened by the code that opens any store. Only the speed is other (`needles`), and the durable marks,
which step once for each batch.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from crc32c import crc32c

from bench.measure import say
from bench.needles import IMAGE_MODE, IMAGE_OWNER, NEEDLE_BYTES, TIME_NS, Int64s, Place, image_name, pack_images
from bench.site import Site
from imgfs.disk import Disk
from imgfs.format import (
    INDEX_RECORD_BYTES,
    NEEDLE_HEADER_BYTES,
    NEEDLES_START,
    IndexState,
    Kind,
    Needle,
    VolumeHeader,
    aligned,
    hash_seed,
    name_hash,
    pack_needle_header,
    pack_volume_header,
)
from imgfs.index import checkpoint, empty_state, index_paths, names_a_name, names_header, pack_name, pack_record
from imgfs.opening import ROOT, STAGING, SUPERBLOCK
from imgfs.settings import MIB
from imgfs.superblock import Superblock, new_superblock, pack_superblock
from imgfs.volumes import VOLUMES, volume_path

# A volume of so many bytes has as many of these needles as one of 1 GiB has of images of 20 KB: 55,000.
VOLUME_BYTES = 8 * MIB
_BATCH = 1 << 17
_SAY_EVERY = 1_000_000
_DIRECTORY_OWNER, _DIRECTORY_MODE = 0, 0o755


def make_large_store(path: Path, images: int, directories: int, volume_bytes_max: int = VOLUME_BYTES) -> None:
    """Write a store of *images* tiny images, spread evenly over so many *directories* below the root.

    One directory means the root itself.
    """
    (path / VOLUMES).mkdir(parents=True)
    (path / STAGING).mkdir()
    superblock = new_superblock(volume_bytes_max)
    # Inodes: the root, the directories, the images.
    parents = list(range(ROOT + 1, ROOT + 1 + directories)) if directories > 1 else [ROOT]
    first_inode = parents[-1] + 1
    volume = _Volume(path / VOLUMES, superblock, 1, 1)
    volume.append(_directory(ROOT, b""))
    for inode in parents if directories > 1 else []:
        volume.append(_directory(inode, b"d%06d" % inode))
    done = 0
    while done < images:
        count = min(_BATCH, images - done, volume.room())
        if not count:
            volume.finish(seal=True)
            volume = _Volume(path / VOLUMES, superblock, volume.volume_id + 1, volume.sequence)
            continue
        volume.append_images(first_inode, np.arange(done, done + count), parents)
        done += count
        if done // _SAY_EVERY > (done - count) // _SAY_EVERY:
            say(f"{done:,} of {images:,} needles written")
    volume.finish(seal=False)
    (path / SUPERBLOCK).write_bytes(pack_superblock(superblock))


@contextlib.contextmanager
def large_store(site: Site, images: int, directories: int) -> Iterator[Path]:
    """Make such a store at *site* and take it away again."""
    path = site.fresh("large")
    try:
        make_large_store(path, images, directories)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def large_store_path(number: int, directories: int) -> str:
    """Return where image *number* of such a store is, relative to the root."""
    name = image_name(number).decode()
    return f"d{number % directories + ROOT + 1:06}/{name}" if directories > 1 else name


def _directory(inode: int, name: bytes) -> Needle:
    return Needle(Kind.DIRECTORY, inode, ROOT, name, mtime_ns=TIME_NS, owner=_DIRECTORY_OWNER, mode=_DIRECTORY_MODE)


class _Volume:
    """The writing end of one volume and of its index."""

    def __init__(self, directory: Path, superblock: Superblock, volume_id: int, first_sequence: int) -> None:
        self.volume_id = volume_id
        self.sequence = first_sequence
        salt = os.urandom(16)
        limit = superblock.volume_bytes_max
        header = VolumeHeader(superblock.store_id, salt, volume_id, first_sequence, time.time_ns(), limit)
        self._limit = limit
        self._seed = header.seed()
        self._name_seed = hash_seed(superblock.store_id)
        self._state: IndexState = empty_state(volume_id)
        self._durable = NEEDLES_START
        path = volume_path(str(directory), volume_id)
        paths = index_paths(path)
        self._disk = disk = Disk()
        self._volume, self._records, self._names = (
            disk.open(name, writable=True, create=True, exclusive=True) for name in (path, paths.records, paths.names)
        )
        disk.write(self._volume, 0, [pack_volume_header(header)])
        disk.write(self._names, 0, [names_header(volume_id)])
        for owner, mode in ((_DIRECTORY_OWNER, _DIRECTORY_MODE), (IMAGE_OWNER, IMAGE_MODE)):
            self.append(Needle(Kind.OWNER, 0, owner=owner, mode=mode, uid=os.geteuid(), gid=os.getegid()))

    def room(self) -> int:
        """Return how many images fit before the seal."""
        return max(0, self._limit - self._state.end - NEEDLE_HEADER_BYTES * 2) // NEEDLE_BYTES

    def append(self, needle: Needle) -> None:
        """Append one needle that has no data."""
        needle.sequence, needle.durable = self.sequence, self._durable
        needle.commit_ns = needle.ctime_ns = TIME_NS
        if needle.kind != Kind.OWNER:
            needle.uid, needle.gid = os.geteuid(), os.getegid()
        state = self._state
        header = pack_needle_header(needle, self._seed, state.end)
        name_data = pack_name(needle.name) if names_a_name(needle.kind) else b""
        value = name_hash(needle.name, self._name_seed) if name_data else 0
        record = pack_record(needle, state.end, state.names_bytes if name_data else 0, value)
        self._write(1, header + bytes(aligned(len(header)) - len(header)), record, name_data)

    def append_images(self, first_inode: int, numbers: Int64s, parents: Sequence[int]) -> None:
        """Append the images with these numbers."""
        state = self._state
        place = Place(state.end, state.names_bytes, self.sequence, self._durable, self._seed, self._name_seed)
        packed = pack_images(numbers, first_inode + numbers, np.asarray(parents)[numbers % len(parents)], place)
        self._write(len(numbers), *packed)
        self._durable = self._state.end

    def _write(self, count: int, needles: bytes, records: bytes, names: bytes) -> None:
        state = self._state
        self._disk.write(self._volume, state.end, [needles])
        self._disk.write(self._records, state.records * INDEX_RECORD_BYTES, [records])
        self._disk.write(self._names, state.names_bytes, [names])
        self._state = IndexState(
            state.end + len(needles),
            state.records + count,
            crc32c(records, state.records_crc),
            state.names_bytes + len(names),
            crc32c(names, state.names_crc),
        )
        self.sequence += count

    def finish(self, *, seal: bool) -> None:
        """End the volume with a checkpoint, as a clean stop does; with *seal*, as for a next one to begin."""
        self._durable = self._state.end
        self.append(checkpoint(self._state, seal=seal))
        for file in (self._volume, self._records, self._names):
            self._disk.sync(file)
            self._disk.close(file)
