"""What went is found in the trash, as it was just before: held against every state that a store has gone through."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from random import Random

import pytest
from crash_model import SETTINGS, STORE, Clock, Workload, open_store, photo, without_index
from powercut import SimulatedDisk
from snapshots import Node, Snapshot
from workloads import large_images, names_and_attributes, random_operations, small_images

from imgfs.format import Kind
from imgfs.history import History
from imgfs.opening import open_parts
from imgfs.trash import Cause, Gone, find


class Dated(Workload):
    """A workload that remembers when it was in which state: `times[n]` after *n* operations."""

    @property
    def times(self) -> list[int]:
        return self.__dict__.setdefault("_times", [])

    def _look(self) -> Snapshot:
        self.times.append(self.clock.now_ns)
        return super()._look()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Dated:
    return Dated(Clock(monkeypatch))


@contextmanager
def history_of(disk: SimulatedDisk) -> Iterator[History]:
    steps = disk.steps
    parts = open_parts(STORE, disk, SETTINGS, writable=False, keep_records=True)
    try:
        assert parts.records is not None
        yield History([parts.volumes.get(entry) for entry in range(len(parts.records))], parts.records)
    finally:
        parts.volumes.close()
        parts.table.memory.close()
    assert disk.steps == steps, "looking into the trash changed the disk"


def facts(history: History, gone: Gone) -> tuple[object, ...]:
    """Return what the trash says of something, as `expected` does."""
    data = b"".join(history.pieces(gone.put)) if gone.kind in (Kind.FILE, Kind.SYMLINK) else b""
    attributes = tuple(sorted(history.xattrs(gone.put, gone.moment).items()))
    return gone.went_ns, gone.inode, gone.kind, gone.size, gone.device, gone.attributes, data, attributes


def expected(node: Node, went_ns: int) -> tuple[object, ...]:
    owner = (node.uid, node.gid, node.mode, node.mtime_ns)
    size = 0 if node.kind == Kind.SPECIAL else node.size
    data = node.data or b""
    return went_ns, node.inode, node.kind, size, node.device, owner, data, tuple(sorted(node.attributes or ()))


def assert_all_are_found(disk: SimulatedDisk, work: Dated, since: int = 0) -> None:
    """Hold what is in the trash against what each operation, from number *since* on, took away."""
    since_ns = work.times[since]
    with history_of(disk) as history:
        found = [gone for gone in find(history, since_ns) if gone.kind != Kind.DIRECTORY]
        seen = {facts(history, gone): gone for gone in found}
        ids = [gone.id for gone in found]
        assert len(set(ids)) == len(ids)
        assert [gone.went_ns for gone in found] == sorted(gone.went_ns for gone in found)
        for number, (before, after) in enumerate(pairwise(work.history[since:]), since + 1):
            left = {node.inode: node for node in after.values()}
            for path, node in before.items():
                now = left.get(node.inode)
                if node.kind == Kind.DIRECTORY or (now and (now.data == node.data or not node.data)):
                    continue
                gone = seen.pop(expected(node, work.times[number]), None)
                if gone is None:  # of several names one stands for all
                    names = [at for at, other in before.items() if other.inode == node.inode]
                    assert len(names) > 1, f"{path!r} is not in the trash"
                    continue
                assert (gone.cause == Cause.OVERWRITTEN) == (now is not None)
                assert before[b"/" + gone.path].inode == node.inode
                if now is None and path in after:
                    assert gone.cause == Cause.REPLACED
        for gone in seen.values():
            # Of all else there is a newer version of the same bytes, or none that lasted longer than an operation.
            assert gone.cause == Cause.OVERWRITTEN
            assert gone.went_ns in work.times


@pytest.mark.parametrize("workload", [small_images, large_images, names_and_attributes])
def test_all_that_went_is_found(workload: object, work: Dated) -> None:
    assert callable(workload)
    workload(work)
    assert_all_are_found(work.disk, work)
    work.close()
    assert_all_are_found(work.disk, work)
    assert_all_are_found(without_index(work.disk.copy()), work)


@pytest.mark.parametrize("seed", range(8))
def test_all_that_went_of_a_random_history_is_found(seed: int, work: Dated) -> None:
    random_operations(work, Random(seed), 150)
    assert_all_are_found(work.disk, work)
    assert_all_are_found(work.disk, work, 70)
    work.close()
    assert_all_are_found(work.disk, work, work.acknowledged - 9)
