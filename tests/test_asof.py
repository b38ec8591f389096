"""A store as it was at some time: each state it ever had comes back, whatever came later."""

from random import Random

import pytest
from crash_model import SETTINGS, STORE, Clock, needles, open_store, photo, without_index
from dated import Dated
from powercut import SimulatedDisk
from snapshots import Snapshot, assert_same, snapshot
from workloads import large_images, names_and_attributes, random_operations, small_images

from imgfs.errors import Damaged, NotFound
from imgfs.format import NEEDLES_START, Kind, Needle, hash_seed, name_hash, unpack_volume_header
from imgfs.index import checkpoint, names_a_name, names_header, pack_name, pack_record, state_of
from imgfs.store import Store
from imgfs.volume import Volume


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Dated:
    return Dated(Clock(monkeypatch))


def seen_at(disk: SimulatedDisk, moment_ns: int) -> Snapshot:
    steps = disk.steps
    with Store.open(STORE, disk=disk, settings=SETTINGS, writable=False, as_of_ns=moment_ns) as store:
        assert store.report.damage == []
        seen = snapshot(store)
    assert disk.steps == steps, "looking at the past changed the disk"
    return seen


def assert_all_come_back(disk: SimulatedDisk, work: Dated, what: str) -> None:
    for number, (moment_ns, wanted) in enumerate(zip(work.times, work.history, strict=True)):
        for later_ns in (0, 1_000):  # between two changes the store is as after the first
            assert_same(seen_at(disk, moment_ns + later_ns), wanted, f"{what}: state {number} of {len(work.history)}")


@pytest.mark.parametrize("workload", [small_images, large_images, names_and_attributes])
def test_every_state_comes_back(workload: object, work: Dated) -> None:
    assert callable(workload)
    workload(work)
    assert_all_come_back(work.disk, work, "while a writer has it open")
    work.close()
    assert_all_come_back(work.disk, work, "closed")
    assert_all_come_back(without_index(work.disk.copy()), work, "from the volumes alone")


@pytest.mark.parametrize("seed", range(6))
def test_every_state_of_a_random_history_comes_back(seed: int, work: Dated) -> None:
    random_operations(work, Random(seed), 60)
    work.close()
    work.open()
    random_operations(work, Random(seed + 100), 30)
    assert_all_come_back(work.disk, work, "open")
    work.close()
    disk = without_index(work.disk.copy())
    open_store(disk).close()
    assert_all_come_back(disk, work, "index made anew")


def test_before_the_store_was_made_there_is_none(work: Dated) -> None:
    with pytest.raises(NotFound, match="was not there yet"):
        Store.open(STORE, disk=work.disk, writable=False, as_of_ns=work.times[0] - 1)
    work.close()


def test_in_the_future_it_is_as_it_is_now(work: Dated) -> None:
    small_images(work)
    assert_same(seen_at(work.disk, work.clock.now_ns * 2), work.history[-1], "later")
    work.close()


def put_and_punch(work: Dated) -> tuple[int, bytes]:
    """Put and delete an image in the middle of a volume, and let its needle's bytes go, its header too."""
    work.mkdir(b"/a")
    work.put(b"/a/before", photo(300, 1))
    work.put(b"/a/gone", photo(9000, 2))
    place = work.store.locate(work.store.resolve(b"/a/gone"))
    work.put(b"/a/after", photo(300, 3))
    work.unlink(b"/a/gone")
    work.close()
    path = f"{STORE}/volumes/{place.volume:08d}.vol"
    data = bytearray(work.disk.content(path))
    end = place.data_offset + place.size + 8
    data[place.offset : end] = bytes(end - place.offset)
    work.disk.set_content(path, bytes(data))
    return len(work.history) - 2, b"/a/gone"


def test_what_was_punched_out_is_shown_and_cannot_be_read(work: Dated) -> None:
    number, path = put_and_punch(work)
    with Store.open(STORE, disk=work.disk, writable=False, as_of_ns=work.times[number]) as store:
        seen = snapshot(store, damaged=True)
        with pytest.raises(Damaged):
            store.open_image(store.resolve(path))
    wanted = work.history[number]
    # Without its header the time at which it came into its directory is known to the second.
    second = 10**9
    assert {at: node._replace(mtime_ns=node.mtime_ns // second) for at, node in seen.items()} == {
        at: node._replace(mtime_ns=node.mtime_ns // second, data=None if at == path else node.data)
        for at, node in wanted.items()
    }


def test_where_needles_are_missing_the_index_is_believed(work: Dated) -> None:
    """A copy of volumes has left out what no newer state needs: the rest cannot be replayed one by one."""
    work.mkdir(b"/dead")
    work.put(b"/dead/moved", photo(300, 1))
    work.mkdir(b"/home")
    work.rename(b"/dead/moved", b"/home/moved")
    work.rmdir(b"/dead")
    moment_ns = work.clock.now_ns
    work.put(b"/later", photo(300, 2))
    work.close()
    drop_needles_of(work.disk, work.history[1][b"/dead"].inode)
    seen = seen_at_any_cost(work.disk, moment_ns)
    assert {path for path in seen if path} == {b"/home", b"/home/moved"}
    assert seen[b"/home/moved"] == work.history[-1][b"/home/moved"]


def drop_needles_of(disk: SimulatedDisk, inode: int) -> None:
    """Let the only volume be as if nothing had ever been said about *inode* itself, its index included."""
    [path] = [path for path in disk.paths() if path.endswith(".vol")]
    found = [(offset, item) for _, offset, item in needles(disk) if isinstance(item, Needle)]
    source = Volume.open(disk, path)
    kept = [(item, b"".join(source.pieces(item, offset))) for offset, item in found]
    header = unpack_volume_header(disk.content(path))
    volume = Volume.create(disk, path, header, 0)
    records, names, at = bytearray(), bytearray(names_header(header.volume_id)), NEEDLES_START
    for needle, data in kept:
        if needle.inode == inode or needle.kind == Kind.CHECKPOINT:
            continue
        needle.durable = NEEDLES_START
        volume.write_needle(at, needle, [data] if data else [], None)
        named = names_a_name(needle.kind) and needle.name
        value = name_hash(needle.name, hash_seed(header.store_id)) if named else 0
        records += pack_record(needle, at, len(names) if named else 0, value)
        names += pack_name(needle.name) if named else b""
        at += needle.length
    seal = checkpoint(state_of(records, names, at), seal=True)
    seal.sequence, seal.durable, seal.commit_ns = kept[-1][0].sequence, at, kept[-1][0].commit_ns
    volume.write_needle(at, seal, [], None)
    records += pack_record(seal, at, 0, 0)
    disk.set_content(path.replace(".vol", ".idx"), bytes(records))
    disk.set_content(path.replace(".vol", ".names"), bytes(names))
    volume.close()
    source.close()


def seen_at_any_cost(disk: SimulatedDisk, moment_ns: int) -> Snapshot:
    with Store.open(STORE, disk=disk, settings=SETTINGS, writable=False, as_of_ns=moment_ns) as store:
        return snapshot(store)
