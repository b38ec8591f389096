"""The power is cut before every step of a workload, or the process killed: the store holds what was promised.

IMGFS_SOAK=n tries n times as many random survivors, and crashes in every recovery instead of some.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import pytest
from crash_model import (
    SETTINGS,
    STORE,
    Clock,
    Workload,
    assert_promised,
    content,
    half_written,
    live_on,
    open_store,
    photo,
    recovered,
    without_index,
)
from powercut import SimulatedDisk
from snapshots import Snapshot, assert_same, plain, read_image, snapshot
from survivors import EVERYTHING, NOTHING_UNSYNCED, STRATEGIES, Survivor, by_path, random_survivor
from workloads import large_images, many_at_once, names_and_attributes, random_operations, restarts, small_images

from imgfs.format import Kind
from imgfs.saved_format import SAVED_TABLE
from imgfs.settings import Settings
from imgfs.store import ROOT, make_store

SOAK = int(os.environ.get("IMGFS_SOAK", "0"))
SEEDS = 2 * (SOAK or 1)
# Of so many different disks the recovery of one is cut again at every step, one store lives on, one loses its index.
RECOVERIES = 5 if SOAK else 101
LIVES = 1 if SOAK else 11
REBUILDS = 1 if SOAK else 5
# What takes long is done in so many parts.
PARTS = 3
LARGE = Settings(volume_bytes_max=2 << 20, headroom_bytes=0, checkpoint_needles=3)
REORDERED = {
    "index without needles": by_path(".vol", NOTHING_UNSYNCED, EVERYTHING),
    "needles without index": by_path(".vol", EVERYTHING, NOTHING_UNSYNCED),
    "records without names": by_path(".names", NOTHING_UNSYNCED, EVERYTHING),
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run(clock: Clock, operations: Callable[[Workload], None], settings: Settings = SETTINGS) -> Workload:
    work = Workload(clock, settings)
    work.record()
    operations(work)
    work.finish()
    return work


def survivors(seeds: int, step: int) -> Iterator[tuple[str, Survivor]]:
    yield from STRATEGIES.items()
    yield from REORDERED.items()
    for seed in range(seeds):
        yield f"seed {step * 1000 + seed}", random_survivor(step * 1000 + seed)


def key(disk: SimulatedDisk) -> tuple[tuple[str, bytes], ...]:
    return tuple(content(disk).items())


class Matrix:
    """Checks disks against the history of a workload; one that was seen before is not opened again."""

    def __init__(self, work: Workload, clock: Clock) -> None:
        self.work = work
        self.clock = clock
        self._seen: dict[tuple[tuple[str, bytes], ...], Snapshot] = {}

    @property
    def disks(self) -> int:
        return len(self._seen)

    def check(
        self,
        disk: SimulatedDisk,
        lowest: int,
        highest: int,
        where: str,
        *,
        durable: int | None = None,
        live: bool = False,
    ) -> None:
        """Check that the store on *disk* has one of the states *lowest* to *highest*; with *live*, let it live on.

        *durable*: not all on the disk is; if the power goes off before the recovery ends, this state is the oldest.
        """
        disk_key = key(disk)
        seen = self._seen.get(disk_key)
        if seen is not None:
            assert_promised(self.work.history, seen, lowest, highest, where)
            return
        seen = recovered(disk, self.work.settings)
        assert key(disk) == disk_key
        assert_promised(self.work.history, seen, lowest, highest, where)
        self._seen[disk_key] = seen
        if len(self._seen) % REBUILDS == 0:
            alone = recovered(without_index(disk.copy()), self.work.settings)
            assert_same(alone, seen, f"{where}, from the volumes alone")
        if len(self._seen) % RECOVERIES == 0:
            self._cut_recovery(disk, seen, where, durable, highest)
        if live or len(self._seen) % LIVES == 0:
            live_on(disk, seen, self.clock, self.work.settings)

    def _cut_recovery(self, disk: SimulatedDisk, seen: Snapshot, where: str, durable: int | None, highest: int) -> None:
        """Crash again, before each step of the recovery from *disk*."""
        again = disk.copy()
        moments: list[tuple[str, SimulatedDisk]] = []
        again.before_step = lambda what: moments.append((what, again.copy()))
        store = open_store(again, self.work.settings)
        opened = len(moments)
        store.close()
        again.before_step = None
        moments.append(("the end", again))
        checked = {key(disk)}
        for number, (what, moment) in enumerate(moments):
            for name, survivor in survivors(1, number):
                cut = moment.after_power_cut(survivor)
                if key(cut) in checked:
                    continue
                again_where = f"{where}, again before {what}, {name}"
                if durable is None or number >= opened:
                    assert_same(recovered(cut, self.work.settings), seen, again_where)
                    checked.add(key(cut))
                else:
                    then = recovered(cut, self.work.settings)
                    assert_promised(self.work.history, then, durable, highest, again_where)
            killed = moment.after_kill()
            if key(killed) not in checked or durable is not None:
                assert_same(recovered(killed, self.work.settings), seen, f"{where}, killed before {what}")
                live_on(killed, seen, self.clock, self.work.settings)


def cut_power(work: Workload, clock: Clock, seeds: int, part: int = 0, parts: int = 1) -> int:
    matrix = Matrix(work, clock)
    for cut in work.cuts[len(work.cuts) * part // parts : len(work.cuts) * (part + 1) // parts]:
        for name, survivor in survivors(seeds, cut.step):
            disk = cut.disk.after_power_cut(survivor)
            matrix.check(disk, cut.synced, cut.highest, f"{cut}, {name}")
    return matrix.disks


def kill(work: Workload, clock: Clock) -> None:
    """The machine lives on, so all that was acknowledged is there; and then the power is cut after the next sync."""
    matrix = Matrix(work, clock)
    for number, cut in enumerate(work.cuts):
        disks = [(f"killed {cut}", cut.disk.after_kill())]
        # What a sync was about to cover is what the next process has to think of.
        live = ".idx" not in cut.what and ".names" not in cut.what and "/staging/" not in cut.what
        for share in (0.1, 0.99) if cut is not work.cuts[-1] else ():
            torn = half_written(cut, work.cuts[number + 1], share)
            if torn is not None:
                disks.append((f"killed {share:.0%} through the step after {cut}", torn))
        for where, disk in disks:
            matrix.check(disk, cut.acknowledged, cut.highest, where, durable=cut.synced, live=live)


@pytest.mark.parametrize("part", range(PARTS))
def test_power_cut_before_every_step(part: int, clock: Clock) -> None:
    work = run(clock, small_images)
    volumes = [path for path in work.disk.paths() if path.endswith(".vol")]
    assert len(volumes) >= 3, "the workload should seal volumes and begin new ones"
    disks = cut_power(work, clock, SEEDS, part, PARTS)
    assert disks > len(work.cuts), "the survivors should differ"


@pytest.mark.parametrize("part", range(PARTS))
def test_power_cut_before_every_step_with_names_and_attributes(part: int, clock: Clock) -> None:
    """Further names, swapped names, special files, attributes: an exchange or a first close is whole or was not."""
    work = run(clock, names_and_attributes)
    assert len([path for path in work.disk.paths() if path.endswith(".vol")]) >= 2
    assert cut_power(work, clock, SEEDS, part, PARTS) > len(work.cuts)


def test_power_cut_before_every_step_with_many_at_once(clock: Clock) -> None:
    """Of images that were written together some may be left, in their order, each whole."""
    work = run(clock, many_at_once)
    assert len([path for path in work.disk.paths() if path.endswith(".vol")]) >= 2
    assert max(cut.in_hand for cut in work.cuts) >= 10
    assert cut_power(work, clock, SEEDS) > len(work.cuts)


def run_restarts(clock: Clock) -> Workload:
    """Stops keep the table and starts believe it."""
    work = run(clock, restarts, replace(SETTINGS, saved_slots_min=1))
    kept = [cut for cut in work.cuts if f"{STORE}/{SAVED_TABLE}" in cut.disk.paths()]
    used = [cut for cut in kept if cut.what == f"unlink {STORE}/{SAVED_TABLE}"]
    assert len(used) == 5, "each start should find the table that the stop before it has kept"
    for cut in used:
        with open_store(cut.disk.after_kill(), work.settings, writable=False) as store:
            assert store.report.replayed_needles == 0, "it should believe it"
    return work


def test_power_cut_before_every_step_of_keeping_and_using_the_table(clock: Clock) -> None:
    work = run_restarts(clock)
    assert cut_power(work, clock, SEEDS) > len(work.cuts)


def test_kill_before_every_step_of_keeping_and_using_the_table(clock: Clock) -> None:
    kill(run_restarts(clock), clock)


def run_random(clock: Clock, seed: int) -> Workload:
    small = Settings(volume_bytes_max=64 << 10, headroom_bytes=0, checkpoint_needles=8, rest_slots=seed % 3)
    return run(clock, lambda work: random_operations(work, Random(seed), 25), small)


@pytest.mark.parametrize("seed", range(SOAK or 3))
def test_power_cut_within_random_operations(seed: int, clock: Clock) -> None:
    assert cut_power(run_random(clock, seed), clock, SOAK) > 100


@pytest.mark.parametrize("seed", range(SOAK or 2))
def test_kill_within_random_operations(seed: int, clock: Clock) -> None:
    kill(run_random(clock, 100 + seed), clock)


def test_power_cut_before_every_step_with_large_images(clock: Clock) -> None:
    work = run(clock, large_images, LARGE)
    assert cut_power(work, clock, SEEDS) > 20


def test_kill_before_every_step(clock: Clock) -> None:
    kill(run(clock, small_images), clock)


def test_kill_before_every_step_with_names_and_attributes(clock: Clock) -> None:
    kill(run(clock, names_and_attributes), clock)


def test_kill_before_every_step_with_many_at_once(clock: Clock) -> None:
    kill(run(clock, many_at_once), clock)


def test_kill_before_every_step_with_large_images(clock: Clock) -> None:
    kill(run(clock, large_images, LARGE), clock)


def test_images_that_were_open(clock: Clock) -> None:
    """What was written but not flushed is forgotten, whole; what was there before is whole."""
    work = Workload(clock)
    work.create(b"/old", photo(3000, 1))
    work.create(b"/gone", photo(200, 2))
    work.sync()
    wanted = plain(work.history[-1])
    store = work.store
    overwritten = store.open_image(store.resolve(b"old"), write=True)
    store.write(overwritten, 0, photo(1000, 3))
    emptied = store.open_image(store.resolve(b"gone"), write=True, truncate=True)
    _, born = store.create_image(ROOT, b"born", 0o644, 1, 1)
    store.write(born, 0, photo(5000, 4))
    flushed_inode, flushed = store.create_image(ROOT, b"flushed", 0o640, 1, 2)
    store.write(flushed, 0, b"first")
    store.flush(flushed)
    store.write(flushed, 0, b"never flushed")
    assert read_image(store, flushed_inode) == b"never flushed"
    killed = work.disk.after_kill()
    assert plain(recovered(killed)) == wanted | {b"/flushed": (Kind.FILE, 0o640, 1, 2, b"first")}
    with open_store(killed) as again:
        assert plain(snapshot(again)) == wanted | {b"/flushed": (Kind.FILE, 0o640, 1, 2, b"first")}
        assert not [path for path in killed.paths() if "/staging/" in path], "nobody will close these"
    store.fsync(flushed)
    store.flush(emptied)
    wanted[b"/flushed"] = (Kind.FILE, 0o640, 1, 2, b"never flushed")
    assert plain(recovered(work.disk.after_power_cut(NOTHING_UNSYNCED))) == wanted
    wanted[b"/gone"] = (*wanted[b"/gone"][:4], b"")
    assert plain(recovered(work.disk.after_power_cut(EVERYTHING))) == wanted
    for handle in (overwritten, emptied, born, flushed):
        store.release(handle)
    store.close()


def test_the_order_of_an_append(clock: Clock) -> None:
    """The needle is the commit point: name and index record follow it. Nothing is durable before the sync."""
    work = Workload(clock)
    work.create(b"/a", b"defines its owner")
    work.sync()
    work.disk.trace.clear()
    work.put(b"/b", b"data", 0o644)
    work.sync()
    work.close()
    written = [what.split()[1].rpartition("/")[2] for what in work.disk.trace[:3]]
    assert written == ["00000001.vol", "00000001.names", "00000001.idx"]
    assert all(what.startswith("write ") for what in work.disk.trace[:3])
    assert work.disk.trace[3] == "sync /store/volumes/00000001.vol"


def test_a_new_store_is_durable_when_it_was_made() -> None:
    """... its name too, and whoever cuts the power earlier finds the empty store or none."""
    disk = SimulatedDisk()
    moments: list[SimulatedDisk] = []
    disk.before_step = lambda _: moments.append(disk.copy())
    make_store(STORE, SETTINGS, disk, uid=7, gid=8)
    disk.before_step = None
    wanted = {b"": (Kind.DIRECTORY, 0o755, 7, 8, None)}
    assert plain(recovered(disk.after_power_cut(NOTHING_UNSYNCED))) == wanted
    found = 0
    for moment in moments:
        for _, survivor in survivors(SEEDS, len(moments)):
            left = moment.after_power_cut(survivor)
            if left.exists(f"{STORE}/imgfs.json"):
                found += 1
                assert plain(recovered(left)) == wanted
    assert found, "the last step makes the name of the superblock durable"
