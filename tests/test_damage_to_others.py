"""Damage that takes more than one image's own needle: names given twice, slots used again, needles within images.

Each time no other image is lost, and no bytes are taken for what they are not.
"""

from collections.abc import Iterator

import pytest
from crash_model import (
    VOLUMES,
    Clock,
    Workload,
    open_store,
    photo,
    snapshot,
)
from damage_model import (
    LOST,
    Sample,
    check_one_lost,
    closed_store,
    killed_store,
    sample_of,
    without_index,
)

from imgfs.format import NEEDLES_START, PUT_KINDS, Kind, slot_of
from imgfs.settings import Settings
from imgfs.store import ROOT


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


def test_damage_of_the_same_name_again(clock: Clock) -> None:
    """The needle that deleted an image is damaged, and its name was given to another: that one has it."""
    work = Workload(clock)
    work.create(b"/a", b"old")
    work.unlink(b"/a")
    work.create(b"/a", b"new")
    work.mkdir(b"/d")
    work.rename(b"/a", b"/d/a")
    work.create(b"/a", b"newer")
    work.close()
    sample = sample_of(work)
    for kind in (Kind.DELETE, Kind.RENAME):
        (at,) = [at for at in sample.needles if at.needle.kind == kind]
        disk = without_index(sample.disk.copy())
        disk.flip(at.path, at.offset + 5)
        check_one_lost(sample, disk, at, kind.name)
        with open_store(disk) as store:
            assert snapshot(store)[b"/a"].data == b"newer"


def test_a_slot_that_was_used_again(clock: Clock) -> None:
    """A rename out of a directory is damaged; the directory was removed, and its slot is another image's by now."""
    work = Workload(clock, Settings(volume_bytes_max=64 << 10, headroom_bytes=0, rest_slots=0))
    work.mkdir(b"/d")
    work.create(b"/d/a", b"moved")
    work.rename(b"/d/a", b"/a")
    work.rmdir(b"/d")
    work.create(b"/b", b"in the same slot")
    work.close()
    sample = sample_of(work)
    (directory,) = [at for at in sample.needles if at.needle.kind == Kind.DIRECTORY and at.needle.inode != ROOT]
    assert slot_of(sample.wanted[b"/b"].inode) == slot_of(directory.needle.inode)
    (at,) = [at for at in sample.needles if at.needle.kind == Kind.RENAME]
    disk = without_index(sample.disk.copy())
    disk.flip(at.path, at.offset + 5)
    for _ in range(2):
        with open_store(disk) as store:
            seen = snapshot(store)
            assert seen[b"/b"].data == b"in the same slot"
            assert b"moved" in [node.data for node in seen.values()]


@pytest.mark.parametrize("ending", ["closed", "killed"])
def test_a_slot_that_is_another_directory_by_now(clock: Clock, ending: str) -> None:
    """As before, but the slot is a directory again, and what was renamed is deleted: that can still be replayed."""
    work = Workload(clock, Settings(volume_bytes_max=64 << 10, headroom_bytes=0, rest_slots=0))
    work.mkdir(b"/d")
    work.create(b"/d/a", b"moved")
    work.rename(b"/d/a", b"/a")
    work.rmdir(b"/d")
    work.mkdir(b"/x")
    work.unlink(b"/a")
    work.sync()
    work.create(b"/x/mark", b"")
    if ending == "closed":
        work.close()
    sample = sample_of(work)
    (at,) = [at for at in sample.needles if at.needle.kind == Kind.RENAME]
    disk = without_index(sample.disk.copy())
    disk.flip(at.path, at.offset + 5)
    check_one_lost(sample, disk, at, "a rename")


def test_a_volume_that_is_gone(closed: Sample) -> None:
    """Its images are lost and no others: those in directories that went with it are under /lost+found-INODE."""
    disk = closed.disk.copy()
    for suffix in ("vol", "idx", "names"):
        disk.remove(f"{VOLUMES}/00000001.{suffix}")
    inodes = {}
    for path, node in closed.wanted.items():
        last = [at for at in closed.needles if at.needle.inode == node.inode and at.needle.kind in PUT_KINDS][-1]
        if last.volume_id > 1:
            inodes[node.inode] = path
    assert len(inodes) > 4
    with open_store(disk, writable=False) as reader:
        read_only = snapshot(reader)
    with open_store(disk) as store:
        seen = snapshot(store)
    assert read_only.keys() == seen.keys()
    found = {node.inode: node for node in seen.values()}
    for inode, path in inodes.items():
        assert found[inode].data == closed.wanted[path].data, path


def test_a_lost_directory_takes_new_entries(killed: Sample) -> None:
    """What was renamed into a directory whose needle is damaged is there, and new names can be given beside it."""
    (at,) = [at for at in killed.needles if at.needle.kind == Kind.DIRECTORY and at.needle.name == b"e"]
    disk = without_index(killed.disk.copy())
    disk.flip(at.path, at.offset)
    with open_store(disk) as store:
        directory = store.resolve(LOST + b"%d" % at.needle.inode)
        assert [entry.name for entry in store.list(directory)]
        store.mkdir(directory, b"new", 0o755, 0, 0)
        store.rename(ROOT, LOST + b"%d" % at.needle.inode, ROOT, b"found")
        seen = snapshot(store)
    without_index(disk)
    with open_store(disk) as store:
        again = snapshot(store)
    assert again.keys() == seen.keys()
    assert b"/found/new" in again


def test_copies_of_needles_never_pass_for_one(clock: Clock) -> None:
    """An image may hold needles or a whole volume file, at any alignment; a scan past its header finds none of them."""
    work = Workload(clock)
    work.create(b"/secret", photo(2000, 1))
    work.create(b"/other", photo(50_000, 2))
    work.sync()
    work.create(b"/next", photo(20_000, 3))
    volume = work.disk.content(f"{VOLUMES}/00000001.vol")
    active = work.disk.content(f"{VOLUMES}/00000002.vol")
    assert len(active) > NEEDLES_START + 20_000
    for shift in range(8):
        work.create(b"/needles%d" % shift, bytes(shift) + volume[NEEDLES_START : NEEDLES_START + 4000])
        work.create(b"/same%d" % shift, bytes(shift) + active[NEEDLES_START : NEEDLES_START + 4000])
    # At the very offset at which it stands in its own volume.
    work.create(b"/whole", volume)
    work.create(b"/last", b"")
    work.close()
    sample = sample_of(work)
    for at in sample.needles:
        if at.needle.kind == Kind.FILE and at.needle.name.startswith((b"needles", b"same", b"whole")):
            for cut in (at.offset, at.offset + 7, at.offset + at.needle.header_bytes):
                disk = without_index(sample.disk.copy())
                disk.flip(at.path, cut)
                check_one_lost(sample, disk, at, f"{at.needle.name!r}, byte {cut}")


def test_needles_at_their_offset_in_another_volume(clock: Clock) -> None:
    """An image that holds another volume's needles just where they stood there; only its salt tells them apart."""

    def store_with(start: int) -> Sample:
        work = Workload(clock)
        work.create(b"/filler", photo(20_000, 1))
        work.create(b"/secret", photo(3000, 2))
        work.unlink(b"/secret")
        work.create(b"/more", photo(25_000, 3))
        work.put(b"/evil", work.disk.content(f"{VOLUMES}/00000001.vol")[start:].ljust(50_000, b"\0")[:50_000])
        work.create(b"/last", b"")
        work.close()
        return sample_of(work)

    # Salts differ from store to store, but not where things lie.
    (probe,) = [at for at in store_with(0).needles if at.needle.name == b"evil"]
    data = probe.parts()["data"]
    sample = store_with(data.start)
    (evil,) = [at for at in sample.needles if at.needle.name == b"evil"]
    (secret,) = [at for at in sample.needles if at.needle.name == b"secret"]
    assert evil.parts()["data"] == data
    first, second = (sample.disk.content(f"{VOLUMES}/0000000{number}.vol") for number in (1, 2))
    assert second[secret.offset : secret.end] == first[secret.offset : secret.end]
    disk = without_index(sample.disk.copy())
    disk.flip(evil.path, evil.offset)
    check_one_lost(sample, disk, evil, "needles of another volume")
