"""The supervisor: starts workers, waits, and puts another in the place of one that dies. To clients that is a pause.

Owns the processes of a mount, the signals, and the order in which it ends. Must not know requests or images: it does
nothing that can fail, or take long; what can is done by a child.

*Concurrency:* one thread, no event loop; it waits for signals, SIGCHLD among them. Children share memory with it.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import sdnotify

from imgfs import child, handover, mountpoint, ticks, wire
from imgfs.board import WORKERS_MAX, Board
from imgfs.device import Device
from imgfs.errors import EXIT_BUSY, EXIT_OK, MountFailed
from imgfs.resend import CRASH_BLAME, KILL_BLAME, Dead, Resending
from imgfs.store import Store

log = logging.getLogger(__name__)

_SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
# How often it looks whether a worker stands still.
_TICK_S = 0.25
# A mount that does not answer its own process for so long never will.
FIRST_ANSWER_S = 30.0
# Workers get so long to answer what they hold before the kernel sends it again to others, and then are killed.
_ANSWER_S = 0.1
# A worker that reads has one request to read, and to note.
_READ_S = 1.0
# What a processor has stored comes to be seen by the others within nanoseconds.
_SEEN_S = 0.001
# A worker that reads for so long is interrupted, and killed when that did not help.
_STANDSTILL_NS = 1_000_000_000
# A worker whose loop had no turn for so long is killed; those that wait for it meanwhile are none the wiser.
_NO_BEAT_NS = 60_000_000_000
# Workers in a row that died before they answered anything: there is no point in a next one.
# One that was sent SIGKILL before it served counts for a tenth of one that crashed, and later not at all: it may just
# have been chosen.
_FRUITLESS_MAX = 5
# Importing and trying take a second; a machine may be busy.
_TRIAL_S = 60.0
_ROLL_FORWARD_S = 60.0
_ROLL_FORWARD_TRIES = 3
_POLL_S = 0.0005
# When all is unmounted, workers end by themselves.
_END_S = 10.0
_SAID_BYTES_MAX = 4096


class Task(NamedTuple):
    """Something a child does for the supervisor; *then* gets its exit code, negative for a signal."""

    name: str
    then: Callable[[int], None]
    deadline: float | None


class Plan(NamedTuple):
    """What is to be supervised."""

    store: Store
    path: str
    workers: int
    grace_s: float
    """How long users of the mount may go on after SIGTERM."""
    work: Callable[[int, Board], None]
    """Be the worker of that number."""
    maintain: Callable[[Board], None] | None
    """Be the maintenance process."""
    announce: Callable[[], None]
    """Wait until the mount answers; raise MountFailed if it does not."""
    ready: Callable[[], None]
    try_upgrade: Callable[["Running", int], None]
    """In a child: become the installed release for a trial; its exit code tells whether it could take over, and that
    file why not."""
    upgrade: Callable[["Running"], None]
    """Become the installed release, which goes on; return only if that cannot be, or raise OSError."""
    status: int
    """Where `handover.tell` says what became of an upgrade."""


class Running(NamedTuple):
    """The processes of a mount, and what they share; another release can take them over."""

    board: Board
    workers: dict[int, int]
    """Number by pid."""
    maintenance: int


class Supervisor:
    """The processes of one mount."""

    def __init__(self, plan: Plan, device: Device, taken_over: Running | None = None) -> None:
        """*taken_over*: what another release has left running; its workers serve until ours are started."""
        self._plan = plan
        self._store = plan.store
        self._device = device
        running = taken_over or Running(Board(), {}, 0)
        self._resending = Resending(plan.store, device)
        self._takes_over = taken_over is not None
        self._board = running.board
        self._workers = dict(running.workers)  # pid -> number
        self._tasks: dict[int, Task] = {}
        self._maintenance = running.maintenance
        self._fruitless = 0
        self._nudged: dict[int, tuple[int, int]] = {}  # number -> since when it read, when it was interrupted
        self._stopped: dict[int, int] = {}  # number -> since when it is stopped, by SIGSTOP
        self._looked_ns = self._resumed_ns = time.monotonic_ns()
        self._oom_kills = child.oom_kills()
        self._stop_signals = 0
        self._forced_at: float | None = None
        self._ended = False
        self._failure: Exception | None = None
        self._dump = os.memfd_create("imgfs-dump", os.MFD_CLOEXEC)
        self._can_resend = wire.can_resend(device.init)
        self._said = os.memfd_create("imgfs-said", os.MFD_CLOEXEC)

    # -- its life ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the mount is gone.

        Raises:
            MountFailed: it does not answer, or one worker after the other dies.
        """
        with ticks.waiting_for(_SIGNALS, _TICK_S) as next_signal:
            try:
                self._begin()
                while not self._ended:
                    self._take_turn(next_signal())
            finally:
                self._end_all()
        if self._failure is not None:
            raise self._failure

    def _begin(self) -> None:
        if self._takes_over:
            self._take_over()
            return
        self._start_workers()
        self._start_maintenance()
        self._start_task("announcer", self._plan.announce, self._announced, FIRST_ANSWER_S)

    def _take_turn(self, number: int) -> None:
        try:
            self._on_signal(number)
            self._look_after()
        except OSError:
            # No memory or no process left for a child; the next turn tries again.
            log.exception("the supervisor of %s goes on", self._plan.path)
            time.sleep(_TICK_S)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
        elif number == mountpoint.UPGRADE:
            self._try_upgrade()
        elif number == signal.SIGUSR1:
            self._dump_state()
        elif number != ticks.TICK:
            log.info("%s: stopping", signal.Signals(number).name)
            self._stop()

    def _look_after(self) -> None:
        now = time.monotonic()
        self._interrupt_those_who_stand_still()
        self._start_workers()
        for pid, task in list(self._tasks.items()):
            if task.deadline is not None and now > task.deadline:
                os.kill(pid, signal.SIGKILL)
        if self._forced_at is not None and now > self._forced_at:
            log.warning("somebody still uses what was mounted at %s; stopping all the same", self._plan.path)
            self._ended = True

    # -- children ---------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        taken = set(self._workers.values())
        number = next(number for number in range(WORKERS_MAX) if number not in taken)
        self._board.posts[number].clear()
        self._store.requests.clear(number)
        pid = child.fork(f"worker {number}", lambda: self._plan.work(number, self._board), self._dump)
        self._workers[pid] = number

    def _start_workers(self) -> None:
        while not self._ended and len(self._workers) < self._plan.workers:
            self._start_worker()

    def _start_maintenance(self) -> None:
        maintain = self._plan.maintain
        if maintain is not None:
            self._maintenance = child.fork("maintenance", lambda: maintain(self._board), self._dump)

    def _start_task(
        self, name: str, work: Callable[[], None], then: Callable[[int], None], patience_s: float | None = None
    ) -> None:
        deadline = None if patience_s is None else time.monotonic() + patience_s
        os.ftruncate(self._said, 0)
        self._tasks[child.fork(name, work, self._dump, self._said)] = Task(name, then, deadline)

    def _reap(self) -> None:
        dead = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            code = os.waitstatus_to_exitcode(status)
            if pid in self._workers:
                if self._device.is_dead():
                    del self._workers[pid]
                    self._ended = True
                else:
                    dead.append(self._bury(self._workers[pid], pid, code))
            elif pid == self._maintenance:
                self._maintenance = 0
                log.error("the maintenance process (%d) %s; starting another", pid, child.died(code))
                self._start_maintenance()
            elif pid in self._tasks:
                self._tasks.pop(pid).then(code)
        if dead and not self._ended:
            self._replace(dead)

    def _bury(self, number: int, pid: int, code: int) -> Dead:
        """Say how a worker died, and note whether it was of any use."""
        del self._workers[pid]
        post = self._board.posts[number]
        in_hand = [request for _, request, _ in self._store.requests.in_hand(number)]
        log.error("worker %d (process %d) %s, %s", number, pid, child.died(code), wire.describe_all(in_hand))
        before, self._oom_kills = self._oom_kills, child.oom_kills()
        blame = KILL_BLAME if code == -signal.SIGKILL and self._oom_kills == before else CRASH_BLAME
        chosen = blame == KILL_BLAME and post.ready
        self._fruitless = 0 if post.answered else self._fruitless + (0 if chosen else blame)
        self._nudged.pop(number, None)
        self._stopped.pop(number, None)
        if self._fruitless >= _FRUITLESS_MAX * CRASH_BLAME:
            self._failure = MountFailed(
                f"{_FRUITLESS_MAX} workers in a row died before they had answered a single request; the last one "
                f"{child.died(code)}; {self._plan.path} is not served any more"
            )
            self._ended = True
        return Dead(number, blame)

    # -- a death ----------------------------------------------------------------------------------------------

    def _replace(self, dead: list[Dead]) -> None:
        """Settle what *dead* workers had in hand, and start others in their place."""
        since = time.monotonic()
        try:
            self._shut_gate(dead)
            self._wait_for_answers(dead)
            for _ in range(_ROLL_FORWARD_TRIES):
                if self._roll_forward():
                    break
            reply = self._board.init_reply
            if self._can_resend and reply:
                self._resending.settle(dead, wire.max_write(reply))
            else:
                for number, _ in dead:
                    self._store.settle(number, [])
        except Exception:
            if self._device.is_dead():
                self._ended = True
            else:
                log.exception("not all that dead workers had in hand was settled; it is sent again all the same")
                with contextlib.suppress(OSError):
                    self._device.resend()
        finally:
            self._board.paused = False
        self._start_workers()
        log.info(
            "%d of %d workers replaced in %.0f ms", len(dead), self._plan.workers, (time.monotonic() - since) * 1e3
        )

    def _shut_gate(self, dead: list[Dead]) -> None:
        """Keep all workers from reading; kill those that do not end with it."""
        for number in self._still_reading():
            self._kill(number, dead, "it read for too long")

    def _still_reading(self) -> list[int]:
        """Shut the gate; return the workers that have not noted before long what they were reading."""
        self._board.paused = True
        time.sleep(_SEEN_S)
        deadline, posts = time.monotonic() + _READ_S, self._board.posts
        while reading := [number for number in self._workers.values() if posts[number].reading_since_ns]:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        return reading

    def _wait_for_answers(self, dead: list[Dead]) -> None:
        """Let the living answer what they hold; kill those that take too long, their requests are sent again."""
        deadline = time.monotonic() + _ANSWER_S
        busy = self._store.requests.busy
        while any(map(busy, self._workers.values())) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self._collect(dead)
        for number in list(self._workers.values()):
            if busy(number):
                self._kill(number, dead, "it took too long to answer while another was replaced")

    def _collect(self, dead: list[Dead]) -> None:
        """Add the workers that have died meanwhile to *dead*."""
        for pid, number in list(self._workers.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                dead.append(self._bury(number, pid, os.waitstatus_to_exitcode(status)))

    def _kill(self, number: int, dead: list[Dead], why: str) -> None:
        pid = next(pid for pid, its_number in self._workers.items() if its_number == number)
        requests = [request for _, request, _ in self._store.requests.in_hand(number)]
        log.warning("worker %d (process %d) is killed: %s, %s", number, pid, why, wire.describe_all(requests))
        os.kill(pid, signal.SIGKILL)
        child.wait(pid)
        del self._workers[pid]
        dead.append(Dead(number, 0))

    def _roll_forward(self) -> bool:
        """Have half-applied changes carried on or undone by a child; return whether it could."""
        try:
            pid = child.fork("roll forward", self._carry_on, self._dump)
        except OSError:
            # Without a child it may take long, or fail; without it a change could be lost or be done twice.
            self._store.roll_forward()
            return True
        code = child.wait(pid, _ROLL_FORWARD_S)
        if code != EXIT_OK:
            log.error(
                "what dead workers left half done was not carried on: the process that tried %s", child.died(code)
            )
        return code == EXIT_OK

    def _carry_on(self) -> None:
        self._store.after_fork()
        self._store.roll_forward()

    # -- standing still ---------------------------------------------------------------------------------------

    def _interrupt_those_who_stand_still(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns - self._looked_ns > _STANDSTILL_NS:
            self._resumed_ns = now_ns  # we stood still, too: all of us were frozen, and workers had no turn either
        self._looked_ns = now_ns
        for pid, number in self._workers.items():
            post = self._board.posts[number]
            # It may hold the lock of the store, and all others wait for that.
            stopped_since = (
                self._stopped.setdefault(number, now_ns) if child.is_stopped(pid) else self._stopped.pop(number, 0)
            )
            if stopped_since and now_ns - max(stopped_since, self._resumed_ns) > _STANDSTILL_NS:
                log.warning("worker %d (process %d) was stopped by a signal; it is killed", number, pid)
                os.kill(pid, signal.SIGKILL)
                continue
            since_ns = post.reading_since_ns
            if since_ns and now_ns - since_ns > _STANDSTILL_NS:
                nudged_for_ns, nudged_ns = self._nudged.get(number, (0, 0))
                if nudged_for_ns != since_ns:
                    # A request that vanished after it was announced: the read waits for the next, and all wait for it.
                    self._nudged[number] = since_ns, now_ns
                    log.info("worker %d (process %d) stands still while it reads; it is interrupted", number, pid)
                    os.kill(pid, child.NUDGE)
                elif now_ns - max(nudged_ns, self._resumed_ns) > _STANDSTILL_NS:
                    log.warning("worker %d (process %d) stands still while it reads; it is killed", number, pid)
                    os.kill(pid, signal.SIGKILL)
            elif post.beat_ns and now_ns - max(post.beat_ns, self._resumed_ns) > _NO_BEAT_NS:
                log.warning("worker %d (process %d) has stood still for a minute; it is killed", number, pid)
                os.kill(pid, signal.SIGKILL)
                return

    def _dump_state(self) -> None:
        """Log what every process is doing."""
        for pid, number in self._workers.items():
            post = self._board.posts[number]
            requests = [request for _, request, _ in self._store.requests.in_hand(number)]
            reads = ", reads" if post.reading_since_ns else ""
            in_hand = wire.describe_all(requests)
            log.info("worker %d (process %d): %d answered, %s%s", number, pid, post.answered, in_hand, reads)
            self._dump_stacks(pid)
        if self._maintenance:
            log.info("maintenance (process %d)", self._maintenance)
            self._dump_stacks(self._maintenance)

    def _dump_stacks(self, pid: int) -> None:
        for line in child.stacks(pid, self._dump):
            log.info("  %s", line)

    # -- an upgrade -------------------------------------------------------------------------------------------

    def _running(self) -> Running:
        return Running(self._board, dict(self._workers), self._maintenance)

    def _try_upgrade(self) -> None:
        """Let the installed release try in a child whether it could take over."""
        if self._tasks or self._stop_signals or not self._board.init_reply:
            self._refuse_upgrade("it starts, ends, or tries an upgrade just now; try again")
            return
        log.info("SIGHUP: trying the installed release")
        now_us = time.monotonic_ns() // 1000
        sdnotify.SystemdNotifier().notify(f"RELOADING=1\nMONOTONIC_USEC={now_us}")
        self._start_task("trial", lambda: self._plan.try_upgrade(self._running(), self._said), self._tried, _TRIAL_S)

    def _tried(self, code: int) -> None:
        if code != EXIT_OK:
            said = os.pread(self._said, _SAID_BYTES_MAX, 0).decode(errors="replace").strip()
            self._refuse_upgrade(said.rpartition("\n")[2] or child.died(code))
            return
        log.info("the installed release takes over")
        logging.shutdown()
        try:
            self._plan.upgrade(self._running())
        except OSError as error:
            self._refuse_upgrade(str(error))

    def _refuse_upgrade(self, reason: str) -> None:
        log.error("the old release goes on, the installed one cannot take over: %s", reason)
        handover.tell(self._plan.status, reason)
        sdnotify.SystemdNotifier().notify("READY=1")

    def _take_over(self) -> None:
        """Put workers of this release in the place of those of the old one."""
        since = time.monotonic()
        self._reap()
        dead: list[Dead] = []
        self._shut_gate(dead)
        self._wait_for_answers(dead)
        for pid in [*self._workers, *([self._maintenance] if self._maintenance else [])]:
            os.kill(pid, signal.SIGKILL)
            child.wait(pid)
        self._workers.clear()
        self._replace(dead)
        self._start_maintenance()
        log.info("taken over in %.0f ms", (time.monotonic() - since) * 1e3)
        handover.tell(self._plan.status, "")
        sdnotify.SystemdNotifier().notify("READY=1")

    # -- the end ----------------------------------------------------------------------------------------------

    def _announced(self, code: int) -> None:
        if code == EXIT_OK:
            log.info("mounted at %s", self._plan.path)
            self._plan.ready()
            sdnotify.SystemdNotifier().notify("READY=1")
            return
        if self._failure is None:
            said = os.pread(self._said, _SAID_BYTES_MAX, 0).decode()
            self._failure = MountFailed(
                said or f"the mount at {self._plan.path} does not answer: who asked {child.died(code)}"
            )
        self._ended = True

    def _stop(self) -> None:
        """Unmount; at the second call, end at once."""
        self._stop_signals += 1
        if self._stop_signals > 1:
            self._ended = True
            return
        sdnotify.SystemdNotifier().notify("STOPPING=1")
        path = self._plan.path
        self._start_task("unmount", lambda: mountpoint.take_away(path), self._unmounted)

    def _unmounted(self, code: int) -> None:
        # The kernel ends the connection when all is answered. If not, a container has a copy of the mount.
        if code == EXIT_BUSY:
            path = self._plan.path
            log.warning("%s is in use; its users have %g s to finish", path, self._plan.grace_s)
            self._start_task("unmount", lambda: mountpoint.take_away(path, lazy=True), lambda _: None)
        elif code != EXIT_OK:
            log.warning(
                "%s", os.pread(self._said, _SAID_BYTES_MAX, 0).decode() or f"who should unmount {child.died(code)}"
            )
        self._forced_at = time.monotonic() + self._plan.grace_s

    def _end_all(self) -> None:
        """End every child: workers when they have answered what they hold."""
        self._board.paused = True
        deadline = time.monotonic() + _END_S
        if not self._device.is_dead():
            self._still_reading()
            deadline = time.monotonic() + _READ_S
        while any(map(self._store.requests.busy, self._workers.values())):
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        for pid in [*self._workers, *self._tasks, *([self._maintenance] if self._maintenance else [])]:
            os.kill(pid, signal.SIGKILL)
            child.wait(pid)
