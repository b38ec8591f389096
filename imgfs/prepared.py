"""Answers to who lists a directory, prepared some at a time: to begin with arrays takes as long as a thousand entries.

Owns entries that are packed and that nobody has asked for yet. Must not know who lists, nor which entries they are.

What is prepared is what it would be if it were made now: it counts as long as nothing in the table changes, whatever
that is. Whoever goes on listing gets more and more of it; where the table changes, no more than one answer.

*Concurrency:* on the loop of a worker, and in its threads; what is kept is replaced in one step.
"""

from typing import NamedTuple

import numpy as np

from imgfs import replies
from imgfs.acts import DOTS, Acts
from imgfs.atimes import AccessTimes
from imgfs.replies import Entries, Reply
from imgfs.store import Store

# To prepare so many entries takes two milliseconds, for which others wait.
_ENTRIES_MAX = 4096
_LOTS_MAX = 4


class _Lot(NamedTuple):
    """Entries of a *directory* behind a position."""

    directory: int
    behind: int
    bare: bool
    counter: int
    asked: int
    """How many there were to be."""
    entries: Entries
    ends: bool
    """Nothing comes behind."""

    def begin(self, behind: int) -> int | None:
        """Return the number of the entry that comes *behind* that position; None if that is not known."""
        if behind == self.behind:
            return 0
        at = int(np.searchsorted(self.entries.positions, behind))
        return at + 1 if at < len(self.entries.positions) and self.entries.positions[at] == behind else None


class Prepared:
    """What one worker has prepared."""

    def __init__(self, store: Store, acts: Acts, times: AccessTimes) -> None:
        self._store = store
        self._acts = acts
        self._times = times
        self._lots: tuple[_Lot, ...] = ()
        self._asked = False

    def forget(self) -> bool:
        """Free all if nobody has listed anything since this was called last; return whether there was any."""
        if self._asked or not self._lots:
            self._asked = False
            return False
        self._lots = ()
        return True

    def answer(
        self, unique: int, directory: int, position: int, size: int, *, bare: bool, nowait: bool = False
    ) -> Reply | None:
        """Answer with entries behind *position*, as `replies.listing` has them.

        None where they have to be looked at one by one. Errors as `Acts.page`.
        """
        self._asked = True
        count = size // replies.LISTED_BYTES_MIN
        behind, more = max(position, DOTS), 2 * count
        for lot in reversed(self._lots):
            begin = lot.begin(behind) if (lot.directory, lot.bare) == (directory, bare) else None
            if begin is None:
                continue
            if not self._store.is_unchanged(lot.counter):
                more = count
            elif lot.ends or lot.entries.bytes_from(begin) * 2 >= size:
                return lot.entries.answer(unique, self._dots(directory, position, size), begin, size)
            else:
                more = max(count, min(2 * lot.asked, _ENTRIES_MAX))
            break
        page = self._acts.page(directory, position, more, nowait=nowait)
        if page is None and more > count:
            more, page = count, self._acts.page(directory, position, count, nowait=nowait)
        if page is None:
            return None
        entries = replies.entries(page, self._times, self._acts.manner.timeout_s, bare=bare)
        lot = _Lot(directory, behind, bare, page.counter, more, entries, page.ends)
        self._lots = (*self._lots[1 - _LOTS_MAX :], lot)
        return entries.answer(unique, self._dots(directory, position, size), 0, size)

    def _dots(self, directory: int, position: int, size: int) -> bytes:
        dots = self._acts.dots(directory, position)
        return replies.listing(0, dots, self._times, self._acts.manner.timeout_s, size)[1]
