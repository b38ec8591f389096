"""A snapshot is the store as it was at one moment, whatever others do to that meanwhile; it is there whole or not."""

import errno
import itertools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from powercut import PowerCut, SimulatedDisk
from stores import PATH, TINY, abandon, abandon_all, content, disk_of, new_store, put, tree
from survivors import EVERYTHING, STRATEGIES

from imgfs import cloning
from imgfs.cloning import Reflink
from imgfs.errors import Busy, DiskFailure, Exists, ImgfsError, InvalidArgument, NoStore, NotSupported, StoreFull
from imgfs.format import Kind
from imgfs.recover import Damage
from imgfs.snapshot import UNFINISHED, take_snapshot
from imgfs.store import ROOT, Store

TARGET = "/snapshot"
BOTH = pytest.mark.parametrize("reflink", [Reflink.ALWAYS, Reflink.NEVER])
ROUNDS = 60
STEPS = 25

Tree = dict[bytes, object]


class Watched:
    """A watcher that remembers what it heard."""

    def __init__(self) -> None:
        self.whole = (0, 0)
        self.done = (0, 0)
        self.sequence = 0

    def started(self, volumes: int, volume_bytes: int) -> None:
        self.whole = volumes, volume_bytes

    def advanced(self, volumes: int, volume_bytes: int) -> None:
        self.done = volumes, volume_bytes

    def opened(self, store: Store) -> None:
        self.sequence = store.last_sequence


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


def take(disk: SimulatedDisk, reflink: Reflink, target: str = TARGET) -> None:
    take_snapshot(PATH, target, Watched(), reflink=reflink, disk=disk)


def files_of(disk: SimulatedDisk, directory: str = PATH) -> dict[str, bytes]:
    return {path: disk.content(path) for path in disk.paths() if path.startswith(f"{directory}/")}


def tree_at(disk: SimulatedDisk, *, freed: bool = False) -> Tree:
    """Return all that the snapshot holds, as its next daemon sees it; it must be clean.

    *freed*: the bytes of what no image needs any more may be gone.
    """
    with Store.open(TARGET, disk=disk, settings=TINY) as store:
        assert (store.report.damage, store.report.torn_bytes) == ([], 0)
        damage = [found for found in store.check() if isinstance(found, Damage)]
        assert [each for each in damage if each.inode or not freed] == []
        return dict(tree(store))


def fill(store: Store, images: int = 20) -> None:
    """Put images into *store* that fill several volumes, and delete some."""
    album = store.mkdir(ROOT, b"album", 0o750, 3, 4)
    for number in range(images):
        put(store, (ROOT, album)[number % 2], b"%d.jpg" % number, bytes([number]) * (9000 + number), number)
    for number in range(0, images, 5):
        store.unlink((ROOT, album)[number % 2], b"%d.jpg" % number)
    store.rename(ROOT, b"2.jpg", album, b"renamed")


@pytest.fixture
def store() -> Store:
    """A store of several volumes that is open for writing; its last changes are not durable."""
    store = new_store()
    fill(store)
    return store


# -- of a store that stands still -------------------------------------------------------------------------------------


@BOTH
def test_it_holds_all_that_a_store_in_use_holds(store: Store, reflink: Reflink) -> None:
    disk, before, wanted = disk_of(store), files_of(disk_of(store)), tree(store)
    watched = Watched()
    taken = take_snapshot(PATH, TARGET, watched, reflink=reflink, disk=disk)
    assert files_of(disk) == before
    assert tree_at(disk) == wanted
    assert taken.volumes == store.counts().volumes > 3
    assert taken.volume_bytes == sum(len(data) for path, data in before.items() if path.endswith(".vol"))
    assert taken.shared == (taken.volumes if reflink == Reflink.ALWAYS else 0)
    assert watched.done == (taken.volumes - 1, watched.whole[1])
    assert watched.sequence == store.last_sequence
    put(store, ROOT, b"later")
    assert tree_at(disk) == wanted


@BOTH
def test_each_goes_its_own_way(store: Store, reflink: Reflink) -> None:
    disk = disk_of(store)
    take(disk, reflink)
    with Store.open(TARGET, disk=disk, settings=TINY) as copy:
        assert copy.superblock == store.superblock
        put(copy, ROOT, b"in the copy")
        fill_album = copy.lookup(ROOT, b"album")
        copy.unlink(fill_album, b"1.jpg")
    put(store, ROOT, b"in the store")
    assert b"/in the copy" not in tree(store)
    assert b"/album/1.jpg" in tree(store)
    assert b"/in the store" not in tree_at(disk)
    assert b"/album/1.jpg" not in tree_at(disk)


@BOTH
def test_a_snapshot_of_what_a_killed_daemon_left_has_its_torn_end_cut(store: Store, reflink: Reflink) -> None:
    wanted, disk = tree(store), disk_of(store).after_kill()
    abandon(store)
    last = max(path for path in disk.paths() if path.endswith(".vol"))
    disk.set_content(last, disk.content(last) + b"half a needle")
    take(disk, reflink)
    assert tree_at(disk) == wanted


@BOTH
def test_what_is_wrong_with_the_index_is_mended_in_the_copy(store: Store, reflink: Reflink) -> None:
    disk, wanted = disk_of(store), tree(store)
    for path in files_of(disk):
        if path.endswith("1.idx"):
            disk.unlink(path)
        elif path.endswith("2.names"):
            disk.flip(path, 20)
    take(disk, reflink)
    assert tree_at(disk) == wanted


def test_a_lost_superblock_is_made_again_in_the_copy(store: Store) -> None:
    disk = disk_of(store)
    wanted, superblock = tree(store), disk.content(f"{PATH}/imgfs.json")
    disk.unlink(f"{PATH}/imgfs.json")
    take(disk, Reflink.AUTO)
    assert tree_at(disk) == wanted
    assert disk.content(f"{TARGET}/imgfs.json") == superblock
    assert not disk.exists(f"{PATH}/imgfs.json")


def test_a_volume_without_a_header_is_kept_as_it_is(store: Store) -> None:
    disk = disk_of(store)
    path = f"{PATH}/volumes/00000002.vol"
    for offset in (0, 4096):
        disk.flip(path, offset)
    take(disk, Reflink.NEVER)
    assert disk.content(path.replace(PATH, TARGET)) == disk.content(path)
    with Store.open(TARGET, disk=disk, settings=TINY) as copy:
        assert [damage.volume for damage in copy.report.damage] == [2]


def test_without_shared_blocks_auto_copies_and_always_refuses(store: Store) -> None:
    disk, wanted = disk_of(store), tree(store)
    disk.shares_blocks = False
    before = disk.paths()
    with pytest.raises(NotSupported, match="cannot share blocks"):
        take(disk, Reflink.ALWAYS)
    assert disk.paths() == before
    take(disk, Reflink.AUTO)
    assert tree_at(disk) == wanted


def test_where_it_cannot_be(store: Store) -> None:
    disk = disk_of(store)
    before = files_of(disk, "")
    for target, error, text in (
        (PATH, Exists, "is there already"),
        (f"{PATH}/volumes/x", InvalidArgument, "lies in the store"),
        (f"{PATH}/x", InvalidArgument, "lies in the store"),
        (f"{PATH}/volumes/../x", InvalidArgument, "lies in the store"),
        ("/nowhere/x", DiskFailure, "/nowhere does not exist"),
    ):
        with pytest.raises(error, match=text):
            take(disk, Reflink.AUTO, target)
    with pytest.raises(NoStore):
        take_snapshot("/other", TARGET, Watched(), disk=disk)
    assert files_of(disk, "") == before
    take(disk, Reflink.AUTO, f"{PATH}-2/")
    assert disk.exists(f"{PATH}-2/imgfs.json")


def test_what_somebody_else_put_in_its_way_is_not_touched(store: Store) -> None:
    disk = disk_of(store)
    disk.mkdir(TARGET + UNFINISHED)
    disk.set_content(f"{TARGET}{UNFINISHED}/photo", b"mine")
    with pytest.raises(DiskFailure, match="in the way"):
        take(disk, Reflink.AUTO)
    assert disk.content(f"{TARGET}{UNFINISHED}/photo") == b"mine"


# -- of a store that changes ------------------------------------------------------------------------------------------


BLOCK_BYTES = 256  # smaller than on a real disk, so that every dead image has some


class SharedDisk(SimulatedDisk):
    """A disk on which somebody else has a turn before each call, when *turn* is set; blocks of zeros are holes."""

    turn: Callable[[], object] | None = None

    def _call(self, method: str, *paths: str) -> None:
        self._have_turn()
        super()._call(method, *paths)

    def write(self, file: int, offset: int, buffers: object) -> None:
        self._have_turn()
        super().write(file, offset, buffers)  # type: ignore[arg-type]

    def next_data(self, file: int, offset: int) -> int:
        return next((at for at, hole in self._blocks(file, offset) if not hole), self.size(file))

    def next_hole(self, file: int, offset: int) -> int:
        return next((at for at, hole in self._blocks(file, offset) if hole), self.size(file))

    def _blocks(self, file: int, offset: int) -> Iterator[tuple[int, bool]]:
        """Yield where each block at or behind *offset* starts, or *offset*, and whether it was freed."""
        data = self._opened(file).file.data
        for start in range(offset // BLOCK_BYTES * BLOCK_BYTES, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            yield max(start, offset), len(block) == BLOCK_BYTES and not any(block)

    def _have_turn(self) -> None:
        turn, self.turn = self.turn, None
        if turn is not None:
            turn()
            self.turn = turn


class Writer:
    """Changes a store step by step, and keeps what it held after each; what is dead is freed as soon as can be."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.disk = SharedDisk()
        self.store = new_store(disk=self.disk)
        self.data: dict[bytes, bytes] = {}
        self.number = 0
        self.history = [self._state()]
        self.steps = 0
        self.eagerness = chance.choice((0.03, 0.1, 0.3))
        for _ in range(20):
            self._put()
        self.history = [self._state()]

    def _state(self) -> dict[bytes, bytes]:
        return dict(self.data)

    def step(self) -> None:
        if self.steps and self.chance.random() < self.eagerness:
            self.steps -= 1
            self.chance.choice((self._put, self._put, self._overwrite, self._delete))()
            self.history.append(self._state())

    def _put(self) -> None:
        self.number += 1
        name = b"%d" % self.number
        self.data[name] = self.chance.randbytes(self.chance.randrange(1, 9000))
        put(self.store, ROOT, name, self.data[name])

    def _overwrite(self) -> None:
        if self.data:
            name = self.chance.choice(sorted(self.data))
            self.data[name] = self.chance.randbytes(self.chance.randrange(1, 9000))
            self._free(name, lambda: put(self.store, ROOT, name, self.data[name]))

    def _delete(self) -> None:
        if self.data:
            # One of the last, whose bytes are in the volume that is written now, or any.
            names = sorted(self.data, key=int)
            name = self.chance.choice(names[-3:] if self.chance.random() < 0.5 else names)
            self._free(name, lambda: self.store.unlink(ROOT, name))
            del self.data[name]

    def _free(self, name: bytes, change: Callable[[], object]) -> None:
        """Let *change* end what *name* has now; then make that durable, and its bytes zeros."""
        where = self.store.locate(self.store.lookup(ROOT, name))
        change()
        self.store.sync()
        file = self.disk.open(f"{PATH}/volumes/{where.volume:08d}.vol", writable=True)
        self.disk.write(file, where.data_offset, [bytes(where.size)])
        self.disk.close(file)


@BOTH
def test_whatever_happens_meanwhile_it_is_one_state_of_the_store(
    reflink: Reflink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloning, "_PIECE_BYTES", 16 * 1024)
    grown = 0
    for seed in range(ROUNDS):
        writer = Writer(Random(seed))
        writer.steps = STEPS
        writer.disk.turn = writer.step
        try:
            take(writer.disk, reflink)
        finally:
            writer.disk.turn = None
        found = {path[1:]: each.data for path, each in tree_at(writer.disk, freed=True).items()}  # type: ignore[attr-defined]
        assert found in writer.history, f"seed {seed}"
        grown += found != writer.history[0]
        assert {path[1:]: each.data for path, each in tree(writer.store).items()} == writer.history[-1]
        abandon(writer.store)
    assert grown > ROUNDS // 2, "hardly anything happened meanwhile"


def test_an_append_that_is_cut_away_while_it_is_copied_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloning, "_PIECE_BYTES", 4096)
    for turn in itertools.count():
        disk = SharedDisk()
        store = new_store(disk=disk)
        put(store, ROOT, b"first", b"1" * 5000)
        states = [tree(store)]
        path = f"{PATH}/volumes/00000001.vol"
        # A writer is within an append that will fail.
        size = len(disk.content(path))
        disk.set_content(path, disk.content(path) + disk.content(path)[8192:14000])
        turns = itertools.count()

        def change(
            store: Store = store, turn: int = turn, turns: Iterator[int] = turns, size: int = size, states: Any = states
        ) -> None:
            if next(turns) == turn:
                store._log.volume.truncate(size)  # type: ignore[union-attr]
                for name, length in ((b"second", 4000), (b"third", 3000), (b"of the next volume", 60_000)):
                    put(store, ROOT, name, name[:1] * length)
                    store.sync()
                    states.append(tree(store))

        disk.turn = change
        take(disk, Reflink.NEVER)
        disk.turn = None
        assert tree_at(disk) in states, f"turn {turn}"
        abandon(store)
        if next(turns) <= turn:
            break
    assert turn > 20


def test_a_volume_that_is_replaced_while_it_is_copied_does_not_come_along(store: Store) -> None:
    """Compaction: a new volume has all that is needed of two others, which then are removed."""
    disk = disk_of(store)
    removed = f"{PATH}/volumes/00000002.vol"
    held = disk.content(removed)
    for turn in itertools.count(step=5):
        shared = SharedDisk()
        shared._tree = disk.copy()._tree
        turns = itertools.count()

        def change(shared: SharedDisk = shared, turn: int = turn, turns: Iterator[int] = turns) -> None:
            if next(turns) == turn:
                shared.set_content(removed.replace("02", "99"), held)
                shared.remove(removed)

        shared.turn = change
        take(shared, Reflink.ALWAYS)
        shared.turn = None
        copies = [path for path in shared.paths() if path.startswith(TARGET) and path.endswith(("02.vol", "99.vol"))]
        assert len(copies) == 1, copies
        happened = next(turns) > turn
        with Store.open(TARGET, disk=shared, settings=TINY) as copy:
            # A volume under another name than its own is left out when the copy is opened.
            assert copy.counts().volumes == store.counts().volumes - copies[0].endswith("99.vol")
        if not happened:
            break
    assert turn > 40


def test_a_store_that_never_stands_still_is_given_up(store: Store) -> None:
    disk = SharedDisk()
    disk._tree = disk_of(store).copy()._tree
    numbers = itertools.count(100)
    held = disk.content(f"{PATH}/volumes/00000001.vol")

    class Restless(SharedDisk):
        def names(self, directory: str) -> list[str]:
            if directory == f"{PATH}/volumes":
                self.set_content(f"{PATH}/volumes/{next(numbers):08d}.vol", held)
            return super().names(directory)

    restless = Restless()
    restless._tree = disk._tree
    with pytest.raises(Busy, match="changes faster than it can be copied"):
        take(restless, Reflink.ALWAYS)
    assert not restless.exists(TARGET)
    assert not restless.exists(TARGET + UNFINISHED)


# -- cut off ----------------------------------------------------------------------------------------------------------


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


def test_kinds_are_what_they_were(store: Store) -> None:
    store.symlink(ROOT, b"link", b"album", 1, 2)
    store.special(ROOT, b"pipe", 0o010644, 0, 1, 2)
    disk = disk_of(store)
    take(disk, Reflink.AUTO)
    with Store.open(TARGET, disk=disk, settings=TINY) as copy:
        assert copy.attr(copy.lookup(ROOT, b"link")).kind == Kind.SYMLINK
        assert content(copy, copy.resolve(b"album/1.jpg")) == b"\1" * 9001
