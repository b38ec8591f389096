"""Several worker processes on one store, each with a list of requests that follow from its number alone.

Owns what a worker asks for, the model of what must come of it, and the memory in which workers say what they have
answered. Must not know who kills them.

*Concurrency:* a worker changes names of its own, in directories that all share; it may look at everything. A request is
answered when its number stands in `Answers`.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from imgfs.errors import BadHandle, IsADirectory, NotFound, Stale
from imgfs.requests import NOBODY, TASKS_MAX, Request
from imgfs.store import ROOT, Store

_ANSWER = struct.Struct("<QQ")  # requests answered, handle of the last image that was created
NAMES = 12
PASSING = b" passing"


class Answers:
    """What the clients have got: it outlives every worker."""

    def __init__(self, workers: int) -> None:
        self._map = mmap.mmap(-1, _ANSWER.size * workers)

    def get(self, worker: int) -> tuple[int, int]:
        count, handle = _ANSWER.unpack_from(self._map, _ANSWER.size * worker)
        return count, handle

    def put(self, worker: int, count: int, handle: int) -> None:
        # The count last, and of a word: the answer is there or it is not.
        struct.pack_into("@Q", self._map, _ANSWER.size * worker + 8, handle)
        struct.pack_into("@Q", self._map, _ANSWER.size * worker, count)

    def close(self) -> None:
        self._map.close()


@dataclass(frozen=True)
class Step:
    """A request: what is called with which arguments, and whether it needs the handle of the last image created."""

    call: str
    arguments: tuple[object, ...] = ()


PAUSE = Step("")
"""Nothing is called, and nothing is half done."""


def pattern(worker: int, version: int, size: int) -> bytes:
    """Return bytes of an image that tell whether they are whole: a reader can check them."""
    head = b"%d %d %d " % (worker, version, size)
    return (head + Random(version).randbytes(64)).ljust(size, b".")[: max(size, len(head))]


def is_pattern(data: bytes) -> bool:
    worker, version, size = map(int, data.split(b" ", 3)[:3])
    return data == pattern(worker, version, size)


class Course:
    """The requests of one worker, and what its names hold after each."""

    def __init__(self, worker: int, directories: tuple[int, ...]) -> None:
        self._worker = worker
        self._directories = directories
        self._random = Random(worker)
        self.files: dict[tuple[int, bytes], bytes] = {}  # directory, name
        self.folders: set[tuple[int, bytes]] = set()
        self._version = 0

    def steps(self) -> Iterator[Step]:
        """Yield the requests, without end; the model is that behind a request when the next is asked for."""
        while True:
            ways = [self._store, self._store, self._folder, self._rename, self._unlink, self._link, self._swap]
            yield from self._random.choice(ways)()
            yield PAUSE

    def _name(self) -> tuple[int, bytes]:
        return self._random.choice(self._directories), b"%d-%d" % (self._worker, self._random.randrange(NAMES))

    def _data(self) -> bytes:
        self._version += 1
        return pattern(self._worker, self._version, self._random.choice([0, 100, 3000, 30_000]))

    def _free(self) -> tuple[int, bytes] | None:
        where = self._name()
        return None if where in self.files or where in self.folders else where

    def _taken(self) -> tuple[int, bytes] | None:
        return self._random.choice(sorted(self.files)) if self.files else None

    def _store(self) -> Iterator[Step]:
        where = self._name()
        if where in self.folders:
            return
        data = self._data()
        half = len(data) // 2
        # Under another name first, as rsync does: nobody must see half of it.
        passing = where[0], b"%d%s" % (self._worker, PASSING)
        yield Step("create_image", (*passing, 0o644, 1, 1))
        yield Step("write", (half, data[half:]))
        yield Step("write", (0, data[:half]))
        yield Step("flush")
        yield Step("release")
        yield Step("rename", (*passing, *where))
        self.files[where] = data

    def _folder(self) -> Iterator[Step]:
        where = self._free()
        if where is not None:
            yield Step("mkdir", (*where, 0o755, 1, 1))
            self.folders.add(where)
        elif self.folders:
            where = self._random.choice(sorted(self.folders))
            yield Step("rmdir", where)
            self.folders.remove(where)

    def _rename(self) -> Iterator[Step]:
        source, target = self._taken(), self._free()
        if source is not None and target is not None:
            yield Step("rename", (*source, *target))
            self.files[target] = self.files.pop(source)

    def _unlink(self) -> Iterator[Step]:
        where = self._taken()
        if where is not None and self._random.random() < 0.5:
            yield Step("unlink", where)
            del self.files[where]

    def _link(self) -> Iterator[Step]:
        where = self._free()
        if where is not None:
            yield Step("symlink", (*where, b"target of %d" % self._worker, 1, 1))
            yield Step("unlink", where)

    def _swap(self) -> Iterator[Step]:
        one, other = self._taken(), self._taken()
        if one is not None and other is not None and one != other:
            yield Step("exchange", (*one, *other))
            self.files[one], self.files[other] = self.files[other], self.files[one]


def request_of(worker: int, number: int) -> Request:
    """Return how the kernel would tell request *number* of the client of *worker* from others."""
    return Request(1 + worker, 1000 + worker, ROOT, number)


def look_of(worker: int) -> Request:
    """Return the request in hand while client *worker* looks at what others wrote."""
    return Request(100 + worker, 1000 + worker, ROOT, 0)


def serve(store: Store, worker: int, seat: int, answers: Answers, directories: tuple[int, ...], last: int) -> None:
    """Be a worker: answer the requests of client *worker* from the first that has no answer on.

    It ends in the first pause from number *last* on.
    """
    done, handle = answers.get(worker)
    row = seat * TASKS_MAX
    looks = Random()
    for number, step in enumerate(Course(worker, directories).steps()):
        if number < done:
            continue
        if number >= last and step is PAUSE:
            return
        request = request_of(worker, number)
        store.requests.begin(row, request)
        known = store.requests.resent(row, request)
        handle = (known.handle or handle) if known is not None else _call(store, step, handle, row)
        answers.put(worker, number + 1, handle)
        store.requests.end(row)
        if number % 4 == 0:
            # A request that is as if it was never answered: its handle is closed if we die.
            store.requests.begin(row + 1, look_of(worker))
            look(store, looks, directories, row + 1)
            store.requests.end(row + 1)
        if number % 50 == worker:
            store.sync()


def _call(store: Store, step: Step, handle: int, row: int) -> int:
    if step is PAUSE:
        return handle
    store.requester = row
    try:
        if step.call in ("write", "flush", "release"):
            try:
                getattr(store, step.call)(handle, *step.arguments)
            except BadHandle:
                if step.call != "release":  # a handle that is gone was released
                    raise
            return handle
        result = getattr(store, step.call)(*step.arguments)
        return int(result[1]) if step.call == "create_image" else handle
    finally:
        store.requester = NOBODY


def look(store: Store, random: Random, directories: tuple[int, ...], row: int) -> None:
    """Read an image of anybody that has its final name: it is whole."""
    entries = [entry for entry in store.list(random.choice(directories)) if not entry.name.endswith(PASSING)]
    if not entries:
        return
    entry = random.choice(entries)
    try:
        handle = store.open_image(entry.inode, row=row)
    except (IsADirectory, NotFound, Stale):
        return
    try:
        data = bytes(store.read(handle, 0, 100_000))
        assert data.startswith(b"target") or is_pattern(data), data[:100]
    except Stale:
        pass  # its slot was given away between the two
    finally:
        store.release(handle)
