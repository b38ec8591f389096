"""A store of several small volumes on a real disk, and where in its files each byte is that was promised to be there.

Owns the store's content. Must not know what looks for damage in it.
"""

import errno
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgfs.direct import DirectDisk
from imgfs.disk import Disk
from imgfs.format import NEEDLE_HEADER_BYTES, Kind, Needle, footer_bytes
from imgfs.reading import POINTED_AT
from imgfs.settings import KIB, MIB, Settings
from imgfs.store import ROOT, Store, make_store
from imgfs.volume import Gap, Volume

SETTINGS = Settings(volume_bytes_max=64 * KIB, headroom_bytes=0, checkpoint_needles=8)


def fill(path: Path) -> None:
    """Make a store of several volumes: images of many sizes, names, attributes, links, and what replaced others."""
    make_store(str(path), SETTINGS, uid=0, gid=0)
    chance = random.Random(7)
    with Store.open(str(path), settings=SETTINGS) as store:
        album = store.mkdir(ROOT, b"album", 0o755, 0, 0)
        for number in range(30):
            size = chance.choice([0, 1, 100, 5000, 20_000])
            put(store, album, b"%d.jpg" % number * (1 + number % 5), chance.randbytes(size))
            if number % 7 == 0:
                store.set_xattr(store.resolve(b"album/" + b"%d.jpg" % number * (1 + number % 5)), b"user.a", b"b" * 50)
            if number % 10 == 0:
                store.sync()
        put(store, ROOT, b"large", chance.randbytes(2 * MIB + 5))
        store.symlink(ROOT, b"link", b"album/1.jpg", 0, 0)
        store.link(store.resolve(b"large"), ROOT, b"large too")
        put(store, ROOT, b"twice", chance.randbytes(20_000))
        put(store, ROOT, b"twice", b"short")
        store.rename(album, b"0.jpg", ROOT, b"moved.jpg")
        store.unlink(album, b"5.jpg")
        put(store, ROOT, b"last", b"l" * 3000)


def put(store: Store, parent: int, name: bytes, data: bytes) -> int:
    return store.put(parent, name, data, len(data), mode=0o644, uid=1, gid=2, mtime_ns=3)


@pytest.fixture(scope="session")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a store that no test may change."""
    path = tmp_path_factory.mktemp("parts") / "store"
    fill(path)
    return path


@pytest.fixture
def small_store(whole_store: Path, tmp_path: Path) -> Path:
    """The path of a copy of that store."""
    return Path(shutil.copytree(whole_store, tmp_path / "store"))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)


@dataclass(frozen=True)
class Part:
    """Some bytes of a store, and who needs them."""

    file: str
    start: int
    end: int
    kind: str
    inode: int  # of the image that needs them, 0: none does
    needle: int = 0  # where the needle lies that holds them, or that they are about


def parts_of(path: Path) -> list[Part]:
    """Return the parts of all files of the store at *path* whose bytes were promised to be there."""
    found = [Part("imgfs.json", 0, (path / "imgfs.json").stat().st_size, "superblock", 0)]
    with Store.open(str(path), writable=False) as store:
        names = sorted(name for name in os.listdir(path / "volumes") if name.endswith(".vol"))
        for entry, name in enumerate(names):
            found += _parts_of_volume(store, path, f"volumes/{name}", entry, last=name == names[-1])
    return found


def _parts_of_volume(store: Store, path: Path, name: str, entry: int, *, last: bool) -> Iterator[Part]:
    for start in (0, 4096):
        yield Part(name, start, start + 4096, "volume header", 0)
    volume = Volume.open(Disk(), str(path / name))
    needles = list(volume.scan(8192, volume.size()))
    end = max(item[1].durable for item in needles if not isinstance(item, Gap)) if last else volume.size()
    names_at = 16
    yield Part(name.replace(".vol", ".names"), 0, 16, "header of names", 0)
    for number, item in enumerate(needles):
        assert not isinstance(item, Gap)
        offset, needle = item
        named = needle.name and needle.kind not in (Kind.DELETE, Kind.ATTRIBUTES)
        if offset < end:
            yield from _parts_of_needle(store, name, entry, offset, needle)
            inode = _needed_by(store, volume.header.volume_id, offset, needle)
            yield Part(name.replace(".vol", ".idx"), 39 * number, 39 * number + 39, "record", inode, offset)
            if named:
                record = store._table.record((needle.inode & 0xFFFF_FFFF) - 1)
                current = record.live and (record.name_volume, record.name_offset) == (entry, names_at)
                inode = needle.inode if current else 0
                stop = names_at + 1 + len(needle.name)
                yield Part(name.replace(".vol", ".names"), names_at, stop, "name in the index", inode, offset)
        names_at += 1 + len(needle.name) if named else 0
    volume.close()


def _needed_by(store: Store, volume_id: int, offset: int, needle: Needle) -> int:
    """Return the inode that has its bytes, or its attributes, there; 0 if it says only what is in the table too."""
    needed = needle.kind in POINTED_AT and store.needs(needle.inode, volume_id, offset)
    return needle.inode if needed else 0


def _parts_of_needle(store: Store, name: str, entry: int, offset: int, needle: Needle) -> Iterator[Part]:
    volume_id = store._table.volume(entry).volume_id
    inode = _needed_by(store, volume_id, offset, needle)
    data, end = offset + needle.data_start, offset + needle.length
    footer = data + needle.data_size
    padding = footer + footer_bytes(needle.data_size)
    for kind, start, stop in (
        ("header", offset, offset + NEEDLE_HEADER_BYTES),
        ("name", offset + needle.header_bytes, data),
        ("tagged fields", offset + NEEDLE_HEADER_BYTES, offset + needle.header_bytes),
        ("data", data, footer),
        ("footer", footer, padding),
        ("padding", padding, end),
    ):
        if stop > start:
            yield Part(name, start, stop, f"{kind} of {Kind(needle.kind).name}", inode, offset)


class FailingDisk(DirectDisk):
    """A disk with blocks that cannot be read."""

    def __init__(self, name: str, bad: set[int]) -> None:
        super().__init__()
        self._name, self._bad = name, bad

    def _pread(self, file: int, start: int, size: int) -> bytes:
        inside = {at for at in self._bad if start <= at < start + size}
        if inside and self._paths[file].endswith(self._name):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super()._pread(file, start, size)
