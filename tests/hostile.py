"""A store of few images whose needles lie, for tests: fields changed in their place, with their checksums fixed.

Owns where the files of that store are. Must not know what is changed, nor what that may cost.

*Concurrency:* none; one thread at a time.
"""

from collections.abc import Callable
from dataclasses import replace

from powercut import SimulatedDisk
from stores import PATH, disk_of, new_store, put

from imgfs.format import NEEDLES_START, Needle, checksums, pack_footer, pack_needle_header, unpack_volume_header
from imgfs.store import ROOT
from imgfs.volume import Volume

VOLUME = f"{PATH}/volumes/00000001.vol"
INDEX = VOLUME.replace(".vol", ".idx")
NAMES = VOLUME.replace(".vol", ".names")
SUPERBLOCK = f"{PATH}/imgfs.json"
BIG = 1 << 63  # no number that a store counts up gets there


def few_images() -> SimulatedDisk:
    """Return the disk of a store that was closed, with `a`, `b` with an attribute, `c` and a directory `d`."""
    store = new_store()
    put(store, ROOT, b"a", b"first")
    store.set_xattr(put(store, ROOT, b"b", b"second"), b"user.x", b"value")
    put(store, ROOT, b"c", b"third")
    put(store, store.mkdir(ROOT, b"d", 0o755, 0, 0), b"e", b"fourth")
    store.close()
    return disk_of(store)


def needles(disk: SimulatedDisk) -> list[tuple[int, Needle]]:
    volume = Volume.open(disk, VOLUME)
    found = [item for item in volume.scan(NEEDLES_START, volume.size()) if isinstance(item, tuple)]
    volume.close()
    return found


def rewrite(
    disk: SimulatedDisk, chosen: Callable[[Needle], bool], *, data: bytes | None = None, **changes: object
) -> int:
    """Change the needle that is *chosen* in its place, and fix its checksums; return where it lies."""
    offset, needle = next((offset, needle) for offset, needle in needles(disk) if chosen(needle))
    content_ = bytearray(disk.content(VOLUME))
    start = offset + needle.data_start
    body = bytes(content_[start : start + needle.data_size]) if data is None else data
    changed = replace(needle, data_size=len(body), **changes)  # type: ignore[arg-type]
    seed = unpack_volume_header(bytes(content_[:NEEDLES_START])).seed()
    packed = pack_needle_header(changed, seed, offset) + body
    packed += pack_footer(checksums(body), len(body), changed.checksum)
    content_[offset : offset + len(packed)] = packed
    disk.set_content(VOLUME, bytes(content_))
    return offset


def without_index(disk: SimulatedDisk) -> SimulatedDisk:
    for path in (INDEX, NAMES):
        disk.remove(path)
    return disk


def named(name: bytes) -> Callable[[Needle], bool]:
    return lambda needle: needle.name == name
