"""Until when the trash was emptied stands in a file of its own."""

import errno

import pytest
from powercut import PowerCut, SimulatedDisk
from survivors import NOTHING_UNSYNCED

from imgfs.disk import Disk
from imgfs.errors import DiskFailure, StoreFull
from imgfs.retention import TRASH, emptied_ns, empty


@pytest.fixture
def disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.mkdir("/store")
    disk.sync_directory("/")
    return disk


def test_it_only_goes_forward(disk: SimulatedDisk) -> None:
    assert emptied_ns(disk, "/store") == 0
    empty(disk, "/store", 7)
    empty(disk, "/store", 5)
    assert emptied_ns(disk, "/store") == 7


def test_it_is_durable_and_whole_after_a_power_cut_at_any_step(disk: SimulatedDisk) -> None:
    empty(disk, "/store", 5)
    steps = disk.steps
    empty(disk, "/store", 7)
    assert emptied_ns(disk.after_power_cut(NOTHING_UNSYNCED), "/store") == 7
    for step in range(steps, disk.steps):
        cut = SimulatedDisk()
        cut.mkdir("/store")
        cut.sync_directory("/")
        empty(cut, "/store", 5)
        cut.cut_at = step
        with pytest.raises(PowerCut):
            empty(cut, "/store", 7)
        assert emptied_ns(cut.after_power_cut(NOTHING_UNSYNCED), "/store") in (5, 7)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"emptied_ns": "x"}', b"\xff", b"[" * 10**5])
def test_a_file_that_is_not_whole_counts_for_nothing(data: bytes, disk: SimulatedDisk) -> None:
    disk.set_content(f"/store/{TRASH}", data)
    assert emptied_ns(disk, "/store") == 0
    empty(disk, "/store", 3)
    assert emptied_ns(disk, "/store") == 3


def test_a_disk_that_refuses(disk: SimulatedDisk) -> None:
    empty(disk, "/store", 3)
    disk.fail_next("write", errno.ENOSPC)
    with pytest.raises(StoreFull):
        empty(disk, "/store", 5)
    disk.fail_next("open", errno.EIO)
    with pytest.raises(DiskFailure):
        emptied_ns(disk, "/store")
    assert emptied_ns(disk, "/store") == 3


def test_on_a_real_disk(tmp_path: object) -> None:
    empty(Disk(), str(tmp_path), 9)
    assert emptied_ns(Disk(), str(tmp_path)) == 9
