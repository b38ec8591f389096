"""What has several names, or no bytes, or extended attributes, goes into a store and comes out as it was."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import (
    OLD_NS,
    Watcher,
    bring_in,
    plant_all,
    snapshot,
    take_out,
)

from imgfs import tree
from imgfs.format import Kind
from imgfs.import_tree import measure_tree
from imgfs.store import ROOT, Store, make_store
from imgfs.transfer import Tally, Totals

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes devices, or mounts a file system")


@pytest.fixture
def store_path(tmp_path: Path) -> str:
    path = str(tmp_path / "store")
    make_store(path, uid=os.geteuid(), gid=os.getegid())
    return path


@pytest.fixture
def store(store_path: str) -> Iterator[Store]:
    with Store.open(store_path) as opened:
        yield opened


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


# -- both ways ----------------------------------------------------------------------------------------------------


def test_a_tree_comes_out_as_it_went_in(store: Store, source: Path, tmp_path: Path) -> None:
    plant_all(source)
    went_in = snapshot(source)
    tally = bring_in(store, source)
    assert (tally.skipped, tally.incomplete, tally.separated) == (0, 0, 0)
    kinds = [node.kind for node in went_in.values()]
    assert tally.images + tally.symlinks + tally.special_files + tally.hard_links == len(kinds) - kinds.count(
        stat.S_IFDIR
    )
    assert tally.hard_links == 5 + (os.geteuid() == 0)
    out = take_out(store, tmp_path / "out")
    assert out == tally
    assert snapshot(tmp_path / "out") == went_in


def test_it_comes_out_of_the_volumes_alone(store_path: str, source: Path, tmp_path: Path) -> None:
    plant_all(source)
    with Store.open(store_path) as store:
        bring_in(store, source)
    for derived in [*Path(store_path).rglob("*.idx"), *Path(store_path).rglob("*.names")]:
        derived.unlink()
    with Store.open(store_path, writable=False) as store:
        take_out(store, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(source)


def test_a_further_name_costs_no_bytes(store: Store, source: Path) -> None:
    (source / "one").write_bytes(os.urandom(100_000))
    (source / "two").hardlink_to(source / "one")
    assert list(measure_tree(os.fsencode(source)))[-1] == Totals(1, 100_000)
    tally = bring_in(store, source)
    assert (tally.images, tally.hard_links, tally.data_bytes) == (1, 1, 100_000)
    assert store.resolve(b"one") == store.resolve(b"two")
    assert (store.counts().images, store.counts().live_bytes) == (1, 100_000)


def test_names_outside_of_what_is_copied_do_not_matter(store: Store, source: Path, tmp_path: Path) -> None:
    (source / "one").write_bytes(b"1")
    (tmp_path / "outside").hardlink_to(source / "one")
    bring_in(store, source)
    assert store.attr(store.resolve(b"one")).nlink == 1
    assert bring_in(store, source, resume=True).resumed == 1


# Which of a few files each name names: kind, content, time and whether it has an attribute are the file's.
NAMES = ("1", "2", "d/3", "d/4", "5")
# 0 to 2 differ in nothing that --resume looks at; so they come often.
FILES = [*[0, 1, 2] * 4, 3, 4, 5, 6, 7, 8, None]
plans = st.builds(
    # In the order in which they are made, which is that of the copy.
    lambda order, files: dict(zip(order, files, strict=True)),
    st.permutations(NAMES),
    st.tuples(*[st.sampled_from(FILES)] * len(NAMES)),
)


def plant(root: Path, plan: dict[str, int | None]) -> None:
    (root / "d").mkdir(parents=True)
    first: dict[int, Path] = {}
    for name, number in plan.items():
        path = root / name
        if number is None:
            continue
        if number in first:
            os.link(first[number], path, follow_symlinks=False)
            continue
        first[number] = path
        if number < 5:
            path.write_bytes(b"x" * max(1, number - 1))
            if number % 2:
                os.setxattr(path, "user.number", b"%d" % number)
        elif number < 7:
            path.symlink_to(str(number))
        else:
            os.mkfifo(path, 0o600 + number)
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)


@settings(max_examples=100, deadline=None)
@given(old=plans, new=plans, resume=st.booleans())
def test_a_tree_replaces_another_whatever_is_linked_in_either(
    old: dict[str, int | None], new: dict[str, int | None], resume: bool
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        before, after, target = (Path(scratch, name) for name in ("before", "after", "target"))
        plant(before, old)
        plant(after, new)
        make_store(f"{scratch}/store", uid=0, gid=0)
        with Store.open(f"{scratch}/store") as store:
            bring_in(store, before)
            bring_in(store, after, resume=resume)
            take_out(store, target)
        wanted, was, found = snapshot(after), snapshot(before), snapshot(target)
        assert found.keys() == wanted.keys() | was.keys()
        for path in was.keys() - wanted.keys():
            # What the second tree has not got is as the first one left it; if it shares an image that --resume took
            # for a file of the second tree, the attributes are those of that file.
            attributes = found[path].attributes if found[path].names & wanted.keys() else was[path].attributes
            assert found[path]._replace(names=frozenset()) == was[path]._replace(
                names=frozenset(), attributes=attributes
            )
        for path, node in wanted.items():
            names = found[path].names & wanted.keys()
            assert found[path]._replace(names=names) == node


@pytest.mark.parametrize("alone", ["1", "2", "3"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_name_that_was_linked_and_is_no_more_is_an_image_of_its_own(
    resume: bool, alone: str, store: Store, source: Path, tmp_path: Path
) -> None:
    plant(source / "before", dict.fromkeys("123", 0))
    plant(source / "after", dict.fromkeys("123", 0) | {alone: 1})
    bring_in(store, source / "before")
    bring_in(store, source / "after", resume=resume)
    take_out(store, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(source / "after")


# -- in -----------------------------------------------------------------------------------------------------------


def test_an_import_that_is_stopped_anywhere_is_resumed(store_path: str, source: Path, tmp_path: Path) -> None:
    plant_all(source)
    left = runs = 0

    def stop(tally: Tally) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with Store.open(store_path) as store:
        done = False
        while not done:
            left = runs = runs + 1
            with contextlib.suppress(KeyboardInterrupt):
                bring_in(store, source, Watcher(stop), resume=True)
                done = True
        assert runs > 10
        take_out(store, tmp_path / "out")
        assert snapshot(tmp_path / "out") == snapshot(source)
        assert b".imgfs" not in b" ".join(entry.name for entry in store.list(ROOT))


@pytest.mark.parametrize("call", ["set_xattr", "set_attr", "link", "rename"])
def test_an_import_that_died_between_two_needles_is_resumed(
    call: str, store_path: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_all(source)
    with Store.open(store_path) as store:
        # So that there is something to replace.
        store.symlink(ROOT, b"pointer", b"elsewhere", 0, 0)
        store.special(ROOT, b"pipe", stat.S_IFSOCK | 0o600, 0, 0, 0)
        real = getattr(Store, call)
        deaths = left = 0

        def die(*arguments: object, **more: object) -> object:
            nonlocal deaths, left
            left -= 1
            if left == 0:
                deaths += 1
                raise KeyboardInterrupt
            return real(*arguments, **more)

        monkeypatch.setattr(Store, call, die)
        for count in (1, 2, 3):
            left = count
            with contextlib.suppress(KeyboardInterrupt):
                bring_in(store, source, resume=True)
        assert deaths
        monkeypatch.setattr(Store, call, real)
        bring_in(store, source, resume=True)
        take_out(store, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(source)


def test_what_a_dead_import_left_is_not_written_through(store: Store, source: Path) -> None:
    (source / "name").symlink_to("new")
    store.put(ROOT, b"mine", b"mine", 4, mode=0o600, uid=0, gid=0, mtime_ns=0)
    store.symlink(ROOT, b"name", b"old", 0, 0)
    store.link(store.resolve(b"mine"), ROOT, b".imgfs-import-%d" % os.getpid())
    bring_in(store, source)
    assert store.readlink(store.resolve(b"name")) == b"new"
    assert (store.attr(store.resolve(b"mine")).kind, store.attr(store.resolve(b"mine")).nlink) == (Kind.FILE, 1)
    assert {entry.name for entry in store.list(ROOT)} == {b"mine", b"name"}


def test_resume_takes_names_that_were_linked_in_the_store_for_what_they_are(store: Store, source: Path) -> None:
    (source / "image").write_bytes(b"1")
    bring_in(store, source)
    inode = store.resolve(b"image")
    store.link(inode, ROOT, b"favourite")
    tally = bring_in(store, source, resume=True)
    assert (tally.resumed, tally.images) == (1, 0)
    assert store.resolve(b"image") == store.resolve(b"favourite") == inode


def test_resume_mends_attributes_and_copies_no_bytes(store: Store, source: Path, tmp_path: Path) -> None:
    plant_attributes_of_one(source / "image")
    bring_in(store, source)
    times = os.stat(source / "image")
    os.setxattr(source / "image", "user.changed", b"new")
    os.setxattr(source / "image", "user.added", b"")
    os.removexattr(source / "image", "user.removed")
    os.utime(source / "image", ns=(times.st_atime_ns, times.st_mtime_ns))
    tally = bring_in(store, source, resume=True)
    assert (tally.resumed, tally.images) == (1, 0)
    take_out(store, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(source)


def plant_attributes_of_one(path: Path) -> None:
    path.write_bytes(b"1")
    for name in ("user.changed", "user.same", "user.removed"):
        os.setxattr(path, name, b"old")


def test_attributes_are_replaced_with_their_image(store: Store, source: Path, tmp_path: Path) -> None:
    plant_attributes_of_one(source / "image")
    bring_in(store, source)
    (source / "image").unlink()
    (source / "image").write_bytes(b"22")
    os.setxattr(source / "image", "user.other", b"new")
    bring_in(store, source)
    take_out(store, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(source)


def test_an_attribute_that_the_store_does_not_take_is_named(store: Store, source: Path) -> None:
    (source / "image").write_bytes(b"1")
    os.setxattr(source / "image", "user.imgfs.checksum", b"forged")
    os.setxattr(source / "image", "user.mine", b"1")
    watcher = Watcher()
    tally = bring_in(store, source, watcher)
    assert (tally.images, tally.skipped, tally.incomplete) == (1, 0, 1)
    assert watcher.missing["image"].startswith("extended attribute user.imgfs.checksum: ")
    assert store.list_xattrs(store.resolve(b"image")) == [b"user.mine"]


@as_root
def test_access_control_lists_do_not_go_along(store: Store, source: Path) -> None:
    # version 2; rwx for the owner, r for user 1234, nothing for others.
    entries = [
        (0x01, 7, 0xFFFFFFFF),
        (0x02, 4, 1234),
        (0x04, 0, 0xFFFFFFFF),
        (0x10, 4, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    ]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + who.to_bytes(4, "little") for tag, mode, who in entries
    )
    (source / "image").write_bytes(b"1")
    os.setxattr(source / "image", "system.posix_acl_access", acl)
    watcher = Watcher()
    bring_in(store, source, watcher)
    assert watcher.missing == {}
    assert store.list_xattrs(store.resolve(b"image")) == []


def test_others_than_root_bring_in_what_is_theirs(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_all(source)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    watcher = Watcher()
    tally = bring_in(store, source, watcher)
    devices = {"null", "zero", "disk"} if tally.skipped else set()
    assert watcher.reasons == dict.fromkeys(devices, "only root can copy a device")
    assert watcher.missing == {}
    for path in source.rglob("*"):
        if path.name not in devices:
            kept = store.list_xattrs(store.resolve(os.fsencode(path.relative_to(source))))
            found = os.listxattr(path, follow_symlinks=False)
            assert kept == [os.fsencode(name) for name in found if name.startswith("user.")]


def test_a_file_that_changes_between_its_names_is_two_images(store: Store, source: Path) -> None:
    (source / "one").write_bytes(b"old")
    (source / "two").hardlink_to(source / "one")

    def change(tally: Tally) -> None:
        if tally.images == 1:
            (source / "one").write_bytes(b"new and longer")

    bring_in(store, source, Watcher(change))
    contents = set()
    for name in (b"one", b"two"):
        handle = store.open_image(store.resolve(name))
        contents.add(bytes(store.read(handle, 0, 100)))
        store.release(handle)
    assert contents == {b"old", b"new and longer"}
    bring_in(store, source, resume=True)
    assert store.resolve(b"one") == store.resolve(b"two")
    assert store.attr(store.resolve(b"one")).size == len(b"new and longer")


def test_names_beyond_the_limit_become_images_of_their_own(
    store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "LINKS_MAX", 3)
    (source / "0").write_bytes(b"x")
    for number in range(1, 8):
        (source / f"{number}").hardlink_to(source / "0")
    tally = bring_in(store, source)
    assert (tally.images, tally.hard_links, tally.separated) == (3, 5, 2)
    assert sorted(store.attr(entry.inode).nlink for entry in store.list(ROOT)) == [2, 2, 3, 3, 3, 3, 3, 3]
    take_out(store, tmp_path / "out")
    assert {path.read_bytes() for path in (tmp_path / "out").iterdir()} == {b"x"}
