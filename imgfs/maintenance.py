"""The maintenance process: makes durable what was closed, gives back the space of what was deleted, answers commands.

Owns its intervals. Must not know FUSE, nor how space is given back. It may be killed at any instruction, as a worker
may.

*Concurrency:* one process beside the workers, one thread; what takes long comes up for air after each image.
"""

import logging
import select
import time
from collections.abc import Callable
from typing import NamedTuple

from imgfs import control
from imgfs.board import WORKERS_MAX, Board
from imgfs.compact import Share
from imgfs.control import Gone, Message
from imgfs.errors import ImgfsError
from imgfs.options import MountOptions
from imgfs.pace import Pace
from imgfs.settings import MIB, Settings
from imgfs.store import Store
from imgfs.wire import Opcode

log = logging.getLogger(__name__)

_TICK_S = 0.1
# Looking for what is dead and for what is worth a compaction takes at most one part in so many of the time.
_HOLES_PART, _SURVEY_PART = 20, 100
_HOLES_S, _SURVEY_S = 0.5, 30.0
_SETTLE_S = 10.0
_TELL_S = 0.1
# Requests that read without the lock; others look again when they have it.
_READING = frozenset(
    {Opcode.OPEN, Opcode.READ, Opcode.READLINK, Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.LOOKUP, Opcode.GETATTR}
)


class Manner(NamedTuple):
    """How a store is looked after."""

    sync_interval_s: float
    retention_s: float
    live_share: float
    bytes_per_s: float


def manner_of(options: MountOptions) -> Manner:
    """Return what the *options* of a mount say about it."""
    return Manner(
        options.sync_interval_s or Settings().sync_interval_s,
        options.retention_s,
        options.compact_percent / 100,
        options.compact_rate_mib * MIB,
    )


def maintain(store: Store, manner: Manner, board: Board) -> None:
    """Look after *store*, in a process of its own, until it is killed."""
    store.after_fork()
    _Maintenance(store, manner, board).run()


class _Maintenance:
    """The work of the process."""

    def __init__(self, store: Store, manner: Manner, board: Board) -> None:
        self._store = store
        self._manner = manner
        self._board = board
        self._reclaimer = store.reclaimer(
            retention_s=manner.retention_s, live_share=manner.live_share, settle=self._settle
        )
        self._pace = Pace(manner.bytes_per_s, board.waits)
        self._told: dict[str, str] = {}
        now = time.monotonic()
        self._next_sync = now + manner.sync_interval_s
        self._next_holes = now
        self._next_survey = now + _SURVEY_S
        self._finished = False
        self._settling_s = 0.0  # of the processor, to wait for requests in hand, since the last look for what is dead

    def run(self) -> None:
        listening = control.listen(self._store.path)
        self._store.offer_room()
        while True:
            if select.select([listening], [], [], _TICK_S)[0]:
                control.answer(listening, self._command)
            self._turn()

    def _turn(self) -> None:
        """Do what is due."""
        self._sync()
        now = time.monotonic()
        asked = self._store.room_asked()
        if asked or now >= self._next_holes:
            worked_s = time.process_time()
            self._settling_s = 0.0
            self._try("space is not given back", lambda: self._punch(urgent=asked > 0))
            self._store.answer_room(asked)
            self._next_holes = time.monotonic() + self._pause_s(now, worked_s)
        self._pace.rest()
        if now >= self._next_survey:
            self._try("nothing is compacted", self._compact_all)
            self._next_survey = time.monotonic() + max(_SURVEY_S, (time.monotonic() - now) * _SURVEY_PART)

    def _pause_s(self, since: float, worked_since: float) -> float:
        """Return how long not to look for what is dead, having done so *since* then, of the processor *worked_since*.

        To wait for a disk, a processor or requests is no work: on a busy machine space would come back a minute late.
        """
        worked_s = time.process_time() - worked_since - self._settling_s
        return max(_HOLES_S, time.monotonic() - since - worked_s + worked_s * _HOLES_PART)

    def _sync(self) -> None:
        if time.monotonic() >= self._next_sync:
            self._try("sync", self._store.sync)
            self._next_sync = time.monotonic() + self._manner.sync_interval_s

    def _try(self, what: str, do: Callable[[], object]) -> None:
        try:
            do()
            self._told.pop(what, None)
        except (ImgfsError, OSError) as error:
            # It will not get better by itself; every interval the same line would only hide the others.
            if str(error) != self._told.get(what):
                self._told[what] = str(error)
                log.error("%s: %s", what, error)

    # -- space ------------------------------------------------------------------------------------------------

    def _punch(self, *, urgent: bool) -> None:
        if not self._finished:
            self._finished = self._reclaimer.finish()
        self._reclaimer.punch(urgent=urgent)

    def _compact_all(self) -> None:
        if self._manner.live_share <= 0:
            return
        while groups := self._reclaimer.worthwhile(self._reclaimer.survey()):
            self._compact(groups[0], lambda _: None)

    def _compact(self, group: list[Share], tell: Callable[[int], None]) -> tuple[int, int]:
        """Compact *group*; return how many bytes were copied, and how many that has freed."""
        before = 0

        def copied(size: int) -> None:
            nonlocal before
            self._pace.done(size - before)
            before = size
            self._sync()
            self._answer_room()
            tell(size)

        done = self._reclaimer.compact(group, copied)
        self._finished = self._reclaimer.finish()
        return before, done.volume_bytes

    def _answer_room(self) -> None:
        """Somebody waits for room, and cannot wait until a compaction is done."""
        asked = self._store.room_asked()
        if asked:
            self._try("space is not given back", lambda: self._reclaimer.punch(urgent=True))
            self._store.answer_room(asked)

    def _settle(self) -> bool:
        began = time.process_time()
        try:
            return self._wait_for_readers()
        finally:
            self._settling_s += time.process_time() - began

    def _wait_for_readers(self) -> bool:
        """Wait until every request that reads and is in hand now is answered; return whether that was so in time.

        What waits for room waits for this process, and knows nothing any more of what it has read.
        """
        requests = self._store.requests
        waiting = {
            (number, row): request
            for number in range(WORKERS_MAX)
            for row, request in requests.at_work(number).items()
            if request.opcode in _READING
        }
        deadline = time.monotonic() + _SETTLE_S
        while waiting:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
            for number in {number for number, _ in waiting}:
                now = requests.at_work(number)
                for key in [key for key in waiting if key[0] == number and now.get(key[1]) != waiting[key]]:
                    del waiting[key]
        return True

    # -- commands ---------------------------------------------------------------------------------------------

    def _command(self, question: Message, tell: Callable[[Message], None]) -> Message:
        try:
            if question.get("do") == "compact":
                return self._compact_now(question, tell)
            return {"error": f"this release cannot {question.get('do')!r}"}
        except Gone:
            raise
        except ImgfsError as error:
            return {"error": str(error), "code": error.exit_code}
        except OSError as error:
            return {"error": str(error)}

    def _compact_now(self, question: Message, tell: Callable[[Message], None]) -> Message:
        self._reclaimer.punch()
        shares = self._reclaimer.survey()
        groups = self._reclaimer.worthwhile(shares, float(question["live_share"]))
        chosen = {share.row for group in groups for share in group}
        tell({"shares": [[*share, share.row in chosen] for share in shares]})
        copied_bytes = freed = 0
        if not question["dry_run"]:
            tell_s = time.monotonic()

            def copied(size: int) -> None:
                nonlocal tell_s
                # Not of each image: that would take longer than to copy it.
                if time.monotonic() >= tell_s:
                    tell({"copied": size})
                    tell_s = time.monotonic() + _TELL_S

            for group in groups:
                done = self._compact(group, copied)
                copied_bytes, freed = copied_bytes + done[0], freed + done[1]
        return {"copied": copied_bytes, "freed": freed}
