"""Planted damage: where each needle of a store lies, and what must be left when one of them cannot be read.

Owns the simplest replay there can be, and holds recovery against it. Must not know how recovery works.

*Concurrency:* none; one thread at a time.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import pytest
from crash_model import Clock, Workload, needles, open_store, without_index
from powercut import SimulatedDisk
from snapshots import Node, Snapshot, assert_same, snapshot
from workloads import random_operations, small_images

from imgfs.errors import Damaged
from imgfs.format import FLAG_BARE, FLAG_LAST, PUT_KINDS, Kind, Needle, Tag, footer_bytes, slot_of, unpack_xattrs
from imgfs.settings import Settings
from imgfs.store import ROOT, Store
from imgfs.survey import Damage

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


def closed_store(clock: Clock, operations: Callable[[Workload], None] = small_images) -> Sample:
    """Return a store of several volumes that was closed."""
    work = Workload(clock)
    operations(work)
    work.close()
    return sample_of(work)


def random_store(clock: Clock, seed: int, *, closed: bool) -> Sample:
    """Return a store in which things were done at random; slots are used again soon, and volumes are small."""
    random = Random(seed)
    size = (64 << 10) if closed else (1 << 20)
    work = Workload(clock, Settings(volume_bytes_max=size, headroom_bytes=0, rest_slots=random.choice((0, 0, 3))))
    random_operations(work, random, 45)
    work.sync()
    work.create(b"/mark", b"its header says that all before it is durable")
    if closed:
        work.close()
    return sample_of(work)


def killed_store(clock: Clock, operations: Callable[[Workload], None] = small_images) -> Sample:
    """Return a store of one volume, synced but never checkpointed: all of it is replayed needle by needle."""
    work = Workload(clock, Settings(volume_bytes_max=1 << 20, headroom_bytes=0, rest_slots=2))
    operations(work)
    work.sync()
    work.create(b"/mark", b"its header says that all before it is durable")
    return sample_of(work)


# -- what is left when one needle cannot be read -----------------------------------------------------------------


class Entry(NamedTuple):
    """An inode as the needles tell it."""

    parent: int  # 0: only links name it
    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    at: At  # what holds its data
    named: int  # number of the needle that named it
    target: int = 0  # of a link


class Told(NamedTuple):
    """What the needles tell."""

    inodes: dict[int, Entry]
    attributes: dict[int, At]  # by inode; may be of one that is gone

    def links(self, inode: int) -> list[int]:
        return [link for link, entry in self.inodes.items() if entry.target == inode]


def replay(found: list[At], lost: At | None = None) -> Told:
    """Return what the needles, but for *lost*, tell; the simplest replay there can be."""
    inodes: dict[int, Entry] = {}
    attributes: dict[int, At] = {}

    def end(inode: int) -> None:
        inodes.pop(inode, None)
        attributes.pop(inode, None)

    def drop_name(inode: int, needle: Needle) -> None:
        if not needle.flags & FLAG_BARE:
            end(inode)
        elif inode in inodes:
            inodes[inode] = inodes[inode]._replace(parent=0, name=b"")
        if needle.flags & FLAG_LAST:
            end(needle.extra_u64(Tag.TARGET))

    for number, at in enumerate(found):
        needle = at.needle
        if at is lost:
            continue
        if needle.kind in PUT_KINDS:
            for other in [inode for inode in inodes if slot_of(inode) == slot_of(needle.inode) and inode != ROOT]:
                if other != needle.inode:
                    end(other)
            target = needle.extra_u64(Tag.TARGET)
            inodes[needle.inode] = Entry(
                needle.parent, needle.name, needle.kind, needle.mode, needle.uid, needle.gid, at, number, target
            )
        elif needle.kind == Kind.DELETE:
            drop_name(needle.inode, needle)
        elif needle.kind == Kind.RENAME:
            drop_name(needle.extra_u64(Tag.REPLACED), needle)
            if needle.inode in inodes:
                moved = inodes[needle.inode]._replace(parent=needle.parent, name=needle.name, named=number)
                inodes[needle.inode] = moved
        elif needle.kind == Kind.ATTRIBUTES and needle.inode in inodes:
            changed = inodes[needle.inode]._replace(mode=needle.mode, uid=needle.uid, gid=needle.gid)
            inodes[needle.inode] = changed
        elif needle.kind == Kind.XATTR:
            attributes[needle.inode] = at
    for inode, entry in list(inodes.items()):
        if entry.kind == Kind.LINK and entry.target not in inodes:
            del inodes[inode]
    return Told(inodes, attributes)


def rings(inodes: dict[int, Entry]) -> list[int]:
    """Return of each ring of directories that lie in one another the one that has its name longest."""
    found = set()
    for inode in inodes:
        above: list[int] = []
        while inode in inodes and inode != ROOT and inode not in above:
            above.append(inode)
            inode = inodes[inode].parent
        if inode in above:
            found.add(min(above[above.index(inode) :], key=lambda each: inodes[each].named))
    return sorted(found)


def check_survivors(sample: Sample, lost: At, seen: Snapshot, where: str) -> None:
    """Check that all but the needle *lost* counts in what is *seen*, by inode, and that nothing else is there."""
    told = replay(sample.needles, lost)
    inodes = told.inodes
    latest: dict[tuple[int, bytes], int] = {}
    for inode, entry in sorted(inodes.items(), key=lambda item: item[1].named):
        latest[slot_of(entry.parent), entry.name] = inode
    unstuck = rings(inodes)

    def fits(entry_inode: int, path: bytes) -> bool:
        """Return whether *path* is what one would call the name *entry_inode*."""
        entry = inodes[entry_inode]
        directory, _, name = path.rpartition(b"/")
        if entry_inode == ROOT or not path:
            return (entry_inode == ROOT) == (not path)
        if path == lost_path(entry_inode):
            # Nothing has this name for long, unless there is no other for it.
            taken = latest[slot_of(entry.parent), entry.name] != entry_inode
            return taken or not entry.parent or entry.parent not in inodes or entry_inode in unstuck
        if name != entry.name:
            return False
        if entry.parent in inodes:
            return seen[directory].inode == entry.parent
        # Its directory is lost, or was removed after a lost needle took this out of it; its slot may be used again.
        return slot_of(seen[directory].inode) == slot_of(entry.parent)

    for inode, entry in inodes.items():
        if entry.kind == Kind.LINK:
            continue
        paths = [path for path, node in seen.items() if node.inode == inode]
        names = [each for each in (inode, *told.links(inode)) if inodes[each].parent] or [inode]
        assert len(paths) == len(names), f"{where}: inode {inode:#x}, {entry.name!r}: {paths}, names {names}"
        for name in names:
            places = [path for path in paths if fits(name, path)]
            assert places, f"{where}: {inodes[name].name!r}, a name of inode {inode:#x}, is not among {paths}"
        node = seen[paths[0]]
        assert (node.kind, node.mode, node.uid, node.gid) == (entry.kind, entry.mode, entry.uid, entry.gid), where
        if entry.kind != Kind.DIRECTORY:
            assert node.data == data_of(sample.disk, entry.at), f"{where}: wrong bytes in {paths}"
        if entry.kind == Kind.SPECIAL:
            assert node.device == entry.at.needle.extra_u64(Tag.DEVICE), where
        at = told.attributes.get(inode)
        wanted = unpack_xattrs(data_of(sample.disk, at)) if at is not None else {}
        assert dict(node.attributes or ()) == wanted, f"{where}: other attributes of {paths}"
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
    """Return whether *at* holds the bytes of *node*."""
    last = [each for each in sample.needles if each.needle.inode == node.inode and each.needle.kind in PUT_KINDS][-1]
    return last is at and node.kind in (Kind.FILE, Kind.SYMLINK)


def holds_attributes(sample: Sample, at: At, node: Node) -> bool:
    """Return whether *at* holds the extended attributes of *node*."""
    held = [each for each in sample.needles if each.needle.inode == node.inode and each.needle.kind == Kind.XATTR]
    return bool(held) and held[-1] is at and at.needle.data_size > 0


def without_bytes(sample: Sample, at: At) -> tuple[Snapshot, list[bytes]]:
    """Return what a reader sees who cannot read *at*, and the paths where that is an error."""
    wanted = sample.wanted.copy()
    for path, node in sample.wanted.items():
        if is_current(sample, at, node):
            wanted[path] = node._replace(data=None)
        elif holds_attributes(sample, at, node):
            wanted[path] = node._replace(attributes=None)
    return wanted, [path for path, node in wanted.items() if node != sample.wanted[path]]


def check_error(store: Store, path: bytes, at: At) -> None:
    """Opening, or asking for the attributes, says which volume and offset are damaged."""
    inode = store.resolve(path)
    text = f"volume {at.volume_id}, offset {at.offset}"
    with pytest.raises(Damaged, match=text):
        if at.needle.kind == Kind.XATTR:
            store.list_xattrs(inode)
        elif store.attr(inode).kind == Kind.SYMLINK:
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
    check_newcomers(disk, seen, where)


def check_newcomers(disk: SimulatedDisk, seen: Snapshot, where: str) -> None:
    """Check that what takes the slots of the lost gets nothing of theirs, and takes nothing from others."""
    for index in (True, False):
        with open_store(disk, Settings(headroom_bytes=0, rest_slots=0)) as store:
            for number in range(4):
                name = b"new %d, %d" % (index, number)
                store.put(ROOT, name, name, len(name), mode=0o600, uid=1, gid=1, mtime_ns=1)
            wanted = snapshot(store)
        others = {path: node for path, node in wanted.items() if path and not path.startswith(b"/new ")}
        assert others == {path: node for path, node in seen.items() if path}, f"{where}: others changed"
        newcomers = [node for path, node in wanted.items() if path.startswith(b"/new ")]
        assert not any(node.nlink > 1 or node.attributes for node in newcomers), f"{where}: {newcomers}"
        with open_store(disk if index else without_index(disk), writable=False) as again:
            assert_same(snapshot(again), wanted, f"{where}, new images, {index=}")
