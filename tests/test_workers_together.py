"""Several workers change one store at once and are killed at random; each request happens once, and nothing is torn."""

import os
import signal
import time
import traceback
from random import Random

import pytest
from crowd import PAUSE, Answers, Course, look_of, request_of, serve
from killed_store import new_store, on_disk
from mortal import DEADLINE_S, in_process
from stores import tree

from imgfs.format import Kind
from imgfs.requests import WORKERS_MAX
from imgfs.settings import KIB, Settings
from imgfs.store import ROOT, Store

CLIENTS = 3
# Small volumes: sealing one and beginning the next is where most can go wrong.
SETTINGS = Settings(volume_bytes_max=256 * KIB, headroom_bytes=0, checkpoint_needles=200, rest_slots=8)
# On a machine that has much else to do, workers that are killed as soon as they start would never get to an end.
KILLS_MAX = 60
SOAK = int(os.environ.get("IMGFS_SOAK", "1"))


class Crew:
    """Starts a worker for each client, and another when that was killed; does what a supervisor does."""

    def __init__(self, store: Store, directories: tuple[int, ...], last: int) -> None:
        self.store = store
        self.answers = Answers(CLIENTS)
        self.pids: dict[int, tuple[int, int]] = {}  # client -> pid, seat
        self._directories = directories
        self._last = last
        self._seats = 0

    def start(self, client: int) -> None:
        # A seat is used again only when its last worker is settled.
        seat = self._seats = (self._seats + 1) % WORKERS_MAX

        def work() -> None:
            self.store.after_fork()
            try:
                self.store.roll_forward()
                serve(self.store, client, seat, self.answers, self._directories, self._last)
            except BaseException:
                traceback.print_exc()
                raise

        self.pids[client] = in_process(work), seat

    def bury(self, client: int, seat: int) -> None:
        """Do what follows the death of a worker: the kernel sends again what was not answered."""
        with self.store.lock():  # in place of a shut gate: a living worker takes no note meanwhile
            self.store.roll_forward()
            resent = [request_of(each, self.answers.get(each)[0]) for each in range(CLIENTS)]
            again = self.store.settle(seat, [*resent, look_of(client)])
            assert {*again} <= {resent[client], look_of(client)}

    def reap(self) -> bool:
        """Replace who was killed; return whether anybody still works."""
        for client, (pid, seat) in list(self.pids.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            del self.pids[client]
            if os.WIFSIGNALED(status):
                assert os.WTERMSIG(status) == signal.SIGKILL
                self.bury(client, seat)
                self.start(client)
            else:
                assert status == 0, f"the worker of client {client} failed at request {self.answers.get(client)[0]}"
        return bool(self.pids)

    def end(self) -> None:
        for pid, _ in self.pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.answers.close()


def expected(directories: dict[int, bytes], last: int) -> dict[bytes, bytes | None]:
    """Return what all paths hold when each client has stopped behind request *last*; None for a directory."""
    paths: dict[bytes, bytes | None] = dict.fromkeys(directories.values())
    for client in range(CLIENTS):
        course = Course(client, tuple(directories))
        for number, step in enumerate(course.steps()):
            if number >= last and step is PAUSE:
                break
        for (directory, name), data in course.files.items():
            paths[directories[directory] + b"/" + name] = data
        for directory, name in course.folders:
            paths[directories[directory] + b"/" + name] = None
    return paths


def held(store: Store) -> dict[bytes, bytes | None]:
    return {path: None if found.kind == Kind.DIRECTORY else found.data for path, found in tree(store).items()}


@pytest.mark.parametrize("pause_s", [0.01, 0.03, 0.1])
def test_workers_that_are_killed_at_random(pause_s: float) -> None:
    # The longer the pauses, the more there is to do meanwhile.
    random, last = Random(pause_s), int(1000 + 20_000 * pause_s) * SOAK
    with new_store(SETTINGS) as store:
        directories = {store.mkdir(ROOT, b"d%d" % number, 0o755, 0, 0): b"/d%d" % number for number in range(2)}
        crew = Crew(store, tuple(directories), last)
        kills = 0
        deadline = time.monotonic() + DEADLINE_S * SOAK
        try:
            for client in range(CLIENTS):
                crew.start(client)
            while crew.reap():
                assert time.monotonic() < deadline, [crew.answers.get(client) for client in range(CLIENTS)]
                time.sleep(random.uniform(0, 2 * pause_s))
                if crew.pids and kills < KILLS_MAX * SOAK:
                    os.kill(crew.pids[random.choice(sorted(crew.pids))][0], signal.SIGKILL)
                    kills += 1
        finally:
            crew.end()
        assert kills
        store.roll_forward()
        wanted = expected(directories, last)
        assert held(store) == wanted
        assert store._handles.count() == 0
        assert store._staging.inodes() == []
        assert not any(store.requests.in_hand(worker) for worker in range(WORKERS_MAX))
        with on_disk(store) as twin:
            assert held(twin) == wanted
            assert not twin.report.damage
