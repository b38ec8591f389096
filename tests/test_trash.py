"""What went is found in the trash, as it was just before: held against every state that a store has gone through."""

from itertools import pairwise
from random import Random

import pytest
from crash_model import STORE, Clock, open_store, photo, without_index
from dated import Dated, history_of
from powercut import SimulatedDisk
from snapshots import Node, Snapshot, snapshot
from workloads import large_images, names_and_attributes, random_operations, small_images

from imgfs.errors import NotFound, StoreFull
from imgfs.format import Kind
from imgfs.history import History
from imgfs.restore import Restore, Restored, choose
from imgfs.restore_targets import StoreTarget
from imgfs.trash import Cause, Gone, find


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Dated:
    return Dated(Clock(monkeypatch))


def facts(history: History, gone: Gone) -> tuple[object, ...]:
    """Return what the trash says of something, as `expected` does."""
    data = b"".join(history.pieces(gone.put)) if gone.kind in (Kind.FILE, Kind.SYMLINK) else b""
    attributes = tuple(sorted(history.xattrs(gone.put, gone.moment).items()))
    return gone.went_ns, gone.inode, gone.kind, gone.size, gone.device, gone.attributes, data, attributes


def expected(node: Node, went_ns: int) -> tuple[object, ...]:
    owner = (node.uid, node.gid, node.mode, node.mtime_ns)
    size = 0 if node.kind == Kind.SPECIAL else node.size
    data = node.data or b""
    return went_ns, node.inode, node.kind, size, node.device, owner, data, tuple(sorted(node.attributes or ()))


def assert_all_are_found(disk: SimulatedDisk, work: Dated, since: int = 0) -> None:
    """Hold what is in the trash against what each operation, from number *since* on, took away."""
    since_ns = work.times[since]
    with history_of(disk) as history:
        found = [gone for gone in find(history, since_ns) if gone.kind != Kind.DIRECTORY]
        seen = {facts(history, gone): gone for gone in found}
        ids = [gone.id for gone in found]
        assert len(set(ids)) == len(ids)
        assert [gone.went_ns for gone in found] == sorted(gone.went_ns for gone in found)
        for number, (before, after) in enumerate(pairwise(work.history[since:]), since + 1):
            left = {node.inode: node for node in after.values()}
            for path, node in before.items():
                now = left.get(node.inode)
                if node.kind == Kind.DIRECTORY or (now and (now.data == node.data or not node.data)):
                    continue
                gone = seen.pop(expected(node, work.times[number]), None)
                if gone is None:  # of several names one stands for all
                    names = [at for at, other in before.items() if other.inode == node.inode]
                    assert len(names) > 1, f"{path!r} is not in the trash"
                    continue
                assert (gone.cause == Cause.OVERWRITTEN) == (now is not None)
                assert before[b"/" + gone.path].inode == node.inode
                if now is None and path in after:
                    assert gone.cause == Cause.REPLACED
        for gone in seen.values():
            # Of all else there is a newer version of the same bytes, or none that lasted longer than an operation.
            assert gone.cause == Cause.OVERWRITTEN
            assert gone.went_ns in work.times


@pytest.mark.parametrize("workload", [small_images, large_images, names_and_attributes])
def test_all_that_went_is_found(workload: object, work: Dated) -> None:
    assert callable(workload)
    workload(work)
    assert_all_are_found(work.disk, work)
    work.close()
    assert_all_are_found(work.disk, work)
    assert_all_are_found(without_index(work.disk.copy()), work)


@pytest.mark.parametrize("seed", range(8))
def test_all_that_went_of_a_random_history_is_found(seed: int, work: Dated) -> None:
    random_operations(work, Random(seed), 150)
    assert_all_are_found(work.disk, work)
    assert_all_are_found(work.disk, work, 70)
    work.close()
    assert_all_are_found(work.disk, work, work.acknowledged - 9)


def test_bytes_that_are_gone_are_not_in_the_trash(work: Dated) -> None:
    """Whole blocks of what is dead are punched out; header and footer may be left."""
    work.put(b"/whole", photo(20_000, 1))
    work.put(b"/punched", photo(20_000, 2))
    work.put(b"/zeros", bytes(20_000))  # a copy of the volume may have holes here, too
    places = {name: work.store.locate(work.store.resolve(name)) for name in (b"whole", b"punched", b"zeros")}
    for name in places:
        work.unlink(b"/" + name)
    work.close()
    place = places[b"punched"]
    path = f"{STORE}/volumes/{place.volume:08d}.vol"
    data = bytearray(work.disk.content(path))
    block = -(-place.data_offset // 4096) * 4096
    data[block : block + 4096] = bytes(4096)
    work.disk.set_content(path, bytes(data))
    with history_of(work.disk) as history:
        assert [gone.path for gone in find(history, 0)] == [b"whole", b"zeros"]


def test_an_image_overwritten_under_a_link_has_its_path(work: Dated) -> None:
    work.mkdir(b"/d")
    work.create(b"/a", photo(300, 1))
    work.link(b"/a", b"/d/b")
    work.link(b"/a", b"/c")
    work.unlink(b"/a")
    work.unlink(b"/c")
    work.overwrite(b"/d/b", photo(200, 2))
    with history_of(work.disk) as history:
        [gone] = find(history, 0)
    assert (gone.path, gone.cause) == (b"d/b", Cause.OVERWRITTEN)


# -- bringing back ------------------------------------------------------------------------------------------------


def restore(
    work: Dated, *what: str, into: bytes | None = None, force: bool = False, complaints: tuple[str, ...] = ()
) -> Restored:
    """Bring back *what* into the store of *work*, which is closed; open it again."""
    said: list[str] = []
    with history_of(work.disk) as history:
        wanted = choose(find(history, 0), what, into)
        work.open()
        target = StoreTarget(work.store)
        run = Restore(history, target, lambda path, why: said.append(f"{path.decode()}: {why}"), force)
        restored = run.run(wanted)
    assert len(said) == len(complaints), said
    for line, start in zip(said, complaints, strict=True):
        assert line.startswith(start)
    return restored


def without_numbers(seen: Snapshot, below: bytes) -> dict[bytes, Node]:
    """Return what is *below* a directory, without what the store chooses."""
    return {path: node._replace(inode=0, ctime_ns=0, nlink=0) for path, node in seen.items() if path.startswith(below)}


def test_a_whole_directory_comes_back_as_it_was(work: Dated) -> None:
    work.mkdir(b"/keep")
    work.mkdir(b"/keep/gone", 0o750)
    work.mkdir(b"/keep/gone/deep", 0o700)
    work.mkdir(b"/keep/gone/empty", 0o711)
    work.create(b"/keep/gone/a", photo(3000, 1), 0o640)
    work.create(b"/keep/gone/deep/b", photo(70_000, 2), attributes=((b"user.a", b"1"), (b"trusted.b", b"2")))
    work.symlink(b"/keep/gone/deep/link", b"../a")
    work.special(b"/keep/gone/pipe", 0o010600)
    work.set_attr(b"/keep/gone/a", mode=0o4711, uid=7, mtime_ns=12_345_678_901)
    work.set_attr(b"/keep/gone", uid=9, mtime_ns=99_000_000_001)
    work.set_xattr(b"/keep/gone", b"user.dir", b"x")
    work.create(b"/keep/stays", photo(10, 3))
    wanted = without_numbers(work.history[-1], b"/keep/gone")
    for path in (b"deep/b", b"deep/link", b"a", b"pipe"):
        work.unlink(b"/keep/gone/" + path)
    for path in (b"/deep", b"/empty", b""):
        work.rmdir(b"/keep/gone" + path)
    work.close()
    restored = restore(work, "/keep/gone/")
    assert (restored.images, restored.directories, restored.failed) == (4, 3, 0)
    assert without_numbers(snapshot(work.store), b"/keep/gone") == wanted
    work.close()


def test_no_name_is_taken_without_force(work: Dated) -> None:
    work.create(b"/a", photo(100, 1))
    work.overwrite(b"/a", photo(50, 2))
    work.mkdir(b"/d")
    work.create(b"/d/x", photo(5, 3))
    work.create(b"/d/y", photo(6, 4))
    work.unlink(b"/d/x")
    work.unlink(b"/d/y")
    work.create(b"/d/x", photo(7, 5))
    work.close()
    assert restore(work, "a", complaints=("a: there is something",)).failed == 1
    work.store.close()
    below = restore(work, "d")
    assert (below.images, below.left, below.failed) == (1, 1, 0)
    seen = snapshot(work.store)
    assert (seen[b"/a"].data, seen[b"/d/x"].data, seen[b"/d/y"].data) == (photo(50, 2), photo(7, 5), photo(6, 4))
    work.store.close()
    assert restore(work, "a", force=True).images == 1
    assert snapshot(work.store)[b"/a"].data == photo(100, 1)
    work.store.close()
    with history_of(work.disk) as history:  # what gave way can be brought back in its turn
        assert [gone.cause for gone in find(history, 0) if gone.path == b"a"] == [Cause.OVERWRITTEN, Cause.REPLACED]


def test_elsewhere_and_by_id(work: Dated) -> None:
    work.mkdir(b"/d", 0o700)
    work.mkdir(b"/d/e", 0o710)
    work.create(b"/d/e/a", photo(100, 1))
    work.overwrite(b"/d/e/a", photo(200, 2))
    work.unlink(b"/d/e/a")
    work.rmdir(b"/d/e")
    work.close()
    with history_of(work.disk) as history:
        first, second, directory = find(history, 0)
    assert (first.cause, second.cause, directory.kind) == (Cause.OVERWRITTEN, Cause.DELETED, Kind.DIRECTORY)
    assert restore(work, first.id, into=b"new/er").directories == 2
    work.store.close()
    assert restore(work, "d/e", into=b"all").directories == 2
    seen = snapshot(work.store)
    assert seen[b"/new/er/a"].data == photo(100, 1)
    assert seen[b"/all/e/a"].data == photo(200, 2)
    assert seen[b"/all/e"].mode == 0o710
    assert b"/d/e" not in seen
    work.store.close()
    with pytest.raises(NotFound, match="d/f is not in the trash"):
        restore(work, "d/f")


def test_where_a_directory_was_something_else_is_now(work: Dated) -> None:
    work.mkdir(b"/d")
    work.create(b"/d/a", photo(100, 1))
    work.unlink(b"/d/a")
    work.rmdir(b"/d")
    work.symlink(b"/d", b"/etc")
    work.close()
    assert restore(work, "d/a", complaints=("d/a: /d is no directory",)).failed == 1
    work.store.close()


def test_damaged_bytes_do_not_come_back(work: Dated) -> None:
    work.create(b"/a", photo(100, 1))
    work.create(b"/b", photo(100, 2))
    place = work.store.locate(work.store.resolve(b"/a"))
    work.unlink(b"/a")
    work.unlink(b"/b")
    work.close()
    work.disk.flip(f"{STORE}/volumes/{place.volume:08d}.vol", place.data_offset + 5)
    restored = restore(work, "a", "b", complaints=("a: volume 1, offset",))
    assert (restored.images, restored.failed) == (1, 1)
    assert set(snapshot(work.store)) == {b"", b"/b"}
    work.store.close()


def test_a_full_disk_leaves_what_came_back_whole(work: Dated) -> None:
    work.mkdir(b"/d")
    for number in range(5):
        work.create(b"/d/%d" % number, photo(20_000, number))
    for number in range(5):
        work.unlink(b"/d/%d" % number)
    work.close()
    work.disk.capacity_bytes = work.disk._used_bytes() + 60_000
    with pytest.raises(StoreFull):
        restore(work, "d")
    seen = {path: node.data for path, node in snapshot(work.store).items() if node.kind == Kind.FILE}
    assert 1 <= len(seen) < 5
    for path, data in seen.items():
        assert data == photo(20_000, int(path[3:]))
    work.disk.capacity_bytes = None
    work.store.close()


@pytest.mark.parametrize("seed", range(4))
def test_all_of_a_random_history_comes_back(seed: int, work: Dated) -> None:
    """Each single thing in the trash, brought back to a directory of its own, is what it was."""
    random_operations(work, Random(seed), 100)
    work.close()
    with history_of(work.disk) as history:
        trash = [gone for gone in find(history, 0) if gone.kind != Kind.DIRECTORY]
        wanted = {gone.id: facts(history, gone) for gone in trash}
        work.open()
        for gone in trash:
            into = gone.id.replace(":", "-").encode()
            run = Restore(history, StoreTarget(work.store), lambda path, why: pytest.fail(f"{path!r}: {why}"))
            assert run.run(choose(trash, [gone.id], into)).images == 1
            node = snapshot(work.store)[b"/" + into + b"/" + gone.path.rpartition(b"/")[2]]
            assert (b"", *expected(node, gone.went_ns)[2:]) == (b"", *wanted[gone.id][2:])
        work.store.close()
    with open_store(work.disk) as store:
        assert not [item for item in store.check() if "Damage" in type(item).__name__]
