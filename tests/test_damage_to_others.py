"""Damage that takes more than one image's own needle: names given twice, slots used again, needles within images.

Each time no other image is lost, and no bytes are taken for what they are not.
"""

from collections.abc import Iterator

import pytest
from crafted import PATH, Crafted
from crafted import SETTINGS as CRAFTED
from crash_model import VOLUMES, Clock, Workload, open_store, photo, recovered, without_index
from damage_model import LOST, SOAK, Sample, check_one_lost, closed_store, killed_store, random_store, sample_of
from powercut import SimulatedDisk
from snapshots import assert_same, snapshot

from imgfs.format import FLAG_BARE, NEEDLES_START, PUT_KINDS, Kind, inode_of, slot_of
from imgfs.settings import Settings
from imgfs.store import ROOT, Store

SEEDS = 10 if SOAK else 2
LOST_PATH = b"/" + LOST


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


@pytest.mark.parametrize("ending", ["closed", "killed"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_needle_of_a_random_store(clock: Clock, seed: int, ending: str) -> None:
    """Links, exchanges, special files, attributes, slots used again: whatever is lost, the rest is what it was."""
    sample = random_store(clock, seed, closed=ending == "closed")
    for at in sample.below_mark():
        disk = without_index(sample.disk.copy())
        disk.flip(at.path, at.offset + 5)
        check_one_lost(sample, disk, at, f"{Kind(at.needle.kind).name} {at.needle.name!r} at {at.offset}")


def finished(work: Workload, ending: str) -> Sample:
    """Return the store of *work*: closed, or killed when all was durable and none of it in a checkpoint."""
    work.sync()
    work.create(b"/mark", b"its header says that all before it is durable")
    if ending == "closed":
        work.close()
    return sample_of(work)


def lose(sample: Sample, kind: Kind, number: int = 0, *, inode: int = 0) -> SimulatedDisk:
    """Damage needle *number* of that *kind* (about *inode*), check what is left of all else, and return the disk."""
    found = [at for at in sample.needles if at.needle.kind == kind and inode in (0, at.needle.inode)]
    disk = without_index(sample.disk.copy())
    disk.flip(found[number].path, found[number].offset + 5)
    check_one_lost(sample, disk.copy(), found[number], kind.name)
    return disk


ENDINGS = pytest.mark.parametrize("ending", ["closed", "killed"])
REUSING = Settings(volume_bytes_max=1 << 20, headroom_bytes=0, rest_slots=0)


@ENDINGS
def test_what_lost_its_last_name_is_found(clock: Clock, ending: str) -> None:
    work = Workload(clock, REUSING)
    work.create(b"/own", b"bytes")
    work.link(b"/own", b"/link")
    work.unlink(b"/own")
    sample = finished(work, ending)
    inode = sample.wanted[b"/link"].inode
    with open_store(lose(sample, Kind.LINK)) as store:
        seen = snapshot(store)
    assert seen[LOST_PATH + b"%d" % inode].data == b"bytes"
    assert b"/link" not in seen
    with open_store(lose(sample, Kind.DELETE)) as store:
        seen = snapshot(store)
    assert [seen[path].inode for path in (b"/own", b"/link")] == [inode] * 2


@ENDINGS
def test_a_link_whose_target_is_lost_never_names_another(clock: Clock, ending: str) -> None:
    """... not even when the number of the target is given to a new image, which is not told of the lost one."""
    work = Workload(clock, REUSING)
    work.create(b"/a", b"lost", attributes=((b"security.capability", b"of the lost"),))
    work.link(b"/a", b"/link")
    sample = finished(work, ending)
    disk = lose(sample, Kind.FILE)
    with open_store(disk, REUSING) as store:
        assert snapshot(store).keys() == {b"", b"/mark"}
        inode = store.put(ROOT, b"new", b"new", 3, mode=0o600, uid=1, gid=1, mtime_ns=1)
        assert inode == sample.wanted[b"/a"].inode, "the test should give the same number again"
    for again in (disk, without_index(disk.copy())):
        with open_store(again, writable=False) as store:
            seen = snapshot(store)
            assert seen.keys() == {b"", b"/mark", b"/new"}
            assert (seen[b"/new"].nlink, seen[b"/new"].attributes) == (1, ())


@ENDINGS
def test_links_and_attributes_outlive_the_needle_before_the_last(clock: Clock, ending: str) -> None:
    """An image was put twice; the first needle is lost, and what was said of the image between the two counts."""
    work = Workload(clock, REUSING)
    work.create(b"/a", b"first")
    work.link(b"/a", b"/link")
    work.set_xattr(b"/a", b"user.a", b"between")
    if ending == "closed":
        work.sync()
        work.close()
        work.open()
    work.overwrite(b"/a", b"second")
    sample = finished(work, ending)
    with open_store(lose(sample, Kind.FILE)) as store:
        seen = snapshot(store)
    assert seen[b"/a"] == seen[b"/link"]
    assert (seen[b"/a"].data, seen[b"/a"].attributes) == (b"second", ((b"user.a", b"between"),))


@ENDINGS
@pytest.mark.parametrize("number", [0, 1])
def test_half_an_exchange(clock: Clock, ending: str, number: int) -> None:
    """Of two directories that swapped their names one is where it should be, the other is found with all in it."""
    work = Workload(clock, REUSING)
    for name in (b"/x", b"/y"):
        work.mkdir(name)
        work.create(name + b"/in", name)
    work.exchange(b"/x", b"/y")
    sample = finished(work, ending)
    with open_store(lose(sample, Kind.RENAME, number)) as store:
        seen = snapshot(store)
    lost = sample.wanted[b"/y" if number == 0 else b"/x"].inode
    right = b"/x" if number == 0 else b"/y"
    assert seen[right + b"/in"].data == sample.wanted[right + b"/in"].data
    assert seen[LOST_PATH + b"%d/in" % lost].data in (b"/x", b"/y")


@ENDINGS
def test_directories_that_would_lie_in_one_another(clock: Clock, ending: str) -> None:
    """Of two directories each went into the other, one after the other; the rename between the two is lost."""
    work = Workload(clock, REUSING)
    work.mkdir(b"/x")
    work.mkdir(b"/y")
    work.create(b"/x/in x", b"1")
    work.create(b"/y/in y", b"2")
    work.rename(b"/x", b"/y/x")
    work.rename(b"/y/x", b"/x")
    work.rename(b"/y", b"/x/y")
    sample = finished(work, ending)
    inode = sample.wanted[b"/x"].inode
    with open_store(lose(sample, Kind.RENAME, 1)) as store:
        seen = snapshot(store)
    assert seen[LOST_PATH + b"%d/y/in y" % inode].data == b"2"
    assert seen[LOST_PATH + b"%d/in x" % inode].data == b"1"


@ENDINGS
def test_an_image_in_a_slot_that_is_another_directory_by_now(clock: Clock, ending: str) -> None:
    """It is listed there, for the needle that took it out of the directory before is lost."""
    work = Workload(clock, REUSING)
    work.mkdir(b"/d")
    work.create(b"/d/a", b"moved")
    work.rename(b"/d/a", b"/a")
    work.rmdir(b"/d")
    work.mkdir(b"/x")
    sample = finished(work, ending)
    with open_store(lose(sample, Kind.RENAME)) as store:
        assert b"moved" in [node.data for node in snapshot(store).values()]


def test_attributes_do_not_come_back_with_the_number(clock: Clock) -> None:
    """A slot used 256 times gives the same inode again; what its first image had is not the last one's."""
    work = Workload(clock, REUSING)
    inodes = set()
    for number in range(257):
        work.create(b"/a", b"", attributes=((b"security.capability", b"of the first"),) if not number else ())
        inodes.add(work.store.resolve(b"/a"))
        if number < 256:
            work.unlink(b"/a")
    assert len(inodes) == 256
    for disk in (work.disk.after_kill(), without_index(work.disk.after_kill())):
        assert_same(recovered(disk, REUSING), work.history[-1], "killed")
    work.close()
    for disk in (work.disk, without_index(work.disk.copy())):
        assert_same(recovered(disk, REUSING), work.history[-1], "closed")


def test_a_name_is_not_given_to_what_had_the_slot_before(clock: Clock) -> None:
    """Two needles are lost: that an image was deleted, and the next one in its slot; the latter was renamed."""
    work = Workload(clock, REUSING)
    work.create(b"/secret", b"secret")
    work.unlink(b"/secret")
    work.create(b"/tmp", b"public")
    work.rename(b"/tmp", b"/public")
    sample = finished(work, "closed")
    disk = without_index(sample.disk.copy())
    for at in sample.needles:
        if at.needle.kind == Kind.DELETE or at.needle.name == b"tmp":
            disk.flip(at.path, at.offset + 5)
    with open_store(disk) as store:
        assert b"/public" not in snapshot(store)


@ENDINGS
def test_an_own_name_that_should_be_gone(clock: Clock, ending: str) -> None:
    """That it went is lost; the image is written again without one, or ends with its last link."""
    work = Workload(clock, REUSING)
    work.mkdir(b"/d")
    for name in (b"/d/a", b"/d/b"):
        work.create(name, b"bytes")
        work.link(name, name[2:])
        work.unlink(name)
    work.overwrite(b"/a", b"more bytes")
    work.rmdir(b"/d")
    work.mkdir(b"/x")  # in the slot of the other directory, to which the second own name belongs
    work.unlink(b"/b")
    sample = finished(work, ending)
    for number in (0, 1):
        with open_store(lose(sample, Kind.DELETE, number)) as store:
            seen = snapshot(store)
        assert seen.keys() == sample.wanted.keys()
        assert seen[b"/a"].data == b"more bytes"


@pytest.mark.parametrize("ending", ["replayed", "checkpointed", "loaded"])
@pytest.mark.parametrize("how", ["put", "put again", "renamed", "its name went", "it was replaced", "it was moved"])
def test_an_own_name_in_a_directory_whose_slot_another_has(ending: str, how: str) -> None:
    """Lost are the end of an image and the directory that came into its slot; what lay in it has further names.

    Every start shows the same, whether it takes needles one by one or all at once.
    """
    craft = Crafted()
    before, directory, inode, other = 2, inode_of(1, 1), 3, 5
    craft.file(before, ROOT, b"before", b"had the slot")
    craft.file(inode, ROOT if how == "renamed" else directory, b"own", b"bytes")
    craft.link(4, ROOT, b"link", inode)
    if how == "put again":
        craft.file(inode, directory, b"own", b"other bytes")
    elif how == "renamed":
        craft.rename(inode, directory, b"own")
    elif how == "its name went":
        craft.delete(inode, FLAG_BARE)
    elif how == "it was replaced":
        craft.file(other, ROOT, b"other", b"other bytes")
        craft.rename(other, ROOT, b"elsewhere", replaced=inode, flags=FLAG_BARE)
    elif how == "it was moved":
        craft.rename(inode, ROOT, b"own")
    disk = craft.finish(ending)
    with Store.open(PATH, disk=disk, settings=CRAFTED, writable=False) as store:
        read_only = snapshot(store)
    seen = []
    for _ in range(3):
        with Store.open(PATH, disk=disk, settings=CRAFTED) as store:
            seen.append(snapshot(store))
    assert read_only.keys() == seen[0].keys() == seen[1].keys() == seen[2].keys()
    data = b"other bytes" if how == "put again" else b"bytes"
    found = sorted(path for path, node in seen[0].items() if node.inode == inode)
    assert [seen[0][path].data for path in found] == [data] * len(found)
    assert seen[0][b"/before"].data == b"had the slot"
    if how.startswith("it"):
        assert found == ([b"/link", b"/own"] if how == "it was moved" else [b"/link"])
    else:
        assert found == [b"/link", LOST_PATH + b"%d" % inode]
