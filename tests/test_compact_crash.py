"""The power is cut, or the process killed, before every step of giving space back: the tree stays what it was."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from compacted import assert_sound, assert_tidy, reclaim
from crash_model import (
    Clock,
    Cut,
    Workload,
    assert_promised,
    content,
    half_written,
    open_store,
    photo,
    recovered,
    without_index,
)
from powercut import SimulatedDisk
from snapshots import Snapshot, assert_same, snapshot
from survivors import STRATEGIES, Survivor, random_survivor
from workloads import names_and_attributes, small_images

from imgfs.format import Kind
from imgfs.store import Store

SEEDS = 1
LOSSES = ("NOTHING_UNSYNCED", "EVERYTHING", "NAMES_ONLY", "CONTENT_ONLY", "FIRST_HALF")
# Of so many different disks one is rebuilt from the volumes alone, and of one the rest of the work is done.
REBUILDS = 10


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def hold_some(work: Workload) -> dict[int, bytes]:
    """Unlink, replace and overwrite images that are open; return for each handle what must be read by it."""
    chosen: dict[int, bytes] = {}
    for path, thing in sorted(work.model.items()):
        if thing.kind == Kind.FILE and thing.data:
            chosen.setdefault(id(thing), path)
    unlinked, replaced, overwritten = list(chosen.values())[:3]
    held = {}
    for path in (unlinked, replaced, overwritten):
        held[work.store.open_image(work.store.resolve(path))] = work.model[path].data or b""
    work.unlink(unlinked)
    work.create(b"/instead", photo(6000, 70))
    work.rename(b"/instead", replaced)
    work.overwrite(overwritten, photo(7000, 71))
    return held | {list(held)[2]: photo(7000, 71)}


def unsynced_end(work: Workload) -> None:
    """Take away what lies in a volume long sealed, and add something; no sync covers either."""
    work.unlink(next(path for path in sorted(work.model) if path.startswith(b"/large")))
    work.create(b"/unsynced%d" % len(work.history), photo(3000, 80))


WORKLOADS = {
    "images": small_images,
    "names and attributes": names_and_attributes,
}


@dataclass
class Run:
    """A workload, and all that was seen on the disk while the space of what it left was given back."""

    work: Workload
    cuts: list[Cut]
    holes: int
    volumes: int


def run(clock: Clock, name: str) -> Run:
    work = Workload(clock)
    for number in range(3):
        work.create(b"/image%d" % number, photo(5000, 60 + number), attributes=((b"user.n", photo(90, number)),))
        work.put(b"/large%d" % number, photo(13_000, 50 + number))
    WORKLOADS[name](work)
    for number in range(3):
        work.create(b"/late%d" % number, photo(6000, 40 + number))
    held = hold_some(work)
    for number in range(4):  # whatever else: the last volumes are sealed
        work.put(b"/filler%d" % number, photo(20_000, 90 + number))
    work.unlink(b"/filler1")
    work.sync()
    unsynced_end(work)
    assert {handle: read(work.store, handle) for handle in held} == held
    work.record()
    compacted = reclaim(work.store, holes=False)
    unsynced_end(work)
    punched = reclaim(work.store)
    work.disk.before_step = None
    assert snapshot(work.store) == work.history[-1]
    assert {handle: read(work.store, handle) for handle in held} == held
    assert_tidy(work.store)
    assert_sound(work.store)
    work.cuts.append(Cut(work.disk.steps, "the end", work.disk.copy(), work.acknowledged, work.synced))
    return Run(work, list(of_interest(work.cuts)), punched.holes, compacted.volumes)


def read(store: Store, handle: int) -> bytes:
    return bytes(store.read(handle, 0, 1 << 20))


def of_interest(cuts: list[Cut]) -> Iterator[Cut]:
    """Yield all cuts but those in the middle of copying one needle after another: they leave the same."""
    copying = 0
    for cut in cuts:
        copying = copying + 1 if cut.what.startswith("write") and ".vol.copy" in cut.what else 0
        if copying < 2 or copying % 32 == 0:
            yield cut


class Checker:
    """Opens what a crash left: the tree must be the one that was promised, and the rest of the work gets done."""

    def __init__(self, run: Run) -> None:
        self._work = run.work
        self._seen: dict[tuple[tuple[str, bytes], ...], Snapshot] = {}

    @property
    def disks(self) -> int:
        return len(self._seen)

    def check(self, disk: SimulatedDisk, lowest: int, where: str, *, live: bool = False) -> None:
        key = tuple(content(disk).items())
        history = self._work.history
        highest = len(history) - 1
        if key in self._seen:
            assert_promised(history, self._seen[key], lowest, highest, where)
            return
        seen = recovered(disk)
        assert_promised(history, seen, lowest, highest, where)
        self._seen[key] = seen
        turn = len(self._seen) % REBUILDS
        if turn == 1 or live:
            assert_same(recovered(without_index(disk.copy())), seen, f"{where}, from the volumes alone")
        if turn == 2 or live:
            self._do_the_rest(disk, seen, where)

    def _do_the_rest(self, disk: SimulatedDisk, seen: Snapshot, where: str) -> None:
        store = open_store(disk)
        assert_same(snapshot(store), seen, f"{where}, by a writer")
        assert_tidy(store)
        reclaim(store)
        assert_same(snapshot(store), seen, f"{where}, when the next one has done the rest")
        assert_tidy(store)
        assert_sound(store)
        store.close()
        assert_same(recovered(without_index(disk)), seen, f"{where}, done, and from the volumes alone")


def survivors(step: int) -> Iterator[tuple[str, Survivor]]:
    yield from ((name, STRATEGIES[name]) for name in LOSSES)
    for seed in range(SEEDS):
        yield f"seed {step * 1000 + seed}", random_survivor(step * 1000 + seed)


@pytest.mark.parametrize("name", WORKLOADS)
def test_power_cut_before_every_step(name: str, clock: Clock) -> None:
    done = run(clock, name)
    assert done.holes
    assert done.volumes > 1
    checker = Checker(done)
    for cut in done.cuts:
        for survivor_name, survivor in survivors(cut.step):
            checker.check(cut.disk.after_power_cut(survivor), cut.synced, f"{cut}, {survivor_name}")
    assert checker.disks > 50


@pytest.mark.parametrize("name", WORKLOADS)
def test_kill_before_every_step(name: str, clock: Clock) -> None:
    done = run(clock, name)
    checker = Checker(done)
    for number, (cut, following) in enumerate(itertools.zip_longest(done.cuts, done.cuts[1:])):
        live = number % 4 == 0 or "rename" in cut.what or "unlink" in cut.what
        checker.check(cut.disk.after_kill(), cut.acknowledged, f"killed {cut}", live=live)
        if following is not None and following.step == cut.step + 1:
            torn = half_written(cut, following, 0.5)
            if torn is not None:
                checker.check(torn, cut.acknowledged, f"killed halfway through the step after {cut}")
    assert checker.disks > 10
