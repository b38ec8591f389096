"""The whole stores that fuzzing changes, the same in every run, and all that may be read from each.

Owns how they come about: a random workload, some of them closed, some reclaimed. Must not know what is done to them.

*Concurrency:* none; while they are in use the clock of the process stands still.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest
from cases import STORE, SUPERBLOCK, Seed
from crash_model import Clock, Workload
from damage_model import sample_of
from stores import abandon
from workloads import random_operations

from imgfs.compact import Keep
from imgfs.needed import NEVER_S
from imgfs.opening import LOCK
from imgfs.settings import Settings
from imgfs.store import Store
from imgfs.superblock import Superblock, pack_superblock, unpack_superblock
from imgfs.volume import Volume

_VOLUME_BYTES = 16_000  # so that a dozen needles fill one
_SEEDS = 16
_RECLAIMED = 5  # of these have holes, or a volume that replaces others


class _SmallVolumes(Workload):
    """A workload whose volumes hold a dozen needles."""

    def open(self) -> None:
        store_id = unpack_superblock(self.disk.content(SUPERBLOCK)).store_id
        self.disk.set_content(SUPERBLOCK, pack_superblock(Superblock(store_id, _VOLUME_BYTES)))
        super().open()


def reclaim(store: Store) -> None:
    """Punch holes where images were deleted, and compact what is sealed."""
    reclaimer = store.reclaimer()
    reclaimer.punch(everything=True)
    compaction = reclaimer.compaction
    rows = store._volumes.rows(sealed=True)
    if rows:
        row = compaction.run(compaction.plan(rows, Keep((), NEVER_S)), 0)
        compaction.remove(row, ())


def _seed(clock: Clock, number: int) -> Seed:
    random = Random(number)
    work = _SmallVolumes(clock, Settings(headroom_bytes=0, checkpoint_needles=6, rest_slots=random.choice((0, 2))))
    random_operations(work, random, random.choice((8, 12, 16, 20)))
    if number >= _SEEDS - _RECLAIMED:
        work.sync()
        reclaim(work.store)
        random_operations(work, random, 4)
    if number % 3:
        work.close()
    else:
        work.sync()
        work.create(b"/mark", b"its header says that all before it is durable")
    sample = sample_of(work)
    if not number % 3:
        abandon(work.store)
    images: dict[int, set[bytes]] = {}
    attributes: dict[int, set[tuple[tuple[bytes, bytes], ...]]] = {}
    names: dict[int, set[bytes]] = {}
    for state in work.history:
        for path, node in state.items():
            images.setdefault(node.inode, set()).add(node.data or b"")
            attributes.setdefault(node.inode, set()).add(node.attributes or ())
            names.setdefault(node.inode, set()).add(path.rpartition(b"/")[2])
    return Seed(
        f"seed {number}",
        {path: sample.disk.content(path) for path in sample.disk.paths()} | {f"{STORE}/{LOCK}": b"1234\n"},
        sample.needles,
        {path: Volume.open(sample.disk, path).header for path in sample.disk.paths() if path.endswith(".vol")},
        sample.wanted,
        {inode: frozenset(each) for inode, each in images.items()},
        {inode: frozenset(each) for inode, each in attributes.items()},
        {inode: frozenset(each) for inode, each in names.items()},
    )


@contextmanager
def seeds() -> Iterator[list[Seed]]:
    """Give the stores that are changed, the same in every run; meanwhile the clock stands still."""
    noise = Random(0)
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        patch.setattr(time, "time_ns", lambda: clock.now_ns)
        with pytest.MonkeyPatch.context() as making:
            making.setattr(os, "urandom", noise.randbytes)
            made = [_seed(clock, number) for number in range(_SEEDS)]
        level = logging.getLogger("imgfs").level
        logging.getLogger("imgfs").setLevel(logging.CRITICAL)
        try:
            yield made
        finally:
            logging.getLogger("imgfs").setLevel(level)
