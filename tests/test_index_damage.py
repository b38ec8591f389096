"""`.idx`, `.names`, `imgfs.json` and one copy of a volume's header may be lost, cut, aged or flipped: nothing is lost.

IMGFS_SOAK=1 tries every byte where some are tried otherwise.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from crash_model import STORE, VOLUMES, Clock, Workload, check_log, live_on, open_store, photo, recovered
from powercut import SimulatedDisk
from snapshots import Snapshot, assert_same, plain, snapshot
from workloads import small_images

from imgfs.format import INDEX_RECORD_BYTES, NEEDLES_START, VOLUME_HEADER_COPIES, unpack_volume_header

SOAK = bool(os.environ.get("IMGFS_SOAK"))
MASKS = (0x01, 0x80)
ENDINGS = ("closed", "killed")
_MIDDLE = 60  # the step before which the index files are copied that are then called aged


@dataclass
class Sample:
    """A store, what it holds, and its index files once it was opened and closed unharmed."""

    disk: SimulatedDisk
    wanted: Snapshot
    index: dict[str, bytes]
    aged: dict[str, bytes]  # the index files as they were once

    def index_paths(self) -> list[str]:
        return list(self.index)


def index_files(disk: SimulatedDisk) -> dict[str, bytes]:
    return {path: disk.content(path) for path in disk.paths() if path.endswith((".idx", ".names"))}


def few_images(work: Workload) -> None:
    """As few needles as fill a volume and begin the next; in each something is named, renamed and deleted."""
    work.mkdir(b"/a")
    work.create(b"/a/one", photo(30_000, 1))
    work.create(b"/a/two", photo(10, 2))
    work.sync()
    work.rename(b"/a/two", b"/a/one")
    work.create(b"/x", photo(40_000, 3))
    work.rename(b"/a", b"/b")
    work.symlink(b"/b/link", b"one")
    work.unlink(b"/x")
    work.sync()
    work.create(b"/b/last", photo(30, 4))


def sample(clock: Clock, operations: Callable[[Workload], None], ending: str) -> Sample:
    work = Workload(clock)
    aged: dict[str, bytes] = {}
    work.disk.before_step = lambda _: aged.update(index_files(work.disk)) if work.disk.steps == _MIDDLE else None
    operations(work)
    work.disk.before_step = None
    if ending == "closed":
        work.close()
    disk = work.disk.after_kill()
    unharmed = disk.copy()
    open_store(unharmed).close()
    return Sample(disk, work.history[-1], index_files(unharmed), aged)


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patch:
        yield Clock(patch)


@pytest.fixture(scope="module", params=ENDINGS)
def few(request: pytest.FixtureRequest, clock: Clock) -> Sample:
    return sample(clock, few_images, request.param)


@pytest.fixture(scope="module", params=ENDINGS)
def many(request: pytest.FixtureRequest, clock: Clock) -> Sample:
    return sample(clock, small_images, request.param)


def check(sample: Sample, disk: SimulatedDisk, where: str) -> list[str]:
    """Open the store on *disk*, for writing, and check that all is there; return the index files that were rebuilt."""
    volumes = {path: disk.content(path) for path in disk.paths() if path.endswith(".vol")}
    store = open_store(disk)
    assert not store.report.damage, where
    assert not store.report.torn_bytes, where
    rebuilt = list(store.report.rebuilt)
    assert_same(snapshot(store), sample.wanted, where)
    for path, data in volumes.items():
        assert disk.content(path) == data, f"{where}: opening changed {path}"
    store.close()
    for path, data in sample.index.items():
        assert disk.content(path) == data, f"{where}: {path} is not what it was"
    return rebuilt


def check_both(sample: Sample, disk: SimulatedDisk, where: str) -> list[str]:
    """As `check`; a reader, who must not write, sees the same."""
    assert_same(recovered(disk), sample.wanted, f"{where}, read-only")
    return check(sample, disk, where)


def test_the_unharmed_store(many: Sample) -> None:
    assert len(many.index) >= 6, "three volumes"
    assert check_both(many, many.disk.copy(), "unharmed") == []
    check_log(many.disk)


@pytest.mark.parametrize("suffixes", [(".idx",), (".names",), (".idx", ".names")])
def test_index_files_deleted(many: Sample, suffixes: tuple[str, ...]) -> None:
    volumes = sorted({path.rpartition(".")[0] for path in many.index})
    for stems in (*([stem] for stem in volumes), volumes):
        disk = many.disk.copy()
        for stem in stems:
            for suffix in suffixes:
                disk.remove(stem + suffix)
        rebuilt = check_both(many, disk, f"without {suffixes} of {stems}")
        assert rebuilt == [stem + ".idx" for stem in stems]


@pytest.mark.parametrize("lost", [(".idx",), (".names",), (".idx", ".names")])
def test_index_files_of_a_volume_without_needles(clock: Clock, lost: tuple[str, ...]) -> None:
    """A crash right after a volume was begun may take the names of its index files, which hold nothing yet."""
    work = Workload(clock)
    work.record()
    few_images(work)
    (cut,) = [cut for cut in work.cuts if cut.what == f"sync directory {VOLUMES}"]
    disk = cut.disk.after_kill()
    assert len(disk.content(f"{VOLUMES}/00000002.vol")) == NEEDLES_START
    for suffix in lost:
        disk.remove(f"{VOLUMES}/00000002{suffix}")
    wanted = work.history[cut.acknowledged]
    assert plain(recovered(disk)) == plain(wanted)
    live_on(disk, recovered(disk), clock)
    work.close()


def test_index_files_truncated_at_every_length(few: Sample) -> None:
    for path in few.index_paths():
        size = len(few.disk.content(path))
        for length in range(size):
            disk = few.disk.copy()
            file = disk.open(path, writable=True)
            disk.truncate(file, length)
            disk.close(file)
            where = f"{path} cut from {size} to {length}"
            (check_both if length % 20 == 0 else check)(few, disk, where)


def test_any_byte_of_the_index_flipped(few: Sample) -> None:
    for path in few.index_paths():
        for offset in range(len(few.disk.content(path))):
            for mask in MASKS if SOAK else (MASKS[offset % 2],):
                disk = few.disk.copy()
                disk.flip(path, offset, mask)
                rebuilt = (check_both if offset % 20 == 0 else check)(few, disk, f"{path}, byte {offset} ^ {mask:#x}")
                assert rebuilt, f"{path}, byte {offset}: the damage was not found"


def test_a_byte_of_a_long_index_flipped(many: Sample) -> None:
    for path in many.index_paths():
        size = len(many.disk.content(path))
        for offset in range(0, size, 1 if SOAK else size // 12):
            disk = many.disk.copy()
            disk.flip(path, offset, MASKS[offset % 2])
            assert check(many, disk, f"{path}, byte {offset}"), f"{path}, byte {offset}: the damage was not found"


def test_records_swapped(few: Sample) -> None:
    path = few.index_paths()[0]
    data = few.disk.content(path)
    for at in range(0, len(data) - 2 * INDEX_RECORD_BYTES, INDEX_RECORD_BYTES):
        one, other = data[at : at + INDEX_RECORD_BYTES], data[at + INDEX_RECORD_BYTES : at + 2 * INDEX_RECORD_BYTES]
        disk = few.disk.copy()
        disk.set_content(path, data[:at] + other + one + data[at + 2 * INDEX_RECORD_BYTES :])
        assert check_both(few, disk, f"records {at // INDEX_RECORD_BYTES} and the next swapped")


def test_aged_index_files(many: Sample) -> None:
    assert many.aged
    assert any(many.disk.content(path) != data for path, data in many.aged.items())
    for paths in (*([path] for path in many.aged), list(many.aged)):
        disk = many.disk.copy()
        for path in paths:
            disk.set_content(path, many.aged[path])
        check_both(many, disk, f"{paths} as they were once")


def test_index_files_ahead_of_the_volume(many: Sample) -> None:
    paths = many.index_paths()
    for path in paths:
        for more in (b"\0", photo(INDEX_RECORD_BYTES, 5), many.disk.content(path), bytes(4096)):
            disk = many.disk.copy()
            disk.set_content(path, disk.content(path) + more)
            assert check_both(many, disk, f"{path} and {len(more)} bytes more")


def test_index_files_of_another_volume(many: Sample) -> None:
    for suffix in (".idx", ".names"):
        paths = [path for path in many.index if path.endswith(suffix)]
        for one, other in zip(paths, paths[1:] + paths[:1], strict=True):
            disk = many.disk.copy()
            disk.set_content(one, many.disk.content(other))
            disk.set_content(other, many.disk.content(one))
            assert check_both(many, disk, f"{one} and {other} swapped")
    stems = sorted({path.rpartition(".")[0] for path in many.index})
    disk = many.disk.copy()
    for suffix in (".idx", ".names"):
        disk.set_content(stems[0] + suffix, many.disk.content(stems[1] + suffix))
    assert check_both(many, disk, "both index files of another volume")


def test_superblock_lost_or_flipped(few: Sample) -> None:
    path = f"{STORE}/imgfs.json"
    data = few.disk.content(path)
    disk = few.disk.copy()
    disk.remove(path)
    assert check_both(few, disk, "without imgfs.json") == [path]
    assert disk.content(path) == data
    for offset in range(len(data)):
        disk = few.disk.copy()
        disk.flip(path, offset, MASKS[offset % 2])
        check(few, disk, f"imgfs.json, byte {offset}")
        if not data[offset : offset + 1].isspace():
            assert disk.content(path) == data, f"imgfs.json, byte {offset}"
    for length in range(0, len(data), 1 if SOAK else 9):
        disk = few.disk.copy()
        disk.set_content(path, data[:length])
        check(few, disk, f"imgfs.json cut to {length} bytes")


def test_one_copy_of_a_volume_header_flipped(few: Sample) -> None:
    path = f"{VOLUMES}/00000001.vol"
    for start in VOLUME_HEADER_COPIES:
        for offset in range(start, start + 160):
            disk = few.disk.copy()
            disk.flip(path, offset, MASKS[offset % 2])
            check(few, disk, f"{path}, byte {offset}")
            if offset % 40 == 0:
                disk.remove(f"{STORE}/imgfs.json")
                disk.remove(path.replace(".vol", ".idx"))
                check_both(few, disk, f"{path}, byte {offset}, without index and superblock")
    # The copies are as long as that.
    header = few.disk.content(path)[: VOLUME_HEADER_COPIES[1]].rstrip(b"\0")
    assert len(header) <= 160
    unpack_volume_header(few.disk.content(path)[:NEEDLES_START])
