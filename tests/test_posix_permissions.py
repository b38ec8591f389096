"""Who may do what: mode bits, the sticky bit, set-id bits, owners, and file systems mounted to refuse."""

import functools
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import Mounted, as_user, failure
from places import (
    GROUP,
    KINDS,
    OTHER,
    OTHER_GROUP,
    OWNER,
    RENAME_EXCHANGE,
    outcome_as,
    outcomes_as,
    renameat2,
    utimensat,
)

# One mount for all of them.
pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.xdist_group("posix permissions")]

OMIT = (0, (1 << 30) - 2)
CLASSES = {6: (OWNER, GROUP), 3: (OTHER, GROUP), 0: (OTHER, OTHER_GROUP)}


def _open(path: Path, flags: int) -> None:
    os.close(os.open(path, flags))


def _mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def _owned(path: Path, mode: int) -> Path:
    os.chown(path, OWNER, GROUP)
    os.chmod(path, mode)
    return path


# -- mode bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", CLASSES)
def test_mode_bits_of_a_file(place: Path, shift: int) -> None:
    """Only the bits of the one class count that the caller is in, and each alone."""
    image = place / "image"
    image.write_bytes(b"")
    for bits in range(8):
        # The other classes have what this one has not.
        _owned(image, (0o777 & ~(7 << shift)) | bits << shift)
        read, write, both = ("ok" if bits & needed == needed else "EACCES" for needed in (4, 2, 6))
        found = outcomes_as(
            *CLASSES[shift],
            lambda: _open(image, os.O_RDONLY),
            lambda: _open(image, os.O_WRONLY),
            lambda: _open(image, os.O_RDWR),
            lambda: os.truncate(image, 0),
        )
        assert found == [read, write, both, write], oct(bits)
    assert outcome_as(OTHER, OTHER_GROUP, os.chmod, image, 0o777) == "EPERM"


@pytest.mark.parametrize("shift", CLASSES)
def test_mode_bits_of_a_directory(place: Path, shift: int) -> None:
    directory, who = place / "directory", CLASSES[shift]
    directory.mkdir()
    (directory / "image").touch()
    (directory / "image").chmod(0o666)
    making: dict[Path, Callable[[Path], object]] = {
        directory / "new": lambda path: _open(path, os.O_CREAT | os.O_WRONLY),
        directory / "new directory": os.mkdir,
        directory / "new link": lambda path: os.symlink("target", path),
        directory / "new pipe": os.mkfifo,
    }

    def there_and_back() -> None:
        os.rename(directory / "image", directory / "moved")
        os.rename(directory / "moved", directory / "image")

    for bits in range(8):
        # The other classes have what this one has not.
        _owned(directory, (0o777 & ~(7 << shift)) | bits << shift)
        search, write = ("ok" if bits & needed == needed else "EACCES" for needed in (1, 3))
        found = outcomes_as(
            *who,
            lambda: os.listdir(directory),
            lambda: os.stat(directory / "image"),
            lambda: os.chdir(directory),
            lambda: _open(directory / "image", os.O_RDWR),
            there_and_back,
            *(functools.partial(make, path) for path, make in making.items()),
        )
        assert found == ["ok" if bits & 4 else "EACCES", search, search, search] + [write] * 5, oct(bits)
        for path, make in making.items():
            if write != "ok":
                make(path)
        removing = [
            functools.partial(os.rmdir if make == os.mkdir else os.unlink, path) for path, make in making.items()
        ]
        assert outcomes_as(*who, *removing) == [write] * 4
        if write != "ok":
            for remove in removing:
                remove()


def test_no_search_on_the_way(place: Path) -> None:
    (place / "closed" / "below").mkdir(parents=True)
    (place / "closed" / "below" / "image").touch()
    (place / "closed" / "below" / "image").chmod(0o777)
    (place / "closed").chmod(0o766)
    image = place / "closed" / "below" / "image"
    calls: list[Callable[[], object]] = [
        lambda: os.stat(image),
        lambda: os.chmod(image, 0o777),
        lambda: os.truncate(image, 0),
        lambda: os.readlink(image),
        lambda: os.unlink(image),
        lambda: os.mkdir(image),
        lambda: os.utime(image),
        lambda: os.rename(image, place / "out"),
        lambda: os.execv(image, ["x"]),
        lambda: os.getxattr(image, "user.x"),
    ]
    assert outcomes_as(OTHER, OTHER_GROUP, *calls) == ["EACCES"] * len(calls)


def test_a_file_runs_only_with_an_x_bit(place: Path) -> None:
    program = place / "program"
    shutil.copy("/bin/true", program)
    for mode, expected in ((0o755, 0), (0o711, 0), (0o644, None), (0o600, None)):
        program.chmod(mode)
        if expected is None:
            assert failure(os.execv, program, ["x"]) == "EACCES"
        else:
            assert subprocess.run([program], timeout=30, check=False).returncode == expected
    program.chmod(0o744)
    assert outcome_as(OTHER, OTHER_GROUP, os.execv, program, ["x"]) == "EACCES"
    assert os.access(program, os.X_OK)
    program.chmod(0o666)
    assert not os.access(program, os.X_OK)  # not even for root
    assert os.access(program, os.R_OK | os.W_OK)


def test_access_asks_for_the_real_user(place: Path) -> None:
    (place / "image").touch()
    _owned(place / "image", 0o640)

    def check() -> None:
        os.setresuid(OTHER, 0, 0)
        os.setresgid(GROUP, 0, 0)
        assert [os.access(place / "image", mode) for mode in (os.R_OK, os.W_OK, os.X_OK)] == [True, False, False]
        assert os.access(place / "image", os.W_OK, effective_ids=True)

    as_user(0, 0, check)


# -- the sticky bit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sticky(place: Path, kind: str) -> None:
    """In a directory such as /tmp only the owner of an entry, or of the directory, may move or remove it."""
    top = place / "top"
    top.mkdir()
    os.chown(top, OWNER, GROUP)
    top.chmod(0o1777)
    (place / "elsewhere").mkdir()
    (place / "elsewhere").chmod(0o777)
    remove = os.rmdir if kind == "directory" else os.unlink

    def make(name: str, uid: int) -> Path:
        KINDS[kind](top / name)
        os.lchown(top / name, uid, 1)
        return top / name

    theirs, mine = make("theirs", OTHER + 1), make("mine", OTHER)
    found = outcomes_as(
        OTHER,
        OTHER_GROUP,
        lambda: remove(theirs),
        lambda: os.rename(theirs, top / "moved"),
        lambda: os.rename(theirs, place / "elsewhere" / "moved"),
        lambda: os.rename(mine, theirs),
        lambda: renameat2(mine, theirs, RENAME_EXCHANGE),
    )
    assert found == ["EPERM"] * 5
    assert sorted(os.listdir(top)) == ["mine", "theirs"]
    assert outcome_as(OTHER, OTHER_GROUP, os.rename, mine, top / "still mine") == "ok"
    assert outcome_as(OTHER, OTHER_GROUP, remove, top / "still mine") == "ok"
    # The owner of the directory may.
    assert outcome_as(OWNER, GROUP, os.rename, theirs, top / "moved") == "ok"
    assert outcome_as(OWNER, GROUP, remove, top / "moved") == "ok"


# -- owners -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_chown_is_for_root_and_chgrp_for_the_owner(place: Path, kind: str) -> None:
    path = place / "it"
    KINDS[kind](path)
    os.lchown(path, OWNER, GROUP + 1)
    # To a group one is in, or to what it is.
    assert outcome_as(OWNER, GROUP, os.lchown, path, -1, GROUP) == "ok"
    assert outcome_as(OWNER, GROUP, os.lchown, path, OWNER, GROUP) == "ok"
    assert outcome_as(OWNER, GROUP, os.lchown, path, -1, OTHER_GROUP) == "EPERM"
    assert outcome_as(OWNER, GROUP, os.lchown, path, OTHER, -1) == "EPERM"
    assert outcome_as(OTHER, GROUP, os.lchown, path, -1, GROUP) == "EPERM"
    assert outcome_as(OTHER, OTHER_GROUP, os.lchown, path, OTHER, OTHER_GROUP) == "EPERM"
    os.lchown(path, -1, -1)
    assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == (OWNER, GROUP)
    os.lchown(path, (1 << 32) - 2, 65536)
    assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == ((1 << 32) - 2, 65536)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "link"])
def test_every_mode_is_kept(place: Path, kind: str) -> None:
    path = place / "it"
    KINDS[kind](path)
    for mode in (0, 0o111, 0o222, 0o444, 0o777, 0o1000, 0o2000, 0o4000, 0o7777, 0o640):
        os.chmod(path, mode)
        assert _mode(path) == mode
        assert stat.S_IFMT(os.lstat(path).st_mode) == stat.S_IFMT(os.lstat(path).st_mode | 0)


def test_modes_and_owners_of_what_is_made(place: Path) -> None:
    place.chmod(0o777)

    def make() -> None:
        os.umask(0o027)
        for kind in ("directory", "link", "pipe", "socket"):
            KINDS[kind](place / kind)
        os.close(os.open(place / "file", os.O_CREAT | os.O_WRONLY, 0o4777))
        os.mkdir(place / "sticky", 0o1777)

    assert outcome_as(OWNER, GROUP, make) == "ok"
    found = {name: (_mode(place / name), os.lstat(place / name).st_uid) for name in os.listdir(place)}
    assert found == {
        "directory": (0o750, OWNER),
        "link": (0o777, OWNER),
        "pipe": (0o640, OWNER),
        "socket": (0o640, OWNER),
        "file": (0o4750, OWNER),
        "sticky": (0o1750, OWNER),
    }
    assert {os.lstat(place / name).st_gid for name in os.listdir(place)} == {GROUP}


def test_devices_are_made_by_root_alone(place: Path) -> None:
    place.chmod(0o777)
    for kind in ("block device", "character device"):
        assert outcome_as(OWNER, GROUP, KINDS[kind], place / kind) == "EPERM"
    for kind in ("pipe", "socket"):
        assert outcome_as(OWNER, GROUP, KINDS[kind], place / kind) == "ok"


# -- set-id bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6755, 0o2745, 0o6644, 0o2666, 0o7777])
def test_set_id_bits_go_when_somebody_changes_the_file(place: Path, mode: int) -> None:
    """Set-user-id goes; so does set-group-id, but where the group has no x: there it says another thing."""
    image = place / "image"
    without = mode & ~stat.S_ISUID & ~(stat.S_ISGID if mode & stat.S_IXGRP else 0)

    def write() -> None:
        with open(image, "ab") as file:
            file.write(b"x")

    def write_nothing() -> None:
        file = os.open(image, os.O_WRONLY)
        os.write(file, b"")
        os.close(file)

    def after(uid: int, change: Callable[[], object]) -> int:
        image.write_bytes(b"content")
        os.chown(image, OWNER, GROUP)
        os.chmod(image, mode | 0o022)
        assert outcome_as(uid, GROUP, change) == "ok"
        return _mode(image) & ~0o022 | mode & 0o022

    assert after(OWNER, write) == without
    assert after(OTHER, write) == without
    assert after(OTHER, lambda: os.truncate(image, 0)) == without
    assert after(OWNER, lambda: _open(image, os.O_WRONLY | os.O_TRUNC)) == without
    assert after(OWNER, write_nothing) == mode
    assert after(OWNER, lambda: os.chown(image, -1, GROUP)) == without
    # Owners may do what changes nothing, and root more.
    assert after(0, lambda: os.truncate(image, 0)) == mode
    assert after(OWNER, lambda: _open(image, os.O_WRONLY)) == mode
    assert after(OWNER, lambda: os.utime(image)) == mode


def test_set_id_bits_go_when_root_writes(here: Path) -> None:
    """On XFS they stay. A write does not say who wrote, and the kernel leaves it to the daemon, for libfuse says so."""
    image = here / "image"
    image.write_bytes(b"content")
    image.chmod(0o6755)
    with open(image, "ab") as file:
        file.write(b"x")
    assert _mode(image) == 0o755


def test_set_id_bits_at_chown(place: Path) -> None:
    for kind in ("file", "pipe"):
        path = place / kind
        KINDS[kind](path)
        for mode, left in ((0o6755, 0o755), (0o6711, 0o711), (0o2644, 0o2644), (0o6644, 0o2644)):
            os.chmod(path, mode)
            os.chown(path, OWNER, GROUP)  # by root, too
            assert _mode(path) == left
    KINDS["directory"](place / "directory")
    (place / "directory").chmod(0o6755)
    os.chown(place / "directory", OWNER, GROUP)
    assert _mode(place / "directory") == 0o6755


def test_set_group_id_is_only_for_members_of_the_group(place: Path) -> None:
    image = place / "image"
    image.touch()
    os.chown(image, OWNER, OTHER_GROUP)
    assert outcome_as(OWNER, GROUP, os.chmod, image, 0o2755) == "ok"
    assert _mode(image) == 0o755
    assert outcome_as(OWNER, OTHER_GROUP, os.chmod, image, 0o2755) == "ok"
    assert _mode(image) == 0o2755


def test_a_set_gid_directory(place: Path) -> None:
    team = place / "team"
    team.mkdir()
    os.chown(team, 0, OTHER_GROUP)
    team.chmod(0o2777)

    def make() -> None:
        for kind in ("file", "directory", "link", "pipe", "socket"):
            KINDS[kind](team / kind)
        os.close(os.open(team / "program", os.O_CREAT | os.O_WRONLY, 0o2775))

    assert outcome_as(OWNER, GROUP, make) == "ok"
    assert {os.lstat(team / name).st_gid for name in os.listdir(team)} == {OTHER_GROUP}
    assert _mode(team / "directory") & stat.S_ISGID
    # Nobody gives a program a group that is not his.
    assert not _mode(team / "program") & stat.S_ISGID


def test_a_set_user_id_program_runs_as_its_owner(place: Path) -> None:
    program = place / "id"
    shutil.copy("/usr/bin/id", program)
    os.chown(program, OWNER, GROUP)
    program.chmod(0o6755)
    run = subprocess.run(
        [program], user=OTHER, group=OTHER_GROUP, capture_output=True, text=True, timeout=30, check=True
    )
    assert f"euid={OWNER}" in run.stdout
    assert f"egid={GROUP}" in run.stdout


def test_without_its_options_a_mount_has_no_devices_and_no_set_id(mounted: Mounted) -> None:
    os.mknod(mounted.point / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert failure(os.open, mounted.point / "null", os.O_RDONLY) == "EACCES"
    program = mounted.point / "id"
    shutil.copy("/usr/bin/id", program)
    os.chown(program, OWNER, GROUP)
    program.chmod(0o6755)
    run = subprocess.run(
        [program], user=OTHER, group=OTHER_GROUP, capture_output=True, text=True, timeout=30, check=True
    )
    assert "euid" not in run.stdout
    mounted.stop()
    mounted.start("allow_other,noexec")
    assert failure(os.execv, program, ["id"]) == "EACCES"


# -- times ------------------------------------------------------------------------------------------------------------


def test_who_may_set_times(place: Path) -> None:
    image = place / "image"
    image.touch()
    os.chown(image, OWNER, GROUP)
    now = (0, (1 << 30) - 1)
    cases = [
        # mode, user, times, expected: to the present with write permission, to another time only the owner may
        (0o644, OWNER, (now, now), "ok"),
        (0o444, OWNER, (now, now), "ok"),
        (0o444, OWNER, ((1, 2), (3, 4)), "ok"),
        (0o666, OTHER, (now, now), "ok"),
        (0o644, OTHER, (now, now), "EACCES"),
        (0o666, OTHER, ((1, 2), (3, 4)), "EPERM"),
        (0o666, OTHER, (now, (3, 4)), "EPERM"),
        (0o666, OTHER, (now, OMIT), "EPERM"),
        (0o444, OTHER, (OMIT, OMIT), "ok"),
    ]
    for mode, uid, times, expected in cases:
        image.chmod(mode)
        assert outcome_as(uid, OTHER_GROUP, utimensat, image, *times) == expected, (oct(mode), uid, times)


def test_o_noatime_is_for_the_owner(place: Path) -> None:
    image = place / "image"
    image.touch()
    os.chown(image, OWNER, GROUP)
    image.chmod(0o666)
    assert outcome_as(OWNER, GROUP, _open, image, os.O_RDONLY | os.O_NOATIME) == "ok"
    assert outcome_as(OTHER, OTHER_GROUP, _open, image, os.O_RDONLY | os.O_NOATIME) == "EPERM"


# -- a mount for reading ----------------------------------------------------------------------------------------------


def test_a_read_only_mount_refuses_every_change(mounted: Mounted) -> None:
    root = mounted.point
    (root / "full").mkdir()
    (root / "empty").mkdir()
    (root / "image").write_bytes(b"content")
    os.symlink("image", root / "link")
    os.mkfifo(root / "pipe")
    mounted.stop()
    mounted.start("allow_other,xattr")
    os.setxattr(root / "image", "user.comment", b"kept")
    mounted.stop()
    mounted.start("allow_other,xattr,ro")
    image = root / "image"
    changes: list[Callable[[], object]] = [
        lambda: os.open(image, os.O_WRONLY),
        lambda: os.open(image, os.O_RDWR),
        lambda: os.open(image, os.O_RDONLY | os.O_TRUNC),
        lambda: os.open(root / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.truncate(image, 0),
        lambda: os.chmod(image, 0o600),
        lambda: os.chown(image, 1, 1),
        lambda: os.lchown(root / "link", 1, 1),
        lambda: os.utime(image, ns=(0, 0)),
        lambda: os.mkdir(root / "new"),
        lambda: os.rmdir(root / "empty"),
        lambda: os.unlink(image),
        lambda: os.unlink(root / "link"),
        lambda: os.rename(image, root / "new"),
        lambda: renameat2(image, root / "link", RENAME_EXCHANGE),
        lambda: os.link(image, root / "new"),
        lambda: os.symlink("target", root / "new"),
        lambda: os.mkfifo(root / "new"),
        lambda: os.mknod(root / "new", stat.S_IFREG | 0o644),
        lambda: os.setxattr(image, "user.comment", b"new"),
        lambda: os.removexattr(image, "user.comment"),
    ]
    for number, change in enumerate(changes):
        assert failure(change) == "EROFS", number
    assert not os.access(image, os.W_OK)
    assert os.statvfs(root).f_flag & os.ST_RDONLY
    assert image.read_bytes() == b"content"
    assert os.getxattr(image, "user.comment") == b"kept"
    assert sorted(os.listdir(root)) == ["empty", "full", "image", "link", "pipe"]
    assert failure(os.mkdir, root / "full") == "EEXIST"
