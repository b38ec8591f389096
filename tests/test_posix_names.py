"""Names, paths, hard links and renaming by the book, on a mount as on plain XFS."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import Mounted, failure, imgfs
from places import (
    KINDS,
    NO_DIRECTORIES,
    RENAME_EXCHANGE,
    Listing,
    link_of_open,
    renameat2,
    utimensat,
)

# One mount for all of them.
pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.xdist_group("posix names")]

NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 4095
NOW = (0, (1 << 30) - 1)

# Everything that takes a path to something that is there.
ON_EXISTING: dict[str, Callable[[Path], object]] = {
    "open": lambda path: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)),
    "stat": os.stat,
    "open as a place": lambda path: os.close(os.open(path, os.O_PATH)),
    "chmod": lambda path: os.chmod(path, 0o644),
    "chown": lambda path: os.chown(path, 0, 0),
    "truncate": lambda path: os.truncate(path, 0),
    "utimensat": lambda path: utimensat(path, NOW, NOW),
    "chdir": os.chdir,
    "listdir": os.listdir,
    "getxattr": lambda path: os.getxattr(path, "user.x"),
    "exec": lambda path: os.execv(path, ["x"]),
}
# Everything that takes a path to a name, and does not follow a link there.
ON_NAMES: dict[str, Callable[[Path], object]] = {
    "lstat": os.lstat,
    "readlink": os.readlink,
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "lchown": lambda path: os.lchown(path, 0, 0),
    "rename from": lambda path: os.rename(path, path.parent / "renamed"),
    "link from": lambda path: os.link(path, path.parent / "linked", follow_symlinks=False),
}
# Everything that makes a name.
MAKING: dict[str, Callable[[Path], object]] = {
    "create": lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    "mkdir": os.mkdir,
    "symlink": lambda path: os.symlink("target", path),
    "mkfifo": os.mkfifo,
    "mknod": lambda path: os.mknod(path, stat.S_IFREG | 0o644),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 3)),
    "link to": lambda path: os.link(path.parent.parent / "spare", path),
    "rename to": lambda path: os.rename(path.parent.parent / "spare", path),
}
EVERY_CALL = ON_EXISTING | ON_NAMES | MAKING


def _failures(calls: dict[str, Callable[[Path], object]], path: Path) -> dict[str, str]:
    return {name: failure(call, path) for name, call in calls.items()}


# -- paths ------------------------------------------------------------------------------------------------------------


def test_a_name_has_at_most_255_bytes(place: Path) -> None:
    (place / "spare").touch()
    directory = place / "directory"
    directory.mkdir()
    assert _failures(EVERY_CALL, directory / ("n" * 256)) == dict.fromkeys(EVERY_CALL, "ENAMETOOLONG")
    for call in MAKING.values():
        (place / "spare").touch()
        longest = directory / ("n" * NAME_BYTES_MAX)
        call(longest)
        assert os.listdir(directory) == [longest.name]
        longest.rmdir() if longest.is_dir() and not longest.is_symlink() else longest.unlink()


def test_a_path_has_at_most_4095_bytes(place: Path) -> None:
    (place / "spare").touch()
    length = len(os.fsencode(place))
    steps = "/" + "./" * ((PATH_BYTES_MAX - length - 4) // 2)
    longest = f"{place}{steps}".ljust(PATH_BYTES_MAX, "x")
    with open(longest, "w") as file:
        file.write("deep")
    with open(longest) as file:
        assert file.read() == "deep"
    os.rename(longest, f"{longest[:-1]}y")
    os.unlink(f"{longest[:-1]}y")
    for call in (os.stat, os.lstat, os.unlink, os.mkdir, os.mkfifo, os.readlink):
        assert failure(call, longest + "x") == "ENAMETOOLONG"
    # A path counts from where one is, so directories can lie deeper.
    at = os.open(place, os.O_PATH)
    for _ in range(20):
        os.mkdir("d" * NAME_BYTES_MAX, dir_fd=at)
        below = os.open("d" * NAME_BYTES_MAX, os.O_PATH, dir_fd=at)
        os.close(at)
        at = below
    os.mkdir("bottom", dir_fd=at)
    assert os.stat("bottom", dir_fd=at).st_nlink == 2
    os.close(at)


@pytest.mark.parametrize("kind", NO_DIRECTORIES)
def test_what_is_no_directory_leads_nowhere(place: Path, kind: str) -> None:
    (place / "spare").touch()
    KINDS[kind](place / "it")
    expected = "ENOENT" if kind == "link" else "ENOTDIR"
    calls = {name: call for name, call in EVERY_CALL.items() if name not in ("link to", "rename to")}
    assert _failures(calls, place / "it" / "below") == dict.fromkeys(calls, expected)
    for call in (os.link, os.rename):
        assert failure(call, place / "spare", place / "it" / "below") == expected
    assert failure(os.open, place / "it", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) == "ENOTDIR"
    assert failure(os.rmdir, place / "it") == "ENOTDIR"


def test_a_link_to_itself_is_eloop(place: Path) -> None:
    (place / "spare").touch()
    os.symlink("loop", place / "loop")
    os.symlink("ring2", place / "ring1")
    os.symlink("ring1", place / "ring2")
    for name in ("loop", "ring1"):
        assert _failures(ON_EXISTING, place / name) == dict.fromkeys(ON_EXISTING, "ELOOP")
        below = {call: function for call, function in EVERY_CALL.items() if call not in ("link to", "rename to")}
        assert _failures(below, place / name / "below") == dict.fromkeys(below, "ELOOP")
    assert failure(os.open, place / "loop", os.O_RDONLY | os.O_NOFOLLOW) == "ELOOP"
    assert failure(os.open, place / "loop", os.O_CREAT | os.O_WRONLY) == "ELOOP"


def test_a_path_follows_at_most_40_links(place: Path) -> None:
    (place / "0").write_bytes(b"found")
    for number in range(1, 42):
        os.symlink(f"{number - 1}", place / f"{number}")
    assert (place / "40").read_bytes() == b"found"
    assert failure(os.stat, place / "41") == "ELOOP"


def test_links_lead_where_they_say(place: Path) -> None:
    (place / "directory").mkdir()
    (place / "directory" / "image").write_bytes(b"content")
    os.symlink("directory/../directory", place / "link")
    os.symlink(place / "link", place / "directory" / "up")
    assert (place / "link" / "up" / "up" / "image").read_bytes() == b"content"
    assert os.lstat(place / "link").st_size == len("directory/../directory")
    assert failure(os.readlink, place / "directory") == "EINVAL"
    assert failure(os.readlink, place / "directory" / "image") == "EINVAL"
    assert failure(os.symlink, "", place / "empty") == "ENOENT"
    assert failure(os.symlink, "x" * 4096, place / "long") == "ENAMETOOLONG"
    os.symlink("not yet", place / "dangling")
    (place / "dangling").write_bytes(b"made through the link")
    assert (place / "not yet").read_bytes() == b"made through the link"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_not_made_again(place: Path, kind: str) -> None:
    directory = place / "directory"
    directory.mkdir()
    (place / "spare").touch()
    KINDS[kind](directory / "it")
    before = os.lstat(directory / "it")
    calls = {name: call for name, call in MAKING.items() if name != "rename to"}
    assert _failures(calls, directory / "it") == dict.fromkeys(calls, "EEXIST")
    assert os.lstat(directory / "it") == before


def test_directories_that_cannot_go(place: Path) -> None:
    (place / "full").mkdir()
    for kind, make in KINDS.items():
        make(place / "full" / "it")
        assert failure(os.rmdir, place / "full") == "ENOTEMPTY"
        (os.rmdir if kind == "directory" else os.unlink)(place / "full" / "it")
    assert failure(os.rmdir, f"{place}/full/.") == "EINVAL"
    assert failure(os.rmdir, f"{place}/full/..") == "ENOTEMPTY"
    assert failure(os.unlink, place / "full") == "EISDIR"
    assert failure(os.rename, f"{place}/full/.", place / "other") == "EBUSY"
    assert failure(os.rename, f"{place}/full/..", place / "other") == "EBUSY"


def test_the_mountpoint_itself_stays(shared: Mounted) -> None:
    assert failure(os.rmdir, shared.point) == "EBUSY"
    assert failure(os.rename, shared.point, shared.point.parent / "elsewhere") == "EBUSY"
    assert failure(os.rename, shared.point, shared.point / "below") in ("EBUSY", "EXDEV")
    assert os.stat(shared.point / "..").st_ino == os.stat(shared.point.parent).st_ino


# -- directories ------------------------------------------------------------------------------------------------------


def test_a_directory_has_a_link_for_each_directory_in_it(place: Path) -> None:
    def links(name: str) -> int:
        return (place / name).stat().st_nlink

    (place / "a").mkdir()
    (place / "b").mkdir()
    assert (links("."), links("a")) == (4, 2)
    for kind in NO_DIRECTORIES:
        KINDS[kind](place / "a" / kind)
    assert links("a") == 2
    (place / "a" / "below").mkdir()
    assert links("a") == 3
    os.rename(place / "a" / "below", place / "b" / "below")
    assert (links("a"), links("b"), links("b/below")) == (2, 3, 2)
    (place / "a" / "empty").mkdir()
    os.rename(place / "b" / "below", place / "a" / "empty")  # in place of another
    assert (links("a"), links("b")) == (3, 2)
    renameat2(place / "a" / "empty", place / "a" / "file", RENAME_EXCHANGE)
    assert links("a") == 3
    (place / "b" / "file").touch()
    renameat2(place / "a" / "file", place / "b" / "file", RENAME_EXCHANGE)
    assert (links("a"), links("b"), links(".")) == (2, 3, 4)
    (place / "b" / "file").rmdir()
    assert links("b") == 2


def test_dots_are_listed_and_lead_to_the_directory_and_up(place: Path) -> None:
    (place / "a" / "b").mkdir(parents=True)
    with Listing(place / "a" / "b") as listing:
        inodes = {entry.name: entry.inode for entry in listing}
    assert inodes == {b".": (place / "a" / "b").stat().st_ino, b"..": (place / "a").stat().st_ino}
    (place / "c").mkdir()
    os.rename(place / "a" / "b", place / "c" / "b")
    with Listing(place / "c" / "b") as listing:
        assert {entry.name: entry.inode for entry in listing}[b".."] == (place / "c").stat().st_ino
    assert os.stat(place / "c" / "b" / ".." / "b" / ".").st_ino == (place / "c" / "b").stat().st_ino


def test_a_listing_says_of_which_kind_entries_are(place: Path) -> None:
    for kind, make in KINDS.items():
        make(place / kind)
    os.link(place / "file", place / "file again")
    os.link(place / "pipe", place / "pipe again")
    with Listing(place) as listing:
        found = {os.fsdecode(entry.name): entry for entry in listing}
    for name in [*KINDS, "file again", "pipe again"]:
        status = os.lstat(place / name)
        assert (found[name].type_bits, found[name].inode) == (stat.S_IFMT(status.st_mode) >> 12, status.st_ino)


def test_a_listing_goes_on_wherever_it_was(place: Path) -> None:
    for number in range(300):
        (place / f"{number}").touch()
    with Listing(place) as listing:
        start = listing.tell()
        entries = list(listing)
        assert len({entry.name for entry in entries}) == 302
        for index in (250, 3, 299, 0, 120):
            listing.seek(entries[index].position)
            assert next(iter(listing)) == entries[index + 1]
        listing.seek(entries[-1].position)
        assert list(listing) == []
        # What was listed may go; the places behind it stay.
        listing.seek(entries[100].position)
        for entry in entries[:150]:
            if entry.name not in (b".", b".."):
                os.unlink(os.fsencode(place) + b"/" + entry.name)
        after = {entry.name for entry in listing}
        assert after >= {entry.name for entry in entries[150:]}
        listing.seek(start)
        assert len(list(listing)) == 302 - 150 + len({b".", b".."} & {entry.name for entry in entries[:150]})


# -- hard links -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NO_DIRECTORIES)
def test_hard_links_are_names_of_one_thing(place: Path, kind: str) -> None:
    (place / "below").mkdir()
    names = [place / "one", place / "two", place / "below" / "three"]
    KINDS[kind](names[0])
    for count, name in enumerate(names[1:], 2):
        os.link(names[0], name, follow_symlinks=False)
        assert [os.lstat(each).st_nlink for each in names[:count]] == [count] * count
    assert len({os.lstat(name).st_ino for name in names}) == 1
    os.lchown(names[1], 5, 6)
    if kind != "link":
        os.chmod(names[2], 0o640)
    assert len({(os.lstat(name).st_mode, os.lstat(name).st_uid, os.lstat(name).st_gid) for name in names}) == 1
    os.unlink(names[0])
    os.rename(names[1], names[0])
    assert [os.lstat(name).st_nlink for name in (names[0], names[2])] == [2, 2]
    assert failure(os.lstat, names[1]) == "ENOENT"
    os.unlink(names[0])
    assert os.lstat(names[2]).st_nlink == 1


def test_bytes_are_shared_by_all_names(place: Path) -> None:
    one, two = place / "one", place / "two"
    one.write_bytes(b"written by one")
    os.link(one, two)
    assert two.read_bytes() == b"written by one"
    two.write_bytes(b"by two")
    assert one.read_bytes() == b"by two"
    with open(one, "ab", buffering=0) as file:
        file.write(b", and more")
        assert two.read_bytes() == b"by two, and more"
        assert two.stat().st_size == 16
        os.unlink(one)
        file.write(b"!")
        assert os.fstat(file.fileno()).st_nlink == 1
    assert two.read_bytes() == b"by two, and more!"
    with open(two, "rb") as file:
        os.unlink(two)
        assert os.fstat(file.fileno()).st_nlink == 0
        assert file.read() == b"by two, and more!"


def test_an_image_that_is_being_written_can_be_linked(place: Path) -> None:
    with open(place / "one", "wb", buffering=0) as file:
        file.write(b"first ")
        os.link(place / "one", place / "two")
        os.unlink(place / "one")
        file.write(b"second")
        assert (place / "two").read_bytes() == b"first second"
        assert os.fstat(file.fileno()).st_nlink == 1
    assert (place / "two").read_bytes() == b"first second"


def test_links_that_cannot_be(place: Path) -> None:
    (place / "image").touch()
    (place / "directory").mkdir()
    assert failure(os.link, place / "directory", place / "second") == "EPERM"
    assert failure(os.link, place / "image", place / "directory") == "EEXIST"
    assert failure(os.link, place / "absent", place / "second") == "ENOENT"
    assert failure(os.link, place / "image", place / "absent" / "second") == "ENOENT"
    assert failure(os.link, place / "image", place.parent.parent / "elsewhere") == "EXDEV"
    with open(place / "image", "rb") as file:
        link_of_open(file.fileno(), place / "third")
        assert os.fstat(file.fileno()).st_nlink == 2
        (place / "image").unlink()
        (place / "third").unlink()
        assert failure(link_of_open, file.fileno(), place / "fourth") == "ENOENT"


def test_hard_links_outlive_crash_remount_and_index(mounted: Mounted) -> None:
    root = mounted.point
    (root / "below").mkdir()
    (root / "a").write_bytes(b"content")
    for name in ("b", "below/c", "d"):
        os.link(root / "a", root / name)
    os.unlink(root / "a")  # the name it was made with
    os.rename(root / "d", root / "below" / "e")
    os.mkfifo(root / "pipe")
    os.link(root / "pipe", root / "below" / "pipe")

    def check() -> None:
        images = [root / "b", root / "below" / "c", root / "below" / "e"]
        assert [image.stat().st_nlink for image in images] == [3, 3, 3]
        assert len({image.stat().st_ino for image in images}) == 1
        assert {image.read_bytes() for image in images} == {b"content"}
        assert (root / "pipe").stat().st_nlink == 2
        assert sorted(os.listdir(root)) == ["b", "below", "pipe"]

    check()
    mounted.kill()
    mounted.start()
    check()
    mounted.stop()
    for path in [*(mounted.store / "volumes").glob("*.idx"), *(mounted.store / "volumes").glob("*.names")]:
        path.unlink()
    imgfs("rebuild-index", mounted.store)
    mounted.start()
    check()
    (root / "b").write_bytes(b"changed")
    assert (root / "below" / "e").read_bytes() == b"changed"
