"""What comes out of a store that has several names, or no bytes, or extended attributes, where that is not easy."""

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from trees import (
    Watcher,
    bring_in,
    plant_all,
    plant_attributes,
    plant_links,
    snapshot,
    take_out,
)

from imgfs.store import ROOT, Store, make_store

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


def test_a_second_export_replaces_links_and_writes_through_none(store: Store, source: Path, tmp_path: Path) -> None:
    plant_all(source)
    bring_in(store, source)
    out, mine = tmp_path / "out", tmp_path / "mine"
    take_out(store, out)
    mine.hardlink_to(out / "a" / "photo")
    before = mine.stat()
    (out / "b" / "third").unlink()
    (out / "b" / "third").symlink_to(mine)
    (out / "b" / "pipe").unlink()
    (out / "b" / "pipe").write_bytes(b"in the way")
    assert take_out(store, out).skipped == 0
    assert snapshot(out) == snapshot(source)
    assert (mine.stat().st_ino, mine.stat().st_mtime_ns, mine.stat().st_nlink) == (before.st_ino, before.st_mtime_ns, 1)


def test_a_directory_in_the_way_of_a_link_or_a_pipe_is_kept(store: Store, source: Path, tmp_path: Path) -> None:
    plant_links(source)
    bring_in(store, source)
    for name in ("b/third", "b/socket"):
        (tmp_path / "out" / name).mkdir(parents=True)
    watcher = Watcher()
    assert take_out(store, tmp_path / "out", watcher).skipped == 2
    assert watcher.reasons == dict.fromkeys(["third", "socket"], "is a directory")
    assert (tmp_path / "out" / "a" / "photo").stat().st_nlink == 2


@as_root
@pytest.mark.root
def test_names_on_two_file_systems_are_copies(store: Store, source: Path, tmp_path: Path) -> None:
    plant_links(source)
    os.setxattr(source / "large", "user.rating", b"5")
    bring_in(store, source)
    out = tmp_path / "out"
    (out / "b").mkdir(parents=True)
    with mounted_there(out / "b", "ramfs"):
        watcher = Watcher()
        tally = take_out(store, out, watcher)
        copies = {path: node._replace(names=frozenset()) for path, node in snapshot(out).items()}
        wanted = {path: node._replace(names=frozenset()) for path, node in snapshot(source).items()}
        # ramfs keeps no attributes: that is told, and hinders nothing.
        large = wanted[b"b/large too"]
        wanted[b"b/large too"] = large._replace(attributes={})
        assert copies == wanted
        assert (tally.separated, tally.skipped, tally.incomplete) == (4, 0, 1)
        assert list(watcher.missing) == ["large too"]


@as_root
@pytest.mark.root
def test_where_no_attributes_are_kept_it_is_said_once(store: Store, source: Path, tmp_path: Path) -> None:
    for number in range(5):
        (source / f"{number}").write_bytes(b"%d" % number)
        os.setxattr(source / f"{number}", "user.number", b"1")
    bring_in(store, source)
    with mounted_there(tmp_path / "out", "ramfs"):
        watcher = Watcher()
        tally = take_out(store, tmp_path / "out", watcher)
        assert (tally.images, tally.skipped, tally.incomplete) == (5, 0, 5)
        assert list(watcher.missing.values()) == [
            "extended attribute user.number: operation not supported, nor any of user on others"
        ]


@contextlib.contextmanager
def mounted_there(point: Path, kind: str) -> Iterator[None]:
    point.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", kind, kind, str(point)], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", str(point)], check=True, timeout=30)


def test_others_than_root_take_out_what_they_may(
    store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_links(source)
    plant_attributes(source)
    bring_in(store, source)
    store.special(ROOT, b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3), 0, 0)
    store.special(ROOT, b"whiteout", stat.S_IFCHR, 0, 0, 0)
    store.set_xattr(store.resolve(b"large"), b"trusted.secret", b"1")
    store.set_xattr(store.resolve(b"large"), b"security.label", b"1")
    store.set_attr(ROOT, mtime_ns=source.stat().st_mtime_ns)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    watcher = Watcher()
    take_out(store, tmp_path / "out", watcher)
    assert watcher.reasons == dict.fromkeys(["null", "whiteout"], "only root can make a device")
    assert watcher.missing == {}
    assert snapshot(tmp_path / "out") == snapshot(source)


def test_damaged_attributes_cost_the_attributes(store_path: str, source: Path, tmp_path: Path) -> None:
    (source / "image").write_bytes(b"1")
    os.setxattr(source / "image", "user.marked", b"find me in the volume")
    with Store.open(store_path) as store:
        bring_in(store, source)
    (volume,) = Path(store_path, "volumes").glob("*.vol")
    content = volume.read_bytes()
    with volume.open("r+b") as file:
        file.seek(content.index(b"find me"))
        file.write(b"F")
    watcher = Watcher()
    with Store.open(store_path, writable=False) as store:
        tally = take_out(store, tmp_path / "out", watcher)
    assert (tally.images, tally.skipped, tally.incomplete, tally.damaged) == (1, 0, 1, 1)
    assert "damaged" in watcher.missing["image"]
    assert (tmp_path / "out" / "image").read_bytes() == b"1"
