"""Gives back the space of what was deleted or replaced: punches holes into volumes, and has the emptiest compacted.

Owns when that is worth it and how long what is deleted is kept. Must not know how it is done.

*Concurrency:* one process and thread at a time. Times of death are learned from the table, and by looking: whatever
this process has seen dead is so at least since then.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.compact import Compaction, Keep, Share
from imgfs.errors import Damaged
from imgfs.format import NEEDLES_START, REPLACES_MAX
from imgfs.holes import Holes
from imgfs.load import live_bytes
from imgfs.needed import NEVER_S, Needed
from imgfs.settings import KIB
from imgfs.table import Table

log = logging.getLogger(__name__)

# The disk keeps so much free, at most and as a part of it, before what is kept for undelete has to go.
_SPARE_BYTES = 1 << 30
_SPARE_PART = 20
# Less is not worth a copy, nor less than this part of a full volume.
_GAIN_BYTES = 64 * KIB
_GAIN_PART = 32
# Volumes that would be smaller than this part of a full one are merged with their neighbours.
_SMALL_PART = 8
# Looking through all volumes for what is kept is not done more often.
_SWEEP_S = 1.0


class Limits(NamedTuple):
    """How far reclaiming goes."""

    retention_s: float
    """How long what was deleted or replaced is kept; 0: not at all."""
    emptied_s: Callable[[], float]
    """Until when what was deleted is kept no more, in seconds since 1970."""
    live_share: float
    """A volume of which less is needed is compacted; 0: none is."""
    volume_bytes_max: int
    headroom_bytes: int
    settle: Callable[[], bool]
    """Wait until every request that is in hand now is answered; return whether that was so in time."""


class Reclaimed(NamedTuple):
    """What was given back."""

    holes: int = 0
    hole_bytes: int = 0
    volumes: int = 0
    volume_bytes: int = 0


class _Dead(NamedTuple):
    """What is dead in a volume and not punched out yet."""

    records: bytes
    dead: npt.NDArray[np.bool_]
    died_s: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


class Reclaimer:
    """Gives back the space of one store that is open for writing."""

    def __init__(
        self,
        table: Table,
        held: Callable[[], Sequence[int]],
        space: Callable[[], os.statvfs_result],
        compaction: Compaction,
        holes: Holes,
        limits: Limits,
    ) -> None:
        """*held* returns the slots that handles are open on, *space* what the disk has."""
        self._table = table
        self._held = held
        self._space = space
        self.compaction = compaction
        self.holes = holes
        self._limits = limits
        # By volume id: what the table had in it when it was looked at last, and when it must be looked at again.
        self._looked: dict[int, tuple[int, int]] = {}
        self._due_s: dict[int, float] = {}
        # By volume id: index positions of what is dead, and when it was first seen to be.
        self._seen: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        self._expired: dict[int, npt.NDArray[np.bool_]] = {}
        self._hopeless: set[int] = set()
        self._sweep_again_s = 0.0

    # -- what is dead -----------------------------------------------------------------------------------------

    def cutoff_s(self) -> float:
        """Return the time before which nothing that died is kept any more; NEVER_S if nothing is kept."""
        if self._limits.retention_s <= 0:
            return NEVER_S
        return max(time.time() - self._limits.retention_s, self._limits.emptied_s())

    def _volume_id(self, row: int) -> int:
        return self._table.volume(row).volume_id

    def _examine(self, row: int, judge: Needed) -> _Dead:
        """Return what is dead in the volume in *row*."""
        volume_id = self._volume_id(row)
        records = self.holes.records(row)
        if not records:
            return _Dead(b"", np.zeros(0, bool), np.zeros(0, np.int64), np.zeros(0, np.int64))
        dead, died_s = judge.dead(records, row)
        positions = np.flatnonzero(dead)
        seen_s = np.full(len(positions), int(time.time()) + 1, np.int64)
        known = self._seen.get(volume_id)
        if known is not None and len(known[0]):
            at = np.minimum(np.searchsorted(known[0], positions), len(known[0]) - 1)
            seen_s = np.where(known[0][at] == positions, known[1][at], seen_s)
        self._seen[volume_id] = positions, seen_s
        times = died_s.astype(np.int64)
        times[positions] = np.minimum(times[positions], seen_s)
        return _Dead(records, dead, times, self.holes.lengths(row, records))

    # -- holes ------------------------------------------------------------------------------------------------

    def punch(self, *, everything: bool = False, urgent: bool = False) -> Reclaimed:
        """Punch out what is dead long enough, in volumes that may have any; in all of them with *everything*.

        *urgent*: somebody waits for room, so a shortage is looked into at once, however lately that was done.

        Raises:
            DiskFailure: as the disk says.
        """
        cutoff_s = self._shortage(urgent=urgent) or self.cutoff_s()
        now_s = time.time()
        images = live_bytes(self._table.memory)[0]
        chosen = []
        for row in self.holes.rows():
            volume_id = self._volume_id(row)
            state = images[row], self._table.volume(row).end
            due = now_s >= self._due_s.get(volume_id, 0.0)
            if everything or due or self._looked.get(volume_id, (-1, -1)) != state:
                self._looked[volume_id] = state
                chosen.append(row)
        if not chosen:
            return Reclaimed()
        judge = Needed(self._table, self._held())
        found = {row: self._examine_safely(row, judge) for row in chosen}
        if not any(dead is not None and dead.dead.any() for dead in found.values()):
            return Reclaimed()
        if not self._limits.settle():
            self._looked.clear()
            return Reclaimed()
        # A handle may have been opened before what it is open on died, and noted after that was judged.
        held = Needed(self._table, self._held())
        holes = freed = 0
        for row, dead in found.items():
            if dead is None or not len(dead.dead):
                continue
            volume_id = self._volume_id(row)
            expired = dead.dead & held.dead(dead.records, row)[0] & (dead.died_s < cutoff_s)
            self._expired[volume_id] = expired
            waiting = dead.died_s[dead.dead & ~expired]
            self._due_s[volume_id] = NEVER_S
            if len(waiting) and self._limits.retention_s > 0:
                self._due_s[volume_id] = float(waiting.min()) + self._limits.retention_s + 1
            if judge.is_held(dead.records):
                self._due_s[volume_id] = now_s + 2
            punched = self.holes.punch(row, dead.records, expired)
            holes, freed = holes + punched.holes, freed + punched.bytes
        return Reclaimed(holes, freed)

    def _examine_safely(self, row: int, judge: Needed) -> _Dead | None:
        try:
            return self._examine(row, judge)
        except Damaged as error:
            self._give_up(row, error)
            return None

    def _give_up(self, row: int, error: Exception) -> None:
        volume_id = self._volume_id(row)
        if volume_id not in self._hopeless:
            self._hopeless.add(volume_id)
            log.error("the space of volume %d is not given back: %s", volume_id, error)

    def _shortage(self, *, urgent: bool) -> float:
        """Return the cutoff that gives the disk as much room as it should have, oldest first; 0 if it has."""
        short = self._short_bytes()
        if short <= 0 or self._limits.retention_s <= 0:
            return 0
        if time.monotonic() < self._sweep_again_s and not urgent:
            return 0
        self._sweep_again_s = time.monotonic() + _SWEEP_S
        self._looked.clear()
        judge = Needed(self._table, self._held())
        times, sizes = [], []
        for row in self.holes.rows():
            dead = self._examine_safely(row, judge)
            if dead is not None and len(dead.dead):
                fresh = dead.dead.copy()
                punched = self._expired.get(self._volume_id(row))
                if punched is not None:
                    fresh[: len(punched)] &= ~punched
                times.append(dead.died_s[fresh])
                sizes.append(dead.sizes[fresh])
        if not times:
            return 0
        died_s, lengths = np.concatenate(times), np.concatenate(sizes)
        order = np.argsort(died_s, kind="stable")
        enough = np.searchsorted(np.cumsum(lengths[order]), short)
        if not len(order):
            return 0
        cutoff_s = float(died_s[order[min(int(enough), len(order) - 1)]]) + 1
        return max(cutoff_s, self.cutoff_s())

    def _short_bytes(self) -> int:
        space = self._space()
        spare = min(_SPARE_BYTES, space.f_blocks * space.f_frsize // _SPARE_PART) + self._limits.headroom_bytes
        return spare - space.f_bavail * space.f_frsize

    # -- compaction -------------------------------------------------------------------------------------------

    def survey(self) -> list[Share]:
        """Return what compaction of each sealed volume would gain. Damaged."""
        return self.compaction.survey(self._keep())

    def _keep(self) -> Keep:
        return Keep(self._held(), int(min(self.cutoff_s(), NEVER_S)), self._expired)

    def worthwhile(self, shares: Sequence[Share], live_share: float | None = None) -> list[list[Share]]:
        """Return the groups of neighbours that are worth a compaction, most reclaimed per byte copied first."""
        least = self._limits.live_share if live_share is None else live_share
        limit = self._limits.volume_bytes_max
        groups: list[list[Share]] = []
        group: list[Share] = []
        for share in shares:
            small = least > 0 and share.needed_bytes - NEEDLES_START < limit // _SMALL_PART
            wanted = (small or self._gains(share, least)) and share.volume_id not in self._hopeless
            size = sum(each.needed_bytes for each in group) + share.needed_bytes
            if group and (size > limit or len(group) == REPLACES_MAX or not wanted):
                groups.append(group)
                group = []
            if wanted:
                group.append(share)
        groups.append(group)
        worth = [group for group in groups if len(group) > 1 or (group and self._gains(group[0], least))]
        return sorted(worth, key=lambda group: -_gain(group) / max(1, sum(each.needed_bytes for each in group)))

    def _gains(self, share: Share, least: float) -> bool:
        enough = min(_GAIN_BYTES, self._limits.volume_bytes_max // _GAIN_PART)
        return share.needed_bytes < least * share.disk_bytes and share.gain_bytes >= enough

    def compact(self, group: Sequence[Share], copied: Callable[[int], None] = lambda _: None) -> Reclaimed:
        """Compact the volumes of *group*; *copied* is told of the bytes written so far, and may wait or raise.

        Raises:
            StoreFull: there is no room for the copy; nothing has changed.
            DiskFailure: as the disk says; nothing has changed.
        """
        try:
            plan = self.compaction.plan([share.row for share in group], self._keep())
            row = self.compaction.run(plan, self._limits.headroom_bytes, copied)
        except Damaged as error:
            for share in group:
                self._give_up(share.row, error)
            return Reclaimed()
        self.finish()
        gained = sum(share.disk_bytes for share in group) - plan.bytes_after
        log.info(
            "compacted %d volumes into volume %d: %d bytes copied, %d freed",
            len(group),
            self._volume_id(row),
            plan.bytes_after,
            gained,
        )
        return Reclaimed(volumes=len(group), volume_bytes=gained)

    def finish(self) -> bool:
        """Bring to an end what compactions that are published have left to do; return whether nothing is."""
        rows = self.compaction.unfinished()
        if rows and not self._limits.settle():
            return False
        removed = [self.compaction.remove(row, self._held()) for row in rows]
        return all(removed)


def _gain(group: Sequence[Share]) -> int:
    return sum(share.gain_bytes for share in group)
