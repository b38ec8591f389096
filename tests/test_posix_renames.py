"""Renaming, replacing and exchanging by the book, on a mount as on plain XFS."""

import os
import threading
from pathlib import Path

import pytest
from mounted import Mounted, failure
from places import KINDS, RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

# One mount for all of them.
pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.xdist_group("posix renames")]


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_renaming_over_what_is_there(place: Path, source: str, target: str) -> None:
    old, new = place / "old", place / "new"
    KINDS[source](old)
    KINDS[target](new)
    number = os.lstat(old).st_ino
    if (source == "directory") == (target == "directory"):
        os.rename(old, new)
        assert os.listdir(place) == ["new"]
        assert os.lstat(new).st_ino == number
        if target == "directory":
            (new / "full").touch()
            KINDS[source](old)
            assert failure(os.rename, old, new) in ("ENOTEMPTY", "EEXIST")  # XFS says the latter
    else:
        assert failure(os.rename, old, new) == ("ENOTDIR" if source == "directory" else "EISDIR")
        assert sorted(os.listdir(place)) == ["new", "old"]


def test_renames_that_cannot_be(place: Path) -> None:
    (place / "a" / "b").mkdir(parents=True)
    (place / "image").touch()
    assert failure(os.rename, place / "a", place / "a" / "b" / "c") == "EINVAL"
    assert failure(os.rename, place / "a" / "b", place / "a") in ("ENOTEMPTY", "EEXIST")
    assert failure(os.rename, place / "absent", place / "image") == "ENOENT"
    assert failure(os.rename, place / "image", place / "absent" / "image") == "ENOENT"
    assert failure(os.rename, place / "image", f"{place}/image/") == "ENOTDIR"
    assert failure(os.rename, place / "image", place.parent.parent / "elsewhere") == "EXDEV"
    os.rename(place / "a", place / "a")
    os.rename(place / "a", f"{place}/z/")
    assert sorted(os.listdir(place)) == ["image", "z"]


def test_renaming_a_name_to_another_of_the_same_image_does_nothing(place: Path) -> None:
    (place / "one").write_bytes(b"content")
    os.link(place / "one", place / "two")
    os.rename(place / "one", place / "two")
    assert sorted(os.listdir(place)) == ["one", "two"]
    assert (place / "one").stat().st_nlink == 2


def test_a_replaced_image_keeps_its_other_names(place: Path) -> None:
    (place / "old").write_bytes(b"old")
    (place / "new").write_bytes(b"new")
    os.link(place / "old", place / "old again")
    os.link(place / "new", place / "new again")
    os.rename(place / "new", place / "old")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        "old": b"new",
        "new again": b"new",
        "old again": b"old",
    }
    assert [(place / name).stat().st_nlink for name in ("old", "new again", "old again")] == [2, 2, 1]


def test_noreplace(place: Path) -> None:
    for kind, make in KINDS.items():
        make(place / kind)
    for kind in KINDS:
        assert failure(renameat2, place / "file", place / kind, RENAME_NOREPLACE) == "EEXIST"
    renameat2(place / "file", place / "free", RENAME_NOREPLACE)
    assert (place / "free").read_bytes() == b"content"
    assert failure(renameat2, place / "file", place / "other", RENAME_NOREPLACE) == "ENOENT"


@pytest.mark.parametrize("kind", KINDS)
def test_exchange(place: Path, kind: str) -> None:
    (place / "below").mkdir()
    KINDS["directory"](place / "a")
    (place / "a" / "inside").touch()
    KINDS[kind](place / "below" / "b")
    a, b = os.lstat(place / "a").st_ino, os.lstat(place / "below" / "b").st_ino
    renameat2(place / "a", place / "below" / "b", RENAME_EXCHANGE)
    assert (os.lstat(place / "a").st_ino, os.lstat(place / "below" / "b").st_ino) == (b, a)
    assert os.listdir(place / "below" / "b") == ["inside"]
    assert (place / "below" / "b" / "..").stat().st_ino == (place / "below").stat().st_ino
    renameat2(place / "below" / "b", place / "a", RENAME_EXCHANGE)
    assert (os.lstat(place / "a").st_ino, os.lstat(place / "below" / "b").st_ino) == (a, b)


def test_exchanges_that_cannot_be(place: Path) -> None:
    (place / "a" / "b").mkdir(parents=True)
    (place / "image").write_bytes(b"content")
    assert failure(renameat2, place / "a", place / "a" / "b", RENAME_EXCHANGE) == "EINVAL"
    assert failure(renameat2, place / "a" / "b", place / "a", RENAME_EXCHANGE) == "EINVAL"
    assert failure(renameat2, place / "image", place / "absent", RENAME_EXCHANGE) == "ENOENT"
    assert failure(renameat2, place / "image", place / "a", RENAME_EXCHANGE | RENAME_NOREPLACE) == "EINVAL"
    os.link(place / "image", place / "again")
    renameat2(place / "image", place / "again", RENAME_EXCHANGE)
    assert (place / "image").stat().st_nlink == 2


def test_an_exchange_survives_a_crash(mounted: Mounted) -> None:
    (mounted.point / "a").write_bytes(b"a")
    (mounted.point / "below").mkdir()
    (mounted.point / "below" / "b").mkdir()
    renameat2(mounted.point / "a", mounted.point / "below" / "b", RENAME_EXCHANGE)
    mounted.kill()
    mounted.start()
    assert (mounted.point / "below" / "b").read_bytes() == b"a"
    assert (mounted.point / "a").is_dir()
    assert (mounted.point / "below").stat().st_nlink == 2


def test_a_name_that_is_replaced_again_and_again_is_always_there(place: Path) -> None:
    """By rename, by a link, and by exchange: whoever opens the name gets one image or the other, never an error."""
    name = place / "name"
    (place / "a").write_bytes(b"a" * 1000)
    (place / "b").write_bytes(b"b" * 1000)
    os.link(place / "a", name)
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            try:
                with open(name, "rb") as file:
                    os.fstat(file.fileno())
                    content = file.read()
            except OSError as error:
                wrong.append(error)
                return
            if content not in (b"a" * 1000, b"b" * 1000, b"c" * 1000):
                wrong.append(content)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(1, 60):
            _link(place / "ab"[number % 2], place / "next")
            os.rename(place / "next", name)
            (place / "next").write_bytes(b"c" * 1000)
            renameat2(place / "next", name, RENAME_EXCHANGE)
            os.unlink(place / "next")
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert wrong == []


def _link(source: Path, target: Path) -> None:
    """Link; once more if the kernel believes that *source* has lost its last name.

    When a name goes, it lowers the number of names that it knows, also where an answer to somebody's `stat` has just
    told it the new one. It then refuses the link without asking the daemon; another `stat` sets it right.
    """
    try:
        os.link(source, target)
    except FileNotFoundError:
        assert os.stat(source).st_nlink == 1
        os.link(source, target)
