"""A snapshot is there whole or not, whenever the power goes off, the disk refuses a call, or is too small."""

import errno
import itertools
from collections.abc import Iterator

import pytest
from copied import BOTH, TARGET, Tree, files_of, fill, filled_store, take, tree_at
from powercut import PowerCut, SimulatedDisk
from stores import abandon_all, disk_of, new_store, tree
from survivors import EVERYTHING, STRATEGIES

from imgfs.cloning import Reflink
from imgfs.errors import DiskFailure, ImgfsError, StoreFull
from imgfs.snapshot import UNFINISHED
from imgfs.store import Store


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


@pytest.fixture
def store() -> Store:
    return filled_store()


def cuts(disk: SimulatedDisk, reflink: Reflink) -> list[tuple[str, SimulatedDisk]]:
    """Return the disk before each step of a snapshot, and what the step is."""
    found: list[tuple[str, SimulatedDisk]] = []
    disk.before_step = lambda what: found.append((what, disk.copy()))
    take(disk, reflink)
    disk.before_step = None
    found.append(("the end", disk))
    return found


def check_cut(disk: SimulatedDisk, wanted: Tree, before: dict[str, bytes], reflink: Reflink, where: str) -> bool:
    """Check what is left after a cut; return whether the snapshot is there. The next one must succeed."""
    assert files_of(disk) == before, where
    there = disk.exists(TARGET)
    if not there:
        take(disk, reflink)
    assert not disk.exists(TARGET + UNFINISHED), where
    assert tree_at(disk) == wanted, where
    assert files_of(disk) == before, where
    return there


@BOTH
def test_power_goes_off_before_any_step(reflink: Reflink) -> None:
    store = new_store()
    fill(store, 9)
    wanted = tree(store)
    store.close()
    # Of the store itself nothing is at stake.
    disk = disk_of(store).after_power_cut(EVERYTHING)
    before = files_of(disk)
    all_cuts = cuts(disk, reflink)
    assert len(all_cuts) > 40
    for name, survivor in STRATEGIES.items():
        there = [
            check_cut(disk.after_power_cut(survivor), wanted, before, reflink, f"{name}, before {what}")
            for what, disk in all_cuts
        ]
        assert there[-1], name
    for what, disk in all_cuts:
        check_cut(disk.after_kill(), wanted, before, reflink, f"killed before {what}")


@BOTH
@pytest.mark.parametrize(("number", "refusal"), [(errno.ENOSPC, StoreFull), (errno.EIO, DiskFailure)])
def test_the_disk_refuses_any_call(reflink: Reflink, number: int, refusal: type[ImgfsError]) -> None:
    store = new_store()
    fill(store, 9)
    wanted = tree(store)
    store.close()
    before = files_of(disk_of(store))
    refused = 0
    for method in ("mkdir", "open", "clone", "write", "truncate", "sync", "sync_directory", "rename", "names", "read"):
        for after in itertools.count():
            disk = disk_of(store).after_kill()
            disk.fail_next(method, number, after=after)
            said = ""
            try:
                take(disk, reflink)
            except refusal as error:
                said = str(error)
            if disk._faults[0].times:
                break  # so many calls there are not
            refused += 1
            where = f"{method} {after}: {said}"
            assert said.startswith(f"there is no room for the snapshot {TARGET};") or number == errno.EIO, where
            assert files_of(disk) == before, where
            if disk.exists(TARGET):
                assert tree_at(disk) == wanted, where
            else:
                assert disk.paths() == sorted(before), where
    assert refused > 60


def test_a_disk_too_small_for_the_bytes_is_noticed_before_they_are_copied(store: Store) -> None:
    disk = disk_of(store)
    store.close()
    size = sum(map(len, files_of(disk).values()))
    disk.capacity_bytes = size + size // 2
    steps = disk.steps
    with pytest.raises(StoreFull, match="no room for the snapshot"):
        take(disk, Reflink.NEVER)
    assert not [what for what in disk.trace[steps:] if what.startswith("write") and ".vol" in what]
    assert set(disk.paths()) == set(files_of(disk))


def test_the_power_stays_off(store: Store) -> None:
    disk = disk_of(store)
    disk.cut_at = disk.steps + 20
    with pytest.raises(PowerCut):
        take(disk, Reflink.ALWAYS)
