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
from imgfs.disk import Buffer, WouldBlock
from imgfs.errors import ImgfsError
from imgfs.listing import Numbers, Page
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
    asked: int
    """How many there were to be; 0: no more than an answer takes."""
    entries: Entries
    page: Page
    atimes_ns: Numbers

    def begin(self, behind: int) -> int | None:
        """Return the number of the entry that comes *behind* that position; None if that is not known."""
        if behind == self.behind:
            return 0
        positions = self.page.keys
        at = int(np.searchsorted(positions, behind))
        return at + 1 if at < len(positions) and positions[at] == behind else None


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
        lots = self._lots
        lot: _Lot
        for lot in reversed(lots):
            begin = lot.begin(behind) if (lot.directory, lot.bare) == (directory, bare) else None
            if begin is None:
                continue
            if not self._is_now(lot, begin, count):
                more = count
            elif lot.page.ends or lot.entries.bytes_from(begin) * 2 >= size:
                return lot.entries.answer(unique, self._dots(directory, position, size), begin, size)
            else:
                more = 2 * lot.asked
            lots = tuple(other for other in lots if other is not lot)
            break
        asked = min(more, _ENTRIES_MAX)
        page = self._more(directory, position, asked, nowait=nowait) if asked > count else None
        if page is None:
            # Who could not get more is not tried with more again, as long as it goes on.
            asked = count if asked == count else 0
            page = self._acts.page(directory, position, count, nowait=nowait)
        if page is None:
            return None
        atimes_ns = self._times.get_many(page.inodes, page.mtimes_ns)
        entries = replies.entries(page, atimes_ns, self._acts.manner.timeout_s, bare=bare)
        made = _Lot(directory, behind, bare, asked, entries, page, atimes_ns)
        self._lots = (*lots[1 - _LOTS_MAX :], made)
        return entries.answer(unique, self._dots(directory, position, size), 0, size)

    def _more(self, directory: int, position: int, count: int, *, nowait: bool) -> Page | None:
        """As `Acts.page`; None, too, where an entry is damaged that nobody has asked for yet."""
        try:
            return self._acts.page(directory, position, count, nowait=nowait)
        except WouldBlock:
            raise
        except (ImgfsError, OSError):
            return None

    def _is_now(self, lot: _Lot, begin: int, count: int) -> bool:
        """Return whether the next *count* entries are what they were; access times are no part of the table."""
        if not self._store.is_unchanged(lot.page.counter):
            return False
        those = slice(begin, begin + count)
        atimes_ns = self._times.get_many(lot.page.inodes[those], lot.page.mtimes_ns[those])
        return bool((atimes_ns == lot.atimes_ns[those]).all())

    def _dots(self, directory: int, position: int, size: int) -> Buffer:
        dots = self._acts.dots(directory, position)
        return replies.listing(0, dots, self._times, self._acts.manner.timeout_s, size)[1]
