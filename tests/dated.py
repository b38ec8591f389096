"""A workload that remembers when it was in which state, for tests of the past.

*Concurrency:* none; one thread at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from crash_model import SETTINGS, STORE, Workload
from powercut import SimulatedDisk
from snapshots import Snapshot

from imgfs.history import History
from imgfs.opening import open_parts


class Dated(Workload):
    """`times[n]` is when operation *n* was done, from which on the store was as `history[n]`."""

    @property
    def times(self) -> list[int]:
        times: list[int] = self.__dict__.setdefault("_times", [])
        return times

    def _look(self) -> Snapshot:
        self.times.append(self.clock.now_ns)
        return super()._look()


@contextmanager
def history_of(disk: SimulatedDisk) -> Iterator[History]:
    """Give the history of the store on *disk*, to which nothing is done."""
    steps = disk.steps
    parts = open_parts(STORE, disk, SETTINGS, writable=False, keep_records=True)
    try:
        assert parts.records is not None
        assert disk.steps == steps, "looking back changed the disk"
        yield History([parts.volumes.get(entry) for entry in range(len(parts.records))], parts.records)
    finally:
        parts.volumes.close()
        parts.table.memory.close()
