"""Answers to who lists a directory, prepared some at a time: to begin with arrays takes as long as a thousand entries.

Owns entries that are packed and that nobody has asked for yet. Must not know who lists, nor which entries they are.

What is prepared is what it would be if it were made now: it counts as long as nothing in the table changes, whatever
that is. Whoever goes on listing gets more and more of it; where the table changes, no more than one answer. What comes
behind it is prepared in a thread, while who lists, on another processor, looks at what he has.

*Concurrency:* on the loop of a worker, and in its threads; what is kept is replaced in one step. What two replace at
once is prepared again.
"""

import threading
from collections.abc import Callable
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

# To prepare so many entries takes two milliseconds, for which others wait if it is not a thread that does.
_ENTRIES_MAX = 4096
# For each that lists what he is given, and what comes behind it.
_LOTS_MAX = 8


class _Place(NamedTuple):
    """Where entries begin: behind a position in a *directory*."""

    directory: int
    bare: bool
    behind: int


class _Lot(NamedTuple):
    """Entries from a place on."""

    place: _Place
    asked: int
    """How many there were to be; 0: no more than an answer takes."""
    entries: Entries
    page: Page
    atimes_ns: Numbers

    def begin(self, place: _Place) -> int | None:
        """Return the number of the entry that comes at that place; None if that is not known."""
        if place == self.place:
            return 0
        if place[:2] != self.place[:2]:
            return None
        positions, behind = self.page.keys, place.behind
        at = int(np.searchsorted(positions, behind))
        return at + 1 if at < len(positions) and positions[at] == behind else None

    @property
    def next_place(self) -> _Place:
        """Where the entries begin that come behind these, of which there are some."""
        return self.place._replace(behind=int(self.page.keys[-1]))


class _Ahead(NamedTuple):
    """What a thread prepares."""

    place: _Place
    done: threading.Event


class Prepared:
    """What one worker has prepared."""

    def __init__(
        self, store: Store, acts: Acts, times: AccessTimes, start: Callable[[Callable[[], None]], None]
    ) -> None:
        """*start* runs what it is given in a thread."""
        self._start = start
        self._store = store
        self._acts = acts
        self._times = times
        self._lots: tuple[_Lot, ...] = ()
        self._asked = False
        self._ahead: _Ahead | None = None

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

        None where they have to be looked at one by one. Errors as `Acts.page`, and WouldBlock while a thread is at it.
        """
        self._asked = True
        count = size // replies.LISTED_BYTES_MIN
        place, more = _Place(directory, bare, max(position, DOTS)), 2 * count
        ahead = self._ahead
        if ahead is not None and ahead.place == place:
            if nowait:
                raise WouldBlock
            ahead.done.wait()
        lots = self._lots
        lot: _Lot
        for lot in reversed(lots):
            begin = lot.begin(place)
            if begin is None:
                continue
            left = lot.entries.bytes_from(begin)
            if not self._is_now(lot, begin, count):
                more = count
            elif lot.page.ends or left * 2 >= size or (left and self._goes_on(lot)):
                if begin and lot.asked > count:
                    self._go_on(lot)
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
        lot = self._packed(page, place, asked)
        self._keep(lots, lot)
        return lot.entries.answer(unique, self._dots(directory, position, size), 0, size)

    def _packed(self, page: Page, place: _Place, asked: int) -> _Lot:
        atimes_ns = self._times.get_many(page.inodes, page.mtimes_ns)
        entries = replies.entries(page, atimes_ns, self._acts.manner.timeout_s, bare=place.bare)
        return _Lot(place, asked, entries, page, atimes_ns)

    def _keep(self, others: tuple[_Lot, ...], lot: _Lot) -> None:
        self._lots = (*others[1 - _LOTS_MAX :], lot)

    def _goes_on(self, lot: _Lot) -> bool:
        """Return whether what comes behind *lot* is there, or a thread is at it."""
        place, ahead = lot.next_place, self._ahead
        return (ahead is not None and ahead.place == place) or any(other.place == place for other in self._lots)

    def _go_on(self, lot: _Lot) -> None:
        """Let a thread prepare what comes behind *lot*, unless it is at something or that is there."""
        if lot.page.ends or self._ahead is not None or self._goes_on(lot):
            return
        place, asked = lot.next_place, min(2 * lot.asked, _ENTRIES_MAX)
        ahead = self._ahead = _Ahead(place, threading.Event())

        def prepare() -> None:
            try:
                page = self._more(place.directory, place.behind, asked, nowait=False)
                if page is not None:
                    packed = self._packed(page, place, asked)
                    self._keep(self._lots, packed)
            finally:
                # Whoever does not see it sees what became of it.
                self._ahead = None
                ahead.done.set()

        try:
            self._start(prepare)
        except RuntimeError:  # no thread is to be had: who goes on looks for himself
            self._ahead = None
            ahead.done.set()

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
