"""Trees go into a store and come out of it as they were, past FUSE, and what cannot is named."""

import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import Watcher, bring_in, snapshot, take_out

from imgfs.errors import InvalidArgument, NotADirectory, NotFound
from imgfs.format import Kind
from imgfs.import_tree import measure_tree
from imgfs.store import Store, make_store
from imgfs.transfer import PIECE_BYTES, Tally, Totals

OLD_NS = 981_173_106_123_456_789


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


def make_tree(root: Path) -> None:
    """Fill *root* with one of everything that a store keeps."""
    (root / "2024" / "06 June").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o700)
    (root / "none").write_bytes(b"")
    (root / "2024" / "small.jpg").write_bytes(b"small" * 100)
    (root / "2024" / "06 June" / "large.tif").write_bytes(os.urandom(2 * PIECE_BYTES + 12345))
    (root / "2024" / "06 June" / "mebibyte").write_bytes(os.urandom(1 << 20))
    (root / "2024" / "link").symlink_to("06 June/large.tif")
    (root / "2024" / "dangling").symlink_to("../nowhere")
    Path(os.fsdecode(os.fsencode(root) + b"/not utf-8 \xff\n")).write_bytes(b"x")
    (root / "2024" / "small.jpg").chmod(0o640)
    (root / "none").chmod(0o4755)
    (root / "2024").chmod(0o2775)
    os.utime(root / "2024" / "small.jpg", ns=(OLD_NS, OLD_NS))
    os.utime(root / "2024" / "link", ns=(OLD_NS, OLD_NS + 1), follow_symlinks=False)
    os.utime(root / "none", ns=(-5_000_000_001, -5_000_000_001))  # before 1970
    os.utime(root / "2024" / "06 June", ns=(OLD_NS, OLD_NS + 2))
    os.utime(root / "2024", ns=(OLD_NS, OLD_NS + 3))
    if os.geteuid() == 0:
        os.chown(root / "2024" / "small.jpg", 1234, 5678)
        os.chown(root / "2024" / "dangling", 1234, 5678, follow_symlinks=False)
        os.chown(root / "empty", 33, 33)
    os.utime(root, ns=(OLD_NS, OLD_NS + 4))


# -- both ways ----------------------------------------------------------------------------------------------------


def test_a_tree_comes_out_as_it_went_in(store: Store, source: Path, tmp_path: Path) -> None:
    make_tree(source)
    tally = bring_in(store, source)
    assert (tally.images, tally.directories, tally.symlinks, tally.skipped) == (5, 3, 2, 0)
    assert tally.data_bytes == sum(len(node.content) for node in snapshot(source).values() if stat.S_ISREG(node.kind))
    out = take_out(store, tmp_path / "out")
    assert (out.images, out.directories, out.symlinks, out.data_bytes) == (5, 3, 2, tally.data_bytes)
    assert snapshot(tmp_path / "out") == snapshot(source)


def test_it_comes_out_of_the_volumes_alone(store_path: str, source: Path, tmp_path: Path) -> None:
    make_tree(source)
    with Store.open(store_path) as store:
        bring_in(store, source)
    for derived in [*Path(store_path).rglob("*.idx"), *Path(store_path).rglob("*.names")]:
        derived.unlink()
    with Store.open(store_path, writable=False) as store:
        take_out(store, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(source)


names = (
    st.binary(min_size=1, max_size=20)
    .map(lambda name: name.translate(None, b"/\0"))
    .filter(lambda name: name not in (b"", b".", b".."))
)
trees = st.recursive(
    st.one_of(st.binary(max_size=200), st.builds(lambda target: ("link", target), names)),
    lambda entry: st.dictionaries(names, entry, max_size=5),
    max_leaves=20,
)


@settings(max_examples=40, deadline=None)
@given(tree=st.dictionaries(names, trees, max_size=5))
def test_any_tree_comes_out_as_it_went_in(tree: dict[bytes, object]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "source"), Path(scratch, "target")
        plant(os.fsencode(source), tree)
        make_store(f"{scratch}/store", uid=0, gid=0)
        with Store.open(f"{scratch}/store") as store:
            bring_in(store, source)
            take_out(store, target)
        assert snapshot(target) == snapshot(source)


def plant(path: bytes, entry: object) -> None:
    if isinstance(entry, dict):
        os.mkdir(path)
        for name, child in entry.items():
            plant(os.path.join(path, name), child)
    elif isinstance(entry, tuple):
        os.symlink(entry[1], path)
    else:
        assert isinstance(entry, bytes)
        Path(os.fsdecode(path)).write_bytes(entry)


# -- in -----------------------------------------------------------------------------------------------------------


def test_the_size_of_a_tree_is_known_before(source: Path) -> None:
    make_tree(source)
    *_, totals = measure_tree(os.fsencode(source))
    assert totals == Totals(5, 500 + (1 << 20) + 2 * PIECE_BYTES + 12345 + 1)


def test_into_makes_the_directories_that_are_missing(store: Store, source: Path) -> None:
    (source / "a").write_bytes(b"1")
    bring_in(store, source, into=b"/2024//./june/")
    assert store.attr(store.resolve(b"2024/june/a")).size == 1
    assert store.attr(store.resolve(b"2024")).mode == 0o755


def test_into_does_not_lead_through_an_image(store: Store, source: Path) -> None:
    (source / "a").write_bytes(b"1")
    bring_in(store, source)
    with pytest.raises(NotADirectory, match=r"'a/b'.*--into"):
        bring_in(store, source, into=b"a/b")
    with pytest.raises(NotADirectory, match="--into"):
        bring_in(store, source, into=b"a")


@pytest.mark.parametrize("into", [b"..", b"../x", b"2024/../../x"])
def test_into_does_not_lead_out_of_the_store(into: bytes, store: Store, source: Path) -> None:
    with pytest.raises(InvalidArgument, match="leads out of the store"):
        bring_in(store, source, into=into)
    assert list(store.list(1)) == []


def test_what_has_the_name_is_replaced(store: Store, source: Path, tmp_path: Path) -> None:
    for name in ("file", "becomes a link", "sub/file"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"old")
    for name in ("link", "becomes a file", "stays"):
        (source / name).symlink_to("old")
    bring_in(store, source)
    stays = store.resolve(b"stays")

    (source / "file").write_bytes(b"new")
    (source / "sub" / "file").write_bytes(b"new, and longer")
    (source / "sub").chmod(0o700)
    (source / "becomes a link").unlink()
    (source / "becomes a link").symlink_to("new")
    (source / "link").unlink()
    (source / "link").symlink_to("new")
    (source / "becomes a file").unlink()
    (source / "becomes a file").write_bytes(b"new")
    tally = bring_in(store, source)
    assert tally.skipped == tally.directories == 0
    assert store.resolve(b"stays") == stays
    take_out(store, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(source)


def test_a_directory_is_neither_replaced_nor_does_it_replace(store: Store, source: Path) -> None:
    (source / "directory").mkdir()
    (source / "linked").mkdir()
    (source / "file").write_bytes(b"1")
    bring_in(store, source)
    for name in ("directory", "linked"):
        (source / name).rmdir()
    (source / "file").unlink()
    (source / "directory").write_bytes(b"2")
    (source / "linked").symlink_to("elsewhere")
    (source / "file").mkdir()
    (source / "file" / "below").write_bytes(b"3")
    (source / "other").write_bytes(b"4")
    watcher = Watcher()
    tally = bring_in(store, source, watcher)
    assert set(watcher.reasons) == {"directory", "linked", "file"}
    assert (tally.skipped, tally.images) == (3, 1)
    assert store.attr(store.resolve(b"file")).kind == Kind.FILE
    assert store.attr(store.resolve(b"directory")).kind == Kind.DIRECTORY


def test_a_file_that_is_too_large_is_skipped_and_named(store: Store, source: Path) -> None:
    with (source / "huge").open("wb") as huge:
        huge.truncate(1 << 32)
    (source / "image").write_bytes(b"1")
    watcher = Watcher()
    tally = bring_in(store, source, watcher)
    assert watcher.reasons == {"huge": "an image has at most 4 GiB - 1 bytes"}
    assert (tally.skipped, tally.images) == (1, 1)


def test_the_store_itself_is_not_imported(tmp_path: Path, store: Store) -> None:
    (tmp_path / "image").write_bytes(b"1")
    watcher = Watcher()
    bring_in(store, tmp_path, watcher)
    assert watcher.reasons == {"store": "it is the store itself"}
    with pytest.raises(NotFound):
        store.resolve(b"store")


def test_nothing_is_imported_from_within_the_store(tmp_path: Path, store: Store) -> None:
    (tmp_path / "elsewhere").symlink_to(store.path)
    for source in (Path(store.path), Path(store.path, "volumes"), tmp_path / "elsewhere"):
        with pytest.raises(InvalidArgument, match="imported into itself"):
            bring_in(store, source)
    assert list(store.list(1)) == []


def test_resume_leaves_alone_what_is_there(store: Store, source: Path) -> None:
    for name in ("same", "touched", "longer", "link"):
        (source / name).write_bytes(b"1")
        os.utime(source / name, ns=(OLD_NS, OLD_NS))
    (source / "link").unlink()
    (source / "link").symlink_to("same")
    bring_in(store, source)
    (source / "touched").write_bytes(b"2")
    (source / "longer").write_bytes(b"22")
    os.utime(source / "longer", ns=(OLD_NS, OLD_NS))
    (source / "new").write_bytes(b"2")
    end = store.counts().volume_bytes
    tally = bring_in(store, source, resume=True)
    assert (tally.resumed, tally.images) == (1, 3)
    assert store.counts().volume_bytes > end
    assert bring_in(store, source, resume=True).resumed == 4


def test_an_import_that_is_stopped_leaves_whole_images(store_path: str, source: Path) -> None:
    for number in range(20):
        (source / f"{number:02}").write_bytes(bytes([number]) * 1000)

    def stop(tally: Tally) -> None:
        if tally.images == 7:
            raise KeyboardInterrupt

    with Store.open(store_path) as store, pytest.raises(KeyboardInterrupt):
        bring_in(store, source, Watcher(stop))
    with Store.open(store_path) as store:
        assert store.report.torn_bytes == 0
        entries = list(store.list(1))
        assert len(entries) == 7
        for entry in entries:
            handle = store.open_image(entry.inode)
            assert store.read(handle, 0, 2000) == bytes([int(entry.name)]) * 1000
            store.release(handle)


def test_an_import_that_is_stopped_within_an_image_leaves_nothing_of_it(store_path: str, source: Path) -> None:
    (source / "large").write_bytes(os.urandom(3 * PIECE_BYTES))

    def stop(tally: Tally) -> None:
        raise KeyboardInterrupt

    with Store.open(store_path) as store, pytest.raises(KeyboardInterrupt):
        bring_in(store, source, Watcher(stop))
    with Store.open(store_path) as store:
        assert list(store.list(1)) == []
        assert store.report.torn_bytes == 0
        assert store.report.damage == []


def test_a_file_that_shrinks_meanwhile_is_skipped(store_path: str, source: Path) -> None:
    (source / "large").write_bytes(os.urandom(3 * PIECE_BYTES))

    def shrink(tally: Tally) -> None:
        os.truncate(source / "large", PIECE_BYTES + 1)

    watcher = Watcher(shrink)
    with Store.open(store_path) as store:
        tally = bring_in(store, source, watcher)
        assert watcher.reasons == {"large": "it became shorter while it was read"}
        assert (tally.images, tally.data_bytes) == (0, 0)
    with Store.open(store_path) as store:
        assert list(store.list(1)) == []
        assert store.report.torn_bytes == 0


def test_a_file_that_cannot_be_read_is_skipped(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "gone").write_bytes(b"1")
    (source / "here").write_bytes(b"1")
    real = os.open

    def vanish(path: bytes, *rest: int, **more: int) -> int:
        if os.fspath(path) == os.fsencode(source / "gone"):
            raise FileNotFoundError(2, "No such file or directory")
        return real(path, *rest, **more)

    monkeypatch.setattr("imgfs.import_tree.os.open", vanish)
    watcher = Watcher()
    assert bring_in(store, source, watcher).images == 1
    assert watcher.reasons == {"gone": "no such file or directory"}


def test_others_than_root_keep_what_they_import(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "image").write_bytes(b"1")
    (source / "image").chmod(0o4755)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 1001)
    bring_in(store, source)
    attr = store.attr(store.resolve(b"image"))
    assert (attr.uid, attr.gid, attr.mode) == (1000, 1001, 0o755)


# -- out ----------------------------------------------------------------------------------------------------------


def damage(store: Store, store_path: str, path: bytes, at: int = 10) -> None:
    """Flip a bit of the data of an image."""
    place = store.locate(store.resolve(path))
    with open(f"{store_path}/volumes/{place.volume:08d}.vol", "r+b") as volume:
        volume.seek(place.data_offset + at)
        byte = volume.read(1)[0]
        volume.seek(-1, os.SEEK_CUR)
        volume.write(bytes([byte ^ 1]))


def test_a_damaged_image_is_left_out(store_path: str, source: Path, tmp_path: Path) -> None:
    (source / "small").write_bytes(os.urandom(1000))
    (source / "large").write_bytes(os.urandom(3 * PIECE_BYTES))
    (source / "whole").write_bytes(b"whole")
    with Store.open(store_path) as store:
        bring_in(store, source)
        damage(store, store_path, b"small")
        damage(store, store_path, b"large", at=2 * PIECE_BYTES + 5)
    watcher = Watcher()
    with Store.open(store_path, writable=False) as store:
        tally = take_out(store, tmp_path / "out", watcher)
    assert set(watcher.reasons) == {"small", "large"}
    assert (tally.damaged, tally.skipped, tally.images) == (2, 2, 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_what_is_in_the_way_is_replaced(store: Store, source: Path, tmp_path: Path) -> None:
    make_tree(source)
    bring_in(store, source)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.write_bytes(b"mine")
    (out / "none").symlink_to(elsewhere)
    (out / "2024").mkdir(mode=0o711)
    (out / "2024" / "small.jpg").write_bytes(b"old")
    (out / "2024" / "link").write_bytes(b"old")
    take_out(store, out)
    assert snapshot(out) == snapshot(source)
    assert elsewhere.read_bytes() == b"mine"


def test_a_link_in_the_way_of_a_directory_is_not_followed(store: Store, source: Path, tmp_path: Path) -> None:
    (source / "album").mkdir()
    (source / "album" / "image").write_bytes(b"1")
    bring_in(store, source)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "album").symlink_to(elsewhere)
    watcher = Watcher()
    take_out(store, out, watcher)
    assert watcher.reasons == {"album": "something else has that name"}
    assert list(elsewhere.iterdir()) == []


def test_a_directory_in_the_way_of_an_image_is_kept(store: Store, source: Path, tmp_path: Path) -> None:
    (source / "image").write_bytes(b"1")
    bring_in(store, source)
    (tmp_path / "out" / "image").mkdir(parents=True)
    watcher = Watcher()
    assert take_out(store, tmp_path / "out", watcher).skipped == 1
    assert watcher.reasons == {"image": "is a directory"}


def test_nothing_is_exported_into_the_store(store: Store) -> None:
    with pytest.raises(InvalidArgument, match="within the store"):
        take_out(store, Path(store.path, "volumes", "out"))
    assert not Path(store.path, "volumes", "out").exists()


def test_an_export_that_is_stopped_leaves_no_half_image(store: Store, source: Path, tmp_path: Path) -> None:
    (source / "large").write_bytes(os.urandom(3 * PIECE_BYTES))
    bring_in(store, source)

    def stop(tally: Tally) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_out(store, tmp_path / "out", Watcher(stop))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_ends_an_export(store: Store, source: Path, tmp_path: Path) -> None:
    for number in range(4):
        (source / f"{number}").write_bytes(os.urandom(60_000))
    bring_in(store, source)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(out)], check=True)
    try:
        with pytest.raises(OSError, match="No space") as caught:
            take_out(store, out)
        assert caught.value.filename is not None
        for path in out.iterdir():
            assert path.read_bytes() == (source / path.name).read_bytes()
    finally:
        subprocess.run(["umount", str(out)], check=True)
