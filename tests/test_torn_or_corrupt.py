"""Planted damage below the durable mark costs one image and is reported; bad bytes above the mark are torn, not damage.

IMGFS_SOAK=1 tries every byte of every needle where some are tried otherwise.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from crash_model import SETTINGS, VOLUMES, Clock, Workload, needles, open_store, photo, without_index
from damage_model import (
    SOAK,
    At,
    Sample,
    check_error,
    check_one_lost,
    closed_store,
    flips,
    killed_store,
    replay,
    sample_of,
    without_bytes,
)
from powercut import SimulatedDisk
from snapshots import Snapshot, assert_same, snapshot
from survivors import EVERYTHING
from workloads import names_and_attributes

from imgfs.errors import Damaged
from imgfs.format import PUT_KINDS, Kind, Needle
from imgfs.settings import Settings
from imgfs.store import ROOT
from imgfs.survey import Damage
from imgfs.volume import Volume

# What the table points at.
NEEDED = PUT_KINDS - {Kind.DIRECTORY} | {Kind.XATTR}


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patch:
        yield Clock(patch)


@pytest.fixture(scope="module")
def closed(clock: Clock) -> Sample:
    return closed_store(clock)


@pytest.fixture(scope="module")
def killed(clock: Clock) -> Sample:
    return killed_store(clock)


@pytest.fixture(scope="module")
def names_closed(clock: Clock) -> Sample:
    return closed_store(clock, names_and_attributes)


@pytest.fixture(scope="module")
def names_killed(clock: Clock) -> Sample:
    return killed_store(clock, names_and_attributes)


# -- below the mark -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["header", "name", "data", "footer"])
@pytest.mark.parametrize("what", ["closed", "names_closed"])
def test_with_the_index_damage_is_an_error_of_one_image(what: str, part: str, request: pytest.FixtureRequest) -> None:
    """The header, the data or the footer: only who opens that image, or reads its attributes, learns of it."""
    closed: Sample = request.getfixturevalue(what)
    concerned = 0
    for at in closed.needles:
        wanted, owner = without_bytes(closed, at)
        for offset in flips(closed, at, part, 0):
            disk = closed.disk.copy()
            disk.flip(at.path, offset, 0x10)
            where = f"{at.path}, {Kind(at.needle.kind).name} at {at.offset}, {part} byte {offset}"
            concerned += bool(owner)
            for writable in (False, True):
                with open_store(disk, writable=writable) as store:
                    assert_same(snapshot(store, damaged=True), wanted, where)
                    for path in owner:
                        check_error(store, path, at)
    assert concerned >= 3


@pytest.mark.parametrize("part", ["header", "data"])
@pytest.mark.parametrize("what", ["closed", "names_closed"])
def test_a_check_names_what_is_damaged(what: str, part: str, request: pytest.FixtureRequest) -> None:
    """Of bytes and attributes that are still needed it says whose they are; of all else where it is."""
    closed: Sample = request.getfixturevalue(what)
    last = {(at.needle.inode, at.needle.kind == Kind.XATTR): at for at in closed.needles if at.needle.kind in NEEDED}
    told = replay(closed.needles).inodes
    named = set()
    for at in closed.needles:
        offset = next(iter(at.parts()[part]), None)
        if offset is None or at is closed.needles[-1]:  # a damaged seal or last checkpoint is another matter
            continue
        disk = closed.disk.copy()
        disk.flip(at.path, offset)
        inode = at.needle.inode
        is_xattr = at.needle.kind == Kind.XATTR
        needed = inode in told and last.get((inode, is_xattr)) is at and (not is_xattr or at.needle.data_size > 0)
        with open_store(disk, writable=False) as store:
            found = [item for item in store.check() if isinstance(item, Damage)]
        assert [(item.volume, item.offset) for item in found] == [(at.volume_id, at.offset)]
        assert found[0].inode == (inode if needed else 0), f"{Kind(at.needle.kind).name}: {found[0]}"
        if needed:
            assert ("extended attributes" in found[0].text) == is_xattr
            named.add(Kind(at.needle.kind))
    expected = {Kind.FILE}
    if what == "names_closed":
        expected |= {Kind.XATTR} | ({Kind.LINK, Kind.SPECIAL} if part == "header" else set())
    assert named >= expected


@pytest.fixture(params=["closed", "killed", "names_closed", "names_killed"])
def sample(request: pytest.FixtureRequest) -> Sample:
    found: Sample = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("part", ["header", "name"])
def test_without_the_index_a_damaged_header_costs_one_image(sample: Sample, part: str) -> None:
    """... and is reported; a directory's children are under /lost+found-INODE; an owner's needle costs nothing."""
    for at in sample.below_mark():
        for offset in flips(sample, at, part, 1):
            disk = without_index(sample.disk.copy())
            disk.flip(at.path, offset, 0x10)
            where = f"{at.path}, {Kind(at.needle.kind).name} at {at.offset}, {part} byte {offset}"
            check_one_lost(sample, disk, at, where)


@pytest.mark.parametrize("part", ["data", "footer"])
def test_without_the_index_damaged_data_costs_one_image(sample: Sample, part: str) -> None:
    for at in sample.below_mark():
        for offset in flips(sample, at, part, 2):
            disk = without_index(sample.disk.copy())
            disk.flip(at.path, offset, 0x10)
            wanted, owner = without_bytes(sample, at)
            with open_store(disk) as store:
                assert_same(snapshot(store, damaged=True), wanted, f"{at.path}, {part} at {at.offset}, byte {offset}")
                assert not store.report.torn_bytes
                for path in owner:
                    check_error(store, path, at)


def test_damage_in_a_large_image(clock: Clock) -> None:
    """In one above 4 MiB a damaged MiB is found when it is read; the others are served."""
    mib = 1 << 20
    settings = Settings(volume_bytes_max=16 * mib, headroom_bytes=0)
    work = Workload(clock, settings)
    data = photo(5 * mib + 100, 1)
    work.put(b"/large", data)
    work.create(b"/small", b"small")
    work.close()
    sample = sample_of(work)
    (at,) = [at for at in sample.needles if at.needle.name == b"large"]
    disk = sample.disk.copy()
    disk.flip(at.path, at.parts()["data"][2 * mib + 77])
    with open_store(disk, settings) as store:
        handle = store.open_image(store.resolve(b"large"))
        for start in range(0, len(data), mib // 2):
            if 2 * mib <= start < 3 * mib:
                with pytest.raises(Damaged, match=f"offset {at.offset}"):
                    store.read(handle, start, mib // 2)
            else:
                assert store.read(handle, start, mib // 2) == data[start : start + mib // 2]
        store.release(handle)
        assert snapshot(store, damaged=True)[b"/small"].data == b"small"


# -- at and above the mark ----------------------------------------------------------------------------------------


class Tail(NamedTuple):
    """A store whose last needles were never synced, and all of which survived."""

    disk: SimulatedDisk
    needles: list[At]
    durable: int
    history: list[Snapshot]
    synced: int


@pytest.fixture(scope="module")
def unsynced(clock: Clock) -> Tail:
    work = Workload(clock)
    work.mkdir(b"/d")
    work.create(b"/d/synced", photo(900, 1))
    work.sync()
    synced = work.acknowledged
    for number in range(3):
        work.create(b"/d/%d" % number, photo(700 + number, number))
    work.rename(b"/d/1", b"/one")
    work.overwrite(b"/d/synced", photo(400, 7))
    work.unlink(b"/d/2")
    disk = work.disk.after_power_cut(EVERYTHING)
    found = [At(path, offset, needle) for path, offset, needle in needles(disk) if isinstance(needle, Needle)]
    return Tail(disk, found, max(at.needle.durable for at in found), work.history, synced)


def changing(tail: Tail) -> list[At]:
    """Return the unsynced needles that are operations, in their order."""
    return [at for at in tail.needles if at.offset >= tail.durable and at.needle.kind != Kind.OWNER]


def test_above_the_mark_the_log_ends_at_the_first_bad_needle(unsynced: Tail) -> None:
    above = changing(unsynced)
    assert len(above) == len(unsynced.history) - 1 - unsynced.synced
    for number, at in enumerate(above):
        for part in ("header", "name", "data", "footer"):
            for offset in at.parts()[part][:: 1 if SOAK else 101]:
                disk = unsynced.disk.copy()
                disk.flip(at.path, offset)
                where = f"{Kind(at.needle.kind).name} at {at.offset}, {part}"
                check_torn(disk, at, unsynced.history[unsynced.synced + number], where)


def volumes(disk: SimulatedDisk) -> dict[str, bytes]:
    return {path: disk.content(path) for path in disk.paths() if path.endswith(".vol")}


def check_torn(disk: SimulatedDisk, at: At, wanted: Snapshot, where: str, damaged: tuple[int, ...] = ()) -> None:
    """Check that the log ends before *at*, that nothing is cut, and that who comes later finds the same."""
    volume = disk.content(at.path)
    with open_store(disk, writable=False) as reader:
        assert_same(snapshot(reader), wanted, where)
    with open_store(disk) as store:
        assert_same(snapshot(store), wanted, where)
        assert store.report.torn_bytes == len(volume) - at.offset, where
        assert [damage.offset for damage in store.report.damage] == list(damaged)
        store.mkdir(ROOT, b"later", 0o755, 0, 0)
        seen = snapshot(store)
    assert disk.content(at.path) == volume, f"{where}: the torn volume was changed"
    following = Volume.open(disk, f"{VOLUMES}/00000002.vol")
    assert following.header.previous is not None
    assert following.header.previous.volume_id == 1
    assert following.header.previous.index_state.end == at.offset, where
    assert following.header.previous.torn_bytes == len(volume) - at.offset, where
    for index in (True, False):
        again = disk.copy() if index else without_index(disk.copy())
        before = volumes(again)
        with open_store(again) as store:
            assert_same(snapshot(store), seen, f"{where}, a later start")
            assert not store.report.torn_bytes
            # What a checkpoint vouches for is not looked at again.
            assert [damage.offset for damage in store.report.damage] == list(() if index else damaged), where
        assert volumes(again) == before, f"{where}: a later start wrote something"


def test_the_last_durable_needle_is_damaged_and_the_next_is_torn(unsynced: Tail) -> None:
    """Bad bytes on both sides of the mark: those below are damage, those above are torn."""
    below = [at for at in unsynced.needles if at.end == unsynced.durable][-1]
    first = next(at for at in unsynced.needles if at.offset == unsynced.durable)
    assert below.needle.kind == Kind.FILE
    disk = without_index(unsynced.disk.copy())
    disk.flip(below.path, below.offset)
    disk.flip(first.path, first.offset)
    wanted = {path: node for path, node in unsynced.history[unsynced.synced].items() if path != b"/d/synced"}
    with open_store(disk.copy(), writable=False) as reader:
        seen = snapshot(reader)
    assert seen.keys() == wanted.keys()
    check_torn(disk, first, seen, "both sides of the mark", (below.offset,))


def test_a_number_is_not_given_again(unsynced: Tail) -> None:
    """Sequence numbers of torn needles are skipped, so that inode and sequence tell every change there ever was."""
    first = changing(unsynced)[0]
    for path in [path for path in unsynced.disk.paths() if path.endswith(".vol")]:
        disk = unsynced.disk.copy()
        disk.flip(path, first.offset)
        with open_store(disk) as store:
            store.mkdir(ROOT, b"later", 0o755, 0, 0)
        torn = {at.needle.sequence for at in unsynced.needles if at.offset > first.offset}
        assert torn
        later = {n.sequence for path, _, n in needles(disk) if isinstance(n, Needle) and path.endswith("2.vol")}
        assert min(later) > max(torn)


def test_sequence_numbers_rise_where_the_index_covers_all(clock: Clock) -> None:
    """All that is whole is in the index, and what follows is torn: no needle is read that tells the last number."""
    work = Workload(clock)
    for number in range(SETTINGS.checkpoint_needles):
        work.create(b"/%d" % number, photo(50, number))
    work.sync()
    disk = work.disk.after_power_cut(EVERYTHING)
    (*_, last, checkpoint) = [At(p, offset, n) for p, offset, n in needles(disk) if isinstance(n, Needle)]
    assert checkpoint.needle.kind == Kind.CHECKPOINT
    file = disk.open(checkpoint.path, writable=True)
    disk.write(file, disk.size(file), [b"\1" * 100])
    disk.close(file)
    with open_store(disk) as store:
        assert_same(snapshot(store), work.history[-1], "behind a checkpoint")
        assert store.report.torn_bytes == 100
        store.mkdir(ROOT, b"later", 0o755, 0, 0)
    later = [n.sequence for path, _, n in needles(disk) if isinstance(n, Needle) and path.endswith("2.vol")]
    assert min(later) > checkpoint.needle.sequence > last.needle.sequence


def test_a_volume_that_was_cut_short_is_reported(closed: Sample) -> None:
    """A sealed volume ends with its seal: where even whole needles are missing at its end, that is no clean end."""
    path = f"{VOLUMES}/00000001.vol"
    first = [at for at in closed.needles if at.path == path]
    for at in first[len(first) // 2 :]:
        disk = closed.disk.copy()
        file = disk.open(path, writable=True)
        disk.truncate(file, at.offset)
        disk.close(file)
        with open_store(disk, writable=False) as store:
            assert [damage.volume for damage in store.report.damage] == [1], at.offset
            snapshot(store, damaged=True)
