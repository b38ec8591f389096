"""Many images stored at once are as if each was stored alone; what is in the way, or does not fit, is seen to."""

import errno
import itertools
from random import Random

import killed_store
import pytest
from crash_model import Clock
from powercut import SimulatedDisk
from stores import PATH, TINY, abandon, disk_of, killed, new_store, open_store, put, rebuilt, reopened, tree
from tables import check, dump

from imgfs.batch import DIRECTORIES_AT_ONCE, IMAGES_AT_ONCE, NewImage
from imgfs.errors import ImgfsError, IsADirectory, NotADirectory, NotFound, StoreFull
from imgfs.layout import Word
from imgfs.records import Record
from imgfs.settings import KIB, MIB, Settings
from imgfs.store import ROOT, Store

LARGE = Settings(volume_bytes_max=256 * MIB, headroom_bytes=0, rest_slots=2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def images_in(directories: list[int], count: int, seed: int = 0) -> list[NewImage]:
    """Return *count* images with few owners, in runs of one directory each."""
    random = Random(seed)
    images: list[NewImage] = []
    while len(images) < count:
        directory = random.choice(directories)
        for _ in range(random.choice((1, 2, 7, 100))):
            mode = random.choice((0o644, 0o644, 0o644, 0o600))
            name = b"%d" % len(images) + random.randbytes(random.randrange(8)).hex().encode()
            data = random.randbytes(random.choice((0, 1, 7, 100, 3000)))
            images.append(NewImage(directory, name, data, 1, 2, mode, random.randrange(-5, 1 << 60)))
    return images[:count]


def put_all(store: Store, images: list[NewImage]) -> list[int]:
    """Return how many each call took."""
    counts, done = [], 0
    while done < len(images):
        counts.append(store.put_new(images[done:]))
        done += counts[-1]
    return counts


def put_each(store: Store, images: list[NewImage]) -> None:
    for parent, name, data, uid, gid, mode, mtime_ns in images:
        store.put(parent, name, data, len(data), mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns)


@pytest.mark.parametrize("settings", [TINY, LARGE], ids=["many volumes", "one volume"])
def test_as_if_each_was_stored_alone(settings: Settings, clock: Clock) -> None:
    made = new_store(settings)
    directories = [ROOT, *(made.mkdir(ROOT, b"d%d" % number, 0o755, 0, 0) for number in range(3))]
    abandon(made)
    stores = []
    for put_in in (put_all, put_each):
        store = open_store(disk_of(made).after_kill(), settings)
        for seed in range(3):  # into directories that are empty, and that are not
            images = images_in(directories, 700, seed)
            put_in(store, [image._replace(name=b"%d %b" % (seed, image.name)) for image in images])
        check(store._table, dump(store._table))
        stores.append(store)
    together, alone = stores
    assert tree(together) == tree(alone)
    assert together.counts()[:3] == alone.counts()[:3] == (2100, 4, 0)
    assert dump(together._table).listings == dump(alone._table).listings
    if settings is LARGE:
        assert together.counts().volume_bytes == alone.counts().volume_bytes
        # Which bucket regions were used on the way, and where the second owner is told of, may differ.
        assert placeless(together) == placeless(alone)
    seen = tree(together)
    assert tree(rebuilt(together)) == seen
    assert tree(killed(together)) == seen
    assert tree(reopened(alone)) == seen


def placeless(store: Store) -> list[Record]:
    return [record._replace(offset8=0) for record in dump(store._table).records]


def test_one_call_takes_what_fits() -> None:
    store = new_store(LARGE)
    images = images_in([ROOT], 2 * IMAGES_AT_ONCE + 5)
    steps = disk_of(store).steps
    assert put_all(store, images) == [IMAGES_AT_ONCE, IMAGES_AT_ONCE, 5]
    assert disk_of(store).steps - steps == 3 * 3 + 2 * 2, "volume, names, index; each of two owners is told of once"
    tiny = new_store()
    counts = put_all(tiny, [image._replace(data=bytes(5 * KIB)) for image in images[:60]])
    assert sum(counts) == 60
    assert 1 in counts, "the one that goes into the next volume"
    assert max(counts) > 5
    assert len(tree(tiny)) == 60


def test_what_is_in_the_way() -> None:
    store = new_store(LARGE)
    directory = store.mkdir(ROOT, b"directory", 0o755, 0, 0)
    old = store.put(ROOT, b"old", b"old", 3, mode=0o600, uid=0, gid=0, mtime_ns=1)

    def image(name: bytes, data: bytes = b"new", parent: int = ROOT) -> NewImage:
        return NewImage(parent, name, data, 0, 0, 0o644, 2)

    assert put_all(store, [image(b"a"), image(b"old"), image(b"b"), image(b"b", b"again"), image(b"c")]) == [
        1,
        1,
        1,
        1,
        1,
    ]
    assert store.resolve(b"old") == old
    assert {path: found.data for path, found in tree(store).items() if found.data} == {
        b"/a": b"new",
        b"/old": b"new",
        b"/b": b"again",
        b"/c": b"new",
    }
    big = bytes(MIB + 1)
    assert put_all(store, [image(b"small"), image(b"big", big), image(b"small too")]) == [1, 1, 1]
    assert store.attr(store.resolve(b"big")).size == len(big)
    before = tree(store)
    store.rmdir(ROOT, b"directory")
    gone = store.mkdir(ROOT, b"gone", 0o755, 0, 0)
    store.rmdir(ROOT, b"gone")
    store.mkdir(ROOT, b"directory", 0o755, 0, 0)
    wrong: list[tuple[NewImage, type[ImgfsError]]] = [
        (image(b"directory"), IsADirectory),
        (image(b"x", parent=old), NotADirectory),
        (image(b"x", parent=gone), NotFound),
    ]
    for each, error in wrong:
        assert store.put_new([image(b"a"), each]) == 1
        with pytest.raises(error):
            store.put_new([each, image(b"never")])
    assert tree(store).keys() == before.keys()
    assert directory not in (gone, old)


def test_slots_of_the_deleted_are_taken_first() -> None:
    store = new_store(LARGE)
    put_all(store, images_in([ROOT], 20))
    for entry in list(store.list(ROOT)):
        store.unlink(ROOT, entry.name)
    images = images_in([ROOT], 30, seed=1)
    counts = put_all(store, images)
    assert counts == [*[1] * 18, 12], "two rest"
    assert {path: found.data for path, found in tree(store).items()} == tree_of(images)
    check(store._table, dump(store._table))
    assert {path: found.data for path, found in tree(reopened(store)).items()} == tree_of(images)


def tree_of(images: list[NewImage]) -> dict[bytes, bytes]:
    return {b"/" + image.name: bytes(image.data) for image in images}


@pytest.mark.parametrize("written", [0, 1, 500, 2000])
@pytest.mark.parametrize("after", [0, 1, 2], ids=["volume", "names", "index"])
def test_a_disk_that_fills_up_within_it_leaves_what_one_by_one_leaves(after: int, written: int) -> None:
    store = new_store(LARGE)
    put_all(store, images_in([ROOT], 1))
    before = tree(store)
    images = images_in([ROOT], 40, seed=1)
    for key in {(image.uid, image.gid, image.mode) for image in images}:
        store._images.writer().define_owner(*key)
    table = dump(store._table)
    disk_of(store).fail_next("write", errno.ENOSPC, after=after, written=written, times=100)
    with pytest.raises(StoreFull):
        store.put_new(images)
    disk_of(store)._faults.clear()
    assert tree(store) == before
    assert dump(store._table) == table
    twin = killed(store)
    assert tree(twin) == before
    assert not twin.report.damage
    assert not twin.report.torn_bytes
    assert sum(put_all(twin, images)) == 40
    seen = tree(twin)
    assert tree(rebuilt(twin)) == seen


def test_a_full_disk_takes_one_by_one_what_it_still_can() -> None:
    disk = SimulatedDisk(300 * KIB)
    store = new_store(Settings(volume_bytes_max=256 * MIB, headroom_bytes=100 * KIB), disk)
    images = [NewImage(ROOT, b"%d" % number, bytes(8 * KIB), 0, 0, 0o644, 1) for number in range(50)]
    counts: list[int] = []
    with pytest.raises(StoreFull):
        while True:
            counts.append(store.put_new(images[sum(counts) :]))
    assert counts == [1] * len(counts), "all of them would not fit"
    assert 10 < sum(counts) < 30
    seen = tree(store)
    assert len(seen) == sum(counts)
    store.unlink(ROOT, b"0")
    del seen[b"/0"]
    assert tree(reopened(store)) == seen
    assert disk.exists(PATH)


def test_an_error_within_the_change_leaves_no_record_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(LARGE)
    put_all(store, images_in([ROOT], 3))
    images = images_in([ROOT], 50, seed=1)
    before = tree(store)
    for key in {(image.uid, image.gid, image.mode) for image in images}:
        store._images.writer().define_owner(*key)
    table = dump(store._table)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._table, "touch", fail)
        with pytest.raises(KeyboardInterrupt):
            store.put_new(images)
    assert dump(store._table) == table
    slots = len(table.records)
    assert not any(store._table.record(slot).flags for slot in range(slots, slots + 60))
    assert tree(store) == before
    assert put_all(store, images) == [50]
    assert len(tree(killed(store))) == 53


def test_of_what_a_killed_worker_was_storing_nothing_comes_back() -> None:
    """All of it may lie in the volume: it is cut away, and what is stored there next is not followed by the rest."""
    # The first takes as much room as what is stored next, behind which the second would be the next needle.
    images = [NewImage(ROOT, b"%d" % number, bytes(7 + number), 0, 0, 0o644, 1) for number in range(12)]
    cut = 0
    for step in itertools.count():
        with killed_store.new_store() as store:
            put(store, ROOT, b"there")
            was_killed = killed_store.killed_at(store, step, lambda worker: worker.put_new(images), torn=False)
            store.roll_forward()
            slots = store._memory.words[Word.SLOTS]
            assert not any(store._table.record(slot).flags for slot in range(slots, slots + len(images)))
            cut += len(tree(store)) == 1
            put(store, ROOT, b"next")
            seen = tree(store)
            assert len(seen) in (2, 2 + len(images))
            with killed_store.on_disk(store) as twin:
                assert tree(twin) == seen, f"killed at step {step}"
        if not was_killed:
            break
    assert cut > 3


def test_one_for_each_of_many_directories() -> None:
    """Each of them gets a bucket more by it, which takes most of the journal."""
    store = new_store(LARGE)
    directories = [store.mkdir(ROOT, b"d%d" % number, 0o755, 0, 0) for number in range(300)]
    for name in range(7):
        put_all(store, [NewImage(each, b"%d" % name, b"", 0, 0, 0o644, 1) for each in directories])
    counts = put_all(store, [NewImage(each, b"7", b"x", 0, 0, 0o644, 1) for each in directories])
    assert max(counts) == DIRECTORIES_AT_ONCE
    check(store._table, dump(store._table))
    seen = tree(store)
    assert len(seen) == 9 * 300
    assert tree(killed(store)) == seen
