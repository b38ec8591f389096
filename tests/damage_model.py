"""Planted damage: where each needle of a store lies, and what must be left when one of them cannot be read.

Owns the simplest replay there can be, and holds recovery against it. Must not know how recovery works.

*Concurrency:* none; one thread at a time.
"""

import os
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import pytest
from crash_model import Clock, Node, Snapshot, Workload, assert_same, needles, open_store, small_images, snapshot
from powercut import SimulatedDisk

from imgfs.errors import Damaged
from imgfs.format import PUT_KINDS, Kind, Needle, Tag, footer_bytes, slot_of
from imgfs.recover import Damage
from imgfs.settings import Settings
from imgfs.store import ROOT, Store

SOAK = bool(os.environ.get("IMGFS_SOAK"))
LOST = b"lost+found-"


class At(NamedTuple):
    """A needle, and where it lies."""

    path: str
    offset: int
    needle: Needle

    @property
    def volume_id(self) -> int:
        return int(self.path[-12:-4])

    @property
    def end(self) -> int:
        return self.offset + self.needle.length

    def parts(self) -> dict[str, range]:
        """Return the ranges of bytes that make up the needle, all but its padding."""
        data = self.offset + self.needle.data_start
        footer = data + self.needle.data_size
        return {
            "header": range(self.offset, self.offset + self.needle.header_bytes),
            "name": range(self.offset + self.needle.header_bytes, data),
            "data": range(data, footer),
            "footer": range(footer, footer + footer_bytes(self.needle.data_size)),
        }


@dataclass
class Sample:
    disk: SimulatedDisk
    wanted: Snapshot
    needles: list[At]
    durable: int  # the highest mark in the last volume

    def below_mark(self) -> list[At]:
        last = self.needles[-1].path
        return [at for at in self.needles if at.path != last or at.offset < self.durable]


def sample_of(work: Workload) -> Sample:
    disk = work.disk.after_kill()
    found = [At(path, offset, needle) for path, offset, needle in needles(disk) if isinstance(needle, Needle)]
    durable = max(at.needle.durable for at in found if at.path == found[-1].path)
    return Sample(disk, work.history[-1], found, durable)


def closed_store(clock: Clock) -> Sample:
    """Return a store of several volumes that was closed."""
    work = Workload(clock)
    small_images(work)
    work.close()
    return sample_of(work)


def killed_store(clock: Clock) -> Sample:
    """Return a store of one volume, synced but never checkpointed: all of it is replayed needle by needle."""
    work = Workload(clock, Settings(volume_bytes_max=1 << 20, headroom_bytes=0, rest_slots=2))
    small_images(work)
    work.sync()
    work.create(b"/mark", b"its header says that all before it is durable")
    return sample_of(work)


def without_index(disk: SimulatedDisk) -> SimulatedDisk:
    for path in disk.paths():
        if path.endswith((".idx", ".names")):
            disk.remove(path)
    return disk


# -- what is left when one needle cannot be read -----------------------------------------------------------------


class Entry(NamedTuple):
    """An inode as the needles tell it."""

    parent: int
    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    at: At | None  # what holds its data
    named: int  # number of the needle that named it


def replay(found: list[At], lost: At) -> dict[int, Entry]:
    """Return all inodes as the needles but *lost* tell them; the simplest replay there can be."""
    inodes: dict[int, Entry] = {}
    for number, at in enumerate(found):
        needle = at.needle
        if at is lost:
            continue
        if needle.kind in PUT_KINDS:
            for other in [inode for inode in inodes if slot_of(inode) == slot_of(needle.inode) != slot_of(ROOT)]:
                del inodes[other]
            inodes[needle.inode] = Entry(
                needle.parent, needle.name, needle.kind, needle.mode, needle.uid, needle.gid, at, number
            )
        elif needle.kind == Kind.DELETE:
            inodes.pop(needle.inode, None)
        elif needle.kind == Kind.RENAME:
            inodes.pop(needle.extra_u64(Tag.REPLACED), None)
            if needle.inode in inodes:
                moved = inodes[needle.inode]._replace(parent=needle.parent, name=needle.name, named=number)
                inodes[needle.inode] = moved
        elif needle.kind == Kind.ATTRIBUTES and needle.inode in inodes:
            changed = inodes[needle.inode]._replace(mode=needle.mode, uid=needle.uid, gid=needle.gid)
            inodes[needle.inode] = changed
    return inodes


def check_survivors(sample: Sample, lost: At, seen: Snapshot, where: str) -> None:
    """Check that all but the needle *lost* counts in what is *seen*, by inode, and that nothing else is there."""
    inodes = replay(sample.needles, lost)
    paths = {node.inode: path for path, node in seen.items()}
    latest: dict[tuple[int, bytes], int] = {}
    for inode, entry in sorted(inodes.items(), key=lambda item: item[1].named):
        latest[entry.parent, entry.name] = inode
    for inode, entry in inodes.items():
        assert inode in paths, f"{where}: inode {inode:#x}, {entry.name!r}, is lost too"
        node, path = seen[paths[inode]], paths[inode]
        assert (node.kind, node.mode, node.uid, node.gid) == (entry.kind, entry.mode, entry.uid, entry.gid), where
        if entry.kind != Kind.DIRECTORY and entry.at is not None:
            assert node.data == data_of(sample.disk, entry.at), f"{where}: wrong bytes in {path!r}"
        directory, _, name = path.rpartition(b"/")
        if inode == ROOT:
            assert path == b""
        elif latest[entry.parent, entry.name] != inode:
            assert path == lost_path(inode), f"{where}: two have the name {entry.name!r}"
        elif entry.parent in inodes:
            assert (seen[directory].inode, name) == (entry.parent, entry.name), where
        else:
            assert seen[directory].inode == entry.parent, f"{where}: {path!r} had another directory"
            renamed = any(at.needle.kind == Kind.RENAME and at.needle.inode == entry.parent for at in sample.needles)
            assert directory == lost_path(entry.parent) or renamed, f"{where}: {path!r} had a directory that is lost"
            assert name == entry.name
    for path, node in seen.items():
        if node.inode not in inodes:
            made = path.startswith(b"/" + LOST) or path == b"" or lost.needle.kind == Kind.DIRECTORY
            assert made, f"{where}: {path!r} is too much"
            assert node.kind == Kind.DIRECTORY, f"{where}: {path!r} is too much"


def lost_path(inode: int) -> bytes:
    return b"" if inode == ROOT else b"/" + LOST + b"%d" % inode


def data_of(disk: SimulatedDisk, at: At) -> bytes:
    data = at.parts()["data"]
    return disk.content(at.path)[data.start : data.stop]


def covers(damage: list[Damage], at: At) -> bool:
    return any(
        each.volume == at.volume_id and each.offset <= at.offset and at.end <= each.offset + each.length
        for each in damage
    )


def flips(sample: Sample, at: At, part: str, number: int) -> list[int]:
    """Return which bytes of a *part* to flip."""
    offsets = at.parts()[part]
    if not len(offsets):
        return []
    return list(offsets) if SOAK and len(offsets) < 400 else [Random(at.offset + number).choice(offsets)]


def is_current(sample: Sample, at: At, node: Node) -> bool:
    last = [each for each in sample.needles if each.needle.inode == node.inode and each.needle.kind in PUT_KINDS][-1]
    return last is at


def check_error(store: Store, path: bytes, at: At) -> None:
    """Opening says which volume and offset are damaged."""
    inode = store.resolve(path)
    text = f"volume {at.volume_id}, offset {at.offset}"
    with pytest.raises(Damaged, match=text):
        if store.attr(inode).kind == Kind.SYMLINK:
            store.readlink(inode)
        else:
            store.open_image(inode)


def check_one_lost(sample: Sample, disk: SimulatedDisk, at: At, where: str) -> None:
    with open_store(disk, writable=False) as reader:
        assert covers(reader.report.damage, at), f"{where}: not reported"
        read_only = snapshot(reader)
        check_survivors(sample, at, read_only, f"{where}, read-only")
    with open_store(disk) as writer:
        assert covers(writer.report.damage, at), f"{where}: not reported"
        assert not writer.report.torn_bytes
        seen = snapshot(writer)
        check_survivors(sample, at, seen, where)
        assert seen.keys() == read_only.keys()
    with open_store(disk, writable=False) as again:
        assert_same(snapshot(again), seen, f"{where}, the second time")
    with open_store(without_index(disk)) as again:
        assert covers(again.report.damage, at), f"{where}: reported once only"
        assert_same(snapshot(again), seen, f"{where}, without the index again")
