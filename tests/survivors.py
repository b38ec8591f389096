"""What lies on a simulated disk, which part of it is durable, and what a power cut leaves of the rest.

Owns contents and names, and the ways to lose some of them. Must not know of calls, steps, or what the bytes mean.
Any unsynced write or truncation may be kept, lost or torn without regard to the others. What a failed sync should
have written is never sure again, whatever later syncs say. Any change of names that is not durable may be lost without
regard to the others, but a rename is whole old or whole new, and changes that share a name arrive in order.

*Concurrency:* none; one thread at a time.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import NamedTuple, TypeVar, cast

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
NAME_BYTES_MAX = 255
_NOISE = Random(0).randbytes(1 << 16)

Ranges = Sequence[tuple[int, int]]  # [start, end) within one write, ascending


class Place(NamedTuple):
    """Where an unsynced write or truncation (which counts as one byte) stands among those of its file."""

    number: int  # from 0
    operations: int
    offset: int  # for a truncation the new length
    size: int
    before: int  # bytes of the operations before this one
    total: int  # bytes of all of them


@dataclass(frozen=True)
class Survivor:
    """Decides what of the unsynced is found after a power cut; it is asked about names first, then file by file.

    Attributes:
        ranges: the parts of a write that arrived.
        length: whether a truncation, or the length that a write gave its file, arrived.
        name: whether the change of names (number, of how many) arrived.
        hole: the bytes (size) that stand where a lost write would have extended its file.
        for_file: who decides about the content of the file that survives at (path) instead of this one.
    """

    ranges: Callable[[Place], Ranges]
    length: Callable[[Place], bool]
    name: Callable[[int, int], bool] = lambda number, changes: True
    hole: Callable[[int], bytes] = bytes
    for_file: "Callable[[str], Survivor] | None" = None

    def at(self, path: str) -> "Survivor":
        return self if self.for_file is None else self.for_file(path)


def _whole(place: Place) -> Ranges:
    return ((0, place.size),)


def _garbage(size: int, start: int = 0) -> bytes:
    return (_NOISE * ((start + size) // len(_NOISE) + 1))[start : start + size]


def prefix(size: int = 0, *, share: float = 0.0) -> Survivor:
    """All names, and of each file the first *size* unsynced bytes and *share* (0 to 1) of them more."""

    def limit(place: Place) -> int:
        return size + int(share * place.total) - place.before

    return Survivor(
        lambda place: ((0, min(place.size, limit(place))),) if limit(place) > 0 else (),
        lambda place: limit(place) >= place.size,
    )


def by_path(suffix: str, there: Survivor, elsewhere: Survivor) -> Survivor:
    """Reorder files: *there* decides about the content of paths that end with *suffix*, *elsewhere* about all else."""
    return replace(elsewhere, for_file=lambda path: (there if path.endswith(suffix) else elsewhere).at(path))


def random_survivor(source: int | Random) -> Survivor:
    """Let a seed, or a Random (as Hypothesis makes them), decide; asked twice, it may decide differently."""
    random = Random(source) if isinstance(source, int) else source
    name_share = random.choice((0.0, 0.5, 1.0))

    def ranges(place: Place) -> Ranges:
        size = place.size
        edges = [0, *range(SECTOR_BYTES - place.offset % SECTOR_BYTES, size, SECTOR_BYTES), size]
        end = random.choice((0, size, random.randint(0, size), random.choice(edges)))
        shape = random.choice(("prefix", "gap", "sectors"))
        if shape == "prefix":
            return ((0, end),)
        if shape == "gap":
            return ((0, end), (random.randint(end, size), size))
        arrived = random.getrandbits(len(edges))
        return [sector for number, sector in enumerate(pairwise(edges)) if arrived >> number & 1]

    def hole(size: int) -> bytes:
        return bytes(size) if random.random() < 0.5 else _garbage(size, random.randrange(len(_NOISE)))

    pieces = Survivor(ranges, lambda place: random.random() < 0.5)

    def for_file(path: str) -> Survivor:
        in_order = prefix(share=random.random())
        mood = random.choice((pieces, pieces, pieces, in_order, NOTHING_UNSYNCED, EVERYTHING, LAST_ONLY))
        return replace(mood, hole=hole)

    return replace(pieces, name=lambda number, changes: random.random() < name_share, for_file=for_file)


NOTHING_UNSYNCED = Survivor(lambda place: (), lambda place: False, lambda number, changes: False)
EVERYTHING = Survivor(_whole, lambda place: True)
NAMES_ONLY = replace(EVERYTHING, ranges=lambda place: (), length=lambda place: False)
CONTENT_ONLY = replace(EVERYTHING, name=lambda number, changes: False)
LENGTHS_ONLY = replace(EVERYTHING, ranges=lambda place: ())
GARBAGE = replace(LENGTHS_ONLY, hole=_garbage)
LAST_ONLY = Survivor(
    lambda place: _whole(place) if place.number == place.operations - 1 else (),
    lambda place: place.number == place.operations - 1,
)
FIRST_HALF = prefix(share=0.5)
STRATEGIES = {
    "NOTHING_UNSYNCED": NOTHING_UNSYNCED,
    "EVERYTHING": EVERYTHING,
    "NAMES_ONLY": NAMES_ONLY,  # files without content
    "CONTENT_ONLY": CONTENT_ONLY,
    "LENGTHS_ONLY": LENGTHS_ONLY,  # zeros for content
    "GARBAGE": GARBAGE,
    "LAST_ONLY": LAST_ONLY,  # a gap before it
    "FIRST_HALF": FIRST_HALF,
}


class Operation(NamedTuple):
    """A write at *offset*, or without *data* a truncation to it."""

    offset: int
    data: bytes | None
    doomed: bool = False  # a sync of it failed
    certain: bool = False  # synced, but kept in the list because a doomed one comes before it
    punched: bool = False  # not written, but freed: whole blocks, XFS does so from the last one on

    @property
    def size(self) -> int:
        return 1 if self.data is None else len(self.data)


class File:
    """An inode; `data` and `durable` may be shared with other files until `edit` takes a copy."""

    def __init__(self, content: bytearray) -> None:
        self.data = self.durable = content
        self.unsynced: list[Operation] = []
        self._owned = False

    def copy(self) -> "File":
        twin = File(self.durable)
        twin.data, twin.unsynced = self.data, self.unsynced.copy()
        self._owned = False
        return twin

    def edit(self) -> bytearray:
        if not self._owned:
            self.data, self._owned = bytearray(self.data), True
        return self.data

    def apply(self, operation: Operation) -> None:
        content, (offset, data, *_) = self.edit(), operation
        _extend(content, offset)
        content[offset : None if data is None else offset + len(data)] = data or b""
        self.unsynced.append(operation)

    def sync(self, *, fails: bool = False) -> None:
        if fails:
            self.unsynced = [each if each.certain else each._replace(doomed=True) for each in self.unsynced]
        elif any(each.doomed for each in self.unsynced):
            self.unsynced = [each if each.doomed else each._replace(certain=True) for each in self.unsynced]
        else:
            self.durable, self.unsynced, self._owned = self.data, [], False

    def reset(self, content: bytes) -> None:
        """Make *content* all that there is, durably."""
        self.data, self.unsynced = bytearray(content), []
        self.sync()

    def flip(self, offset: int, mask: int) -> None:
        """Damage one byte wherever it is kept."""
        offset = range(len(self.data))[offset]
        self.durable = bytearray(self.durable)
        for content in (self.edit(), self.durable):
            if offset < len(content):
                content[offset] ^= mask
        for number, (start, data, *_) in enumerate(self.unsynced):
            if data and start <= offset < start + len(data):
                damaged = bytearray(data)
                damaged[offset - start] ^= mask
                self.unsynced[number] = self.unsynced[number]._replace(data=bytes(damaged))

    def unsynced_bytes(self) -> int:
        return sum(each.size for each in self.unsynced if not each.certain)

    def survive(self, path: str, choice: Survivor) -> "File":
        """Return the file as a power cut leaves it at *path*."""
        if not self.unsynced:
            return File(self.durable)
        choice = choice.at(path)
        content, number, before = bytearray(self.durable), 0, 0
        operations, total = sum(not each.certain for each in self.unsynced), self.unsynced_bytes()
        lost: list[tuple[int, int]] = []  # where written bytes are missing
        for operation in self.unsynced:
            offset, data, _, certain, punched = operation
            place = Place(number, operations, offset, operation.size, before, total)
            survivor = EVERYTHING if certain else choice
            ranges, length = survivor.ranges(place), survivor.length(place)
            if not certain:
                number, before = number + 1, before + place.size
            if data is None:
                if length:
                    del content[offset:]
                    lost = [(start, min(end, offset)) for start, end in lost]
                    _extend(content, offset, lost, choice.hole)
                continue
            if punched:
                freed = sum(end - start for start, end in ranges) // BLOCK_BYTES * BLOCK_BYTES
                content[offset + len(data) - freed : offset + len(data)] = bytes(freed)
                continue
            edges = [0, *(edge for part in ranges for edge in part), len(data)]
            lost += [(offset + start, offset + end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
            end = len(data) if length else max((end for start, end in ranges if start < end), default=-offset)
            _extend(content, offset + end, lost, choice.hole)
            for start, end in ranges:
                content[offset + start : offset + end] = data[start:end]
        return File(content)


def _extend(content: bytearray, size: int, lost: Ranges = (), hole: Callable[[int], bytes] = bytes) -> None:
    old_size = len(content)
    if size > old_size:
        content.extend(bytes(size - old_size))
        for start, end in ((max(start, old_size), min(end, size)) for start, end in lost):
            if start < end:
                content[start:end] = hole(end - start)


class Directory:
    """An inode; `names` are those seen now, `durable` those a power cut leaves for sure."""

    def __init__(self, names: "dict[str, Node]") -> None:
        self.names = names
        self.durable = names.copy()


Node = File | Directory
_SomeNode = TypeVar("_SomeNode", bound=Node)
Slot = tuple[Directory, str]
# What one step does to names, whole or not at all: what each of them stands for from then on, if anything.
Change = dict[Slot, Node | None]


def _twin(node: _SomeNode, twins: dict[Node, Node]) -> _SomeNode:
    """Return the copy of *node*, made at the first call."""
    if node not in twins:
        if isinstance(node, File):
            twins[node] = node.copy()
        else:
            twins[node] = copy = Directory({})
            copy.names = {name: _twin(child, twins) for name, child in node.names.items()}
            copy.durable = {name: _twin(child, twins) for name, child in node.durable.items()}
    return cast(_SomeNode, twins[node])


def _apply(change: Change, names_of: Callable[[Directory], dict[str, Node]]) -> None:
    for (directory, name), node in change.items():
        if node is None:
            names_of(directory).pop(name, None)
        else:
            names_of(directory)[name] = node


def os_error(number: int, *paths: str) -> OSError:
    source, target = (*paths, None, None)[:2]
    return OSError(number, os.strerror(number), source, None, target)


class Tree:
    """All names, and the changes of them that are not durable yet."""

    def __init__(self, root: Directory | None = None) -> None:
        self.root = root or Directory({})
        self._changes: list[Change] = []  # oldest first

    def parent(self, path: str, *paths: str) -> Slot:
        """Return the directory and the name that *path* leads to; an error names *paths*, or else *path*."""
        *parents, name = [part for part in path.split("/") if part] or [""]
        node: Node | None = self.root if path else None
        for part in parents:
            node = node.names.get(part) if isinstance(node, Directory) else node
        if not isinstance(node, Directory):
            raise os_error(errno.ENOTDIR if node else errno.ENOENT, *(paths or (path,)))
        return node if name else Directory({"": self.root}), name

    def get(self, path: str, *paths: str) -> Node | None:
        """Return what is at *path*, None if its name is free."""
        directory, name = self.parent(path, *paths)
        if len(os.fsencode(name)) > NAME_BYTES_MAX:
            raise os_error(errno.ENAMETOOLONG, *(paths or (path,)))
        return directory.names.get(name)

    def find(self, path: str) -> Node:
        node = self.get(path)
        if node is None:
            raise os_error(errno.ENOENT, path)
        return node

    def file(self, path: str) -> File:
        node = self.find(path)
        if isinstance(node, Directory):
            raise os_error(errno.EISDIR, path)
        return node

    def directory(self, path: str) -> Directory:
        node = self.find(path)
        if isinstance(node, File):
            raise os_error(errno.ENOTDIR, path)
        return node

    def files(self, path: str = "", directory: Directory | None = None) -> Iterator[tuple[str, File]]:
        """Yield path and inode of all files, or of those below *directory*."""
        for name, node in (directory or self.root).names.items():
            if isinstance(node, File):
                yield f"{path}/{name}", node
            else:
                yield from self.files(f"{path}/{name}", node)

    def change(self, change: Change) -> None:
        _apply(change, lambda directory: directory.names)
        self._changes.append(change)

    def settle(self, directory: Directory) -> None:
        """Make durable the changes in *directory*, and the earlier ones of any name they share."""
        needed: set[Slot] = set()
        durable: list[Change] = []
        waiting: list[Change] = []
        for change in reversed(self._changes):
            if not needed.isdisjoint(change) or any(place is directory for place, _ in change):
                needed.update(change)
                durable.append(change)
            else:
                waiting.append(change)
        for change in reversed(durable):
            _apply(change, lambda directory: directory.durable)
        self._changes = waiting[::-1]

    def copy(self, open_files: Iterable[File]) -> tuple["Tree", list[File]]:
        """Return a copy, and those files of it that correspond to *open_files*."""
        twins: dict[Node, Node] = {}
        tree = Tree(_twin(self.root, twins))
        tree._changes = [
            {(_twin(place, twins), name): node and _twin(node, twins) for (place, name), node in change.items()}
            for change in self._changes
        ]
        return tree, [_twin(file, twins) for file in open_files]

    def survive(self, choice: Survivor) -> "Tree":
        """Return what a power cut leaves."""
        found: dict[Directory, dict[str, Node]] = {}
        lost: set[Slot] = set()
        for number, change in enumerate(self._changes):
            if choice.name(number, len(self._changes)) and lost.isdisjoint(change):
                _apply(change, lambda directory: found.setdefault(directory, directory.durable.copy()))
            else:
                lost.update(change)

        def below(path: str, directory: Directory) -> Directory:
            survivors: dict[str, Node] = {}
            for name, node in found.get(directory, directory.durable).items():
                here = f"{path}/{name}"
                survivors[name] = node.survive(here, choice) if isinstance(node, File) else below(here, node)
            return Directory(survivors)

        return Tree(below("", self.root))
