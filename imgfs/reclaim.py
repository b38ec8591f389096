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
from imgfs.layout import Word
from imgfs.needed import NEVER_S, Needed, pointing
from imgfs.settings import KIB
from imgfs.table import Table
from imgfs.volumes import Volumes

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
    """What is dead in a volume, in the order of its index *records*."""

    records: bytes
    dead: npt.NDArray[np.bool_]
    died_s: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    opened: frozenset[int] = frozenset()
    """Slots of what only open handles keep."""


_NOTHING = _Dead(b"", np.zeros(0, bool), np.zeros(0, np.int64), np.zeros(0, np.int64))
_State = tuple[int, int]
"""What still lives in a volume, see `pointing`, and where it ends: while that stays nothing in it dies."""


class _Looked(NamedTuple):
    """What the last look at a volume has told."""

    state: _State
    oldest_s: float
    """When the first of what is dead and still there died; NEVER_S if nothing is."""
    opened: frozenset[int]

    def is_due(self, cutoff_s: float, held: frozenset[int]) -> bool:
        """Return whether another look would find more to free, though nothing has died since."""
        return self.oldest_s < cutoff_s or not self.opened <= held


class Reclaimer:
    """Gives back the space of one store that is open for writing."""

    def __init__(
        self,
        table: Table,
        volumes: Volumes,
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
        self._volumes = volumes
        # By volume id, as far as they were looked at; and how often the table had changed by then.
        self._looked: dict[int, _Looked] = {}
        self._changes = -1
        # By volume id: index positions of what is dead, and when it was first seen to be.
        self._seen: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        # What was let go, whether or not it took a whole block.
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

    def _examine(self, row: int, state: _State, judge: Needed) -> _Dead:
        """Look at the volume in *row*, which was in *state* before that: return what is dead in it."""
        volume_id = self._volume_id(row)
        found = _NOTHING
        try:
            records = self.holes.records(row)
            if records:
                found = self._judge(row, records, judge)
        except Damaged as error:
            self._give_up(row, error)
        self._note(volume_id, state, found, found.opened)
        return found

    def _note(self, volume_id: int, state: _State, found: _Dead, opened: frozenset[int]) -> None:
        died_s = found.died_s[self._kept(volume_id, found)]
        oldest_s = float(died_s.min()) if len(died_s) else NEVER_S
        self._looked[volume_id] = _Looked(state, oldest_s, opened)

    def _judge(self, row: int, records: bytes, judge: Needed) -> _Dead:
        volume_id = self._volume_id(row)
        dead, died_s, opened = judge.dead(records, row)
        positions = np.flatnonzero(dead)
        seen_s = np.full(len(positions), int(time.time()) + 1, np.int64)
        known = self._seen.get(volume_id)
        if known is not None and len(known[0]):
            at = np.minimum(np.searchsorted(known[0], positions), len(known[0]) - 1)
            seen_s = np.where(known[0][at] == positions, known[1][at], seen_s)
        self._seen[volume_id] = positions, seen_s
        times = died_s.astype(np.int64)
        times[positions] = np.minimum(times[positions], seen_s)
        return _Dead(records, dead, times, self.holes.lengths(row, records), opened)

    def _kept(self, volume_id: int, found: _Dead) -> npt.NDArray[np.bool_]:
        """Return what is dead and was not let go yet."""
        kept = found.dead.copy()
        expired = self._expired.get(volume_id)
        if expired is not None and len(kept):
            kept[: len(expired)] &= ~expired  # the volume may have grown since
        return kept

    def _states(self) -> dict[int, _State]:
        """Return the state of each volume, by its row, in the order of their sequence numbers."""
        words = self._table.memory.words
        alive = pointing(self._table)
        rows = self._volumes.rows()
        ids = set(map(self._volume_id, rows))
        for known in (self._looked, self._seen, self._expired):
            for gone in known.keys() - ids:
                del known[gone]
        states = {}
        for row in rows:
            end = words[Word.ACTIVE_END] if row == words[Word.ACTIVE] else self._table.volume(row).end
            states[row] = int(alive[row]) if row < len(alive) else -1, end
        return states

    # -- holes ------------------------------------------------------------------------------------------------

    def punch(self, *, everything: bool = False, urgent: bool = False) -> Reclaimed:
        """Punch out what is dead long enough, in volumes that may have any; in all of them with *everything*.

        *urgent*: somebody waits for room, so a shortage is looked into at once, however lately that was done.

        Raises:
            DiskFailure: as the disk says.
        """
        cutoff_s = self._shortage(urgent=urgent) or self.cutoff_s()
        found = self._look(cutoff_s, everything=everything)
        chosen = {row: dead for row, dead in found.items() if (self._expiring(row, dead, cutoff_s)).any()}
        if not chosen or not self._limits.settle():
            return Reclaimed()
        # A handle may have been opened before what it is open on died, and noted after that was judged.
        judge = Needed(self._table, self._held())
        holes = freed = 0
        for row, dead in chosen.items():
            volume_id = self._volume_id(row)
            still = judge.dead(dead.records, row)
            expired = self._expiring(row, dead, cutoff_s) & still.dead
            before = self._expired.get(volume_id)
            if before is not None:
                expired[: len(before)] |= before & dead.dead[: len(before)]
            punched = self.holes.punch(row, dead.records, expired)
            holes, freed = holes + punched.holes, freed + punched.bytes
            if punched.is_all:
                self._expired[volume_id] = expired
                self._note(volume_id, self._looked[volume_id].state, dead, still.opened)
        return Reclaimed(holes, freed)

    def _look(self, cutoff_s: float, *, everything: bool) -> dict[int, _Dead]:
        """Look at the volumes in which something may have died, or become old enough; return what is dead, by row."""
        held = frozenset(self._held())
        changes = self._table.memory.words[Word.COUNTER]
        due = any(looked.is_due(cutoff_s, held) for looked in self._looked.values())
        if changes == self._changes and not due and not everything:
            return {}
        judge = Needed(self._table, held)
        found = {}
        for row, state in self._states().items():
            looked = self._looked.get(self._volume_id(row))
            if everything or looked is None or looked.state != state or looked.is_due(cutoff_s, held):
                found[row] = self._examine(row, state, judge)
        self._changes = changes
        return found

    def _expiring(self, row: int, found: _Dead, cutoff_s: float) -> npt.NDArray[np.bool_]:
        """Return what of *found* is to be let go now."""
        expiring: npt.NDArray[np.bool_] = self._kept(self._volume_id(row), found) & (found.died_s < cutoff_s)
        return expiring

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
        held = frozenset(self._held())
        judge = Needed(self._table, held)
        times, sizes = [], []
        for row, state in self._states().items():
            volume_id = self._volume_id(row)
            looked = self._looked.get(volume_id)
            if looked is not None and looked.state == state and not looked.is_due(NEVER_S, held):
                continue  # nothing in it is kept
            dead = self._examine(row, state, judge)
            kept = self._kept(volume_id, dead)
            times.append(dead.died_s[kept])
            sizes.append(dead.sizes[kept])
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
