"""Extended attributes through a mount, as on plain XFS: who may, how many, how long, and which are refused."""

import errno
import os
import struct
from pathlib import Path

import pytest
from mounted import Mounted, failure
from places import GROUP, KINDS, NO_DIRECTORIES, OTHER, OTHER_GROUP, OWNER, outcome_as

# One mount for all of them.
pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.xdist_group("posix attributes")]

NOT_SUPPORTED = errno.errorcode[errno.EOPNOTSUPP]
NO_ATTRIBUTE = errno.errorcode[errno.ENODATA]
VALUE_BYTES_MAX = 64 << 10
# An access control list of the kernel, version 2: user rwx, user 4321 rw-, group r-x, mask rwx, others nothing.
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, who)
    for tag, permissions, who in (
        (1, 7, -1 & 0xFFFF_FFFF),
        (2, 6, OTHER),
        (4, 5, 0xFFFF_FFFF),
        (16, 7, 0xFFFF_FFFF),
        (32, 0, 0xFFFF_FFFF),
    )
)


def _get(path: Path, name: str) -> bytes:
    return os.getxattr(path, name, follow_symlinks=False)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_attributes_are_set_listed_and_removed(place: Path, kind: str) -> None:
    path = place / "it"
    KINDS[kind](path)
    assert os.listxattr(path) == []
    assert failure(_get, path, "user.absent") == NO_ATTRIBUTE
    assert failure(os.removexattr, path, "user.absent") == NO_ATTRIBUTE
    values = {"user.one": b"1", "user.empty": b"", "user.ü 日本": bytes(range(256)), "trusted.two": b"2"}
    for name, value in values.items():
        os.setxattr(path, name, value)
    assert {name: _get(path, name) for name in os.listxattr(path)} == values
    os.setxattr(path, "user.one", b"another")
    assert failure(os.setxattr, path, "user.one", b"x", os.XATTR_CREATE) == "EEXIST"
    assert failure(os.setxattr, path, "user.new", b"x", os.XATTR_REPLACE) == NO_ATTRIBUTE
    os.setxattr(path, "user.one", b"replaced", os.XATTR_REPLACE)
    os.setxattr(path, "user.new", b"created", os.XATTR_CREATE)
    assert (_get(path, "user.one"), _get(path, "user.new")) == (b"replaced", b"created")
    for name in [*values, "user.new"]:
        os.removexattr(path, name)
    assert os.listxattr(path) == []


def test_limits(place: Path) -> None:
    image = place / "image"
    image.touch()
    os.setxattr(image, "user.large", b"x" * VALUE_BYTES_MAX)
    assert _get(image, "user.large") == b"x" * VALUE_BYTES_MAX
    assert failure(os.setxattr, image, "user.large", b"x" * (VALUE_BYTES_MAX + 1)) == "E2BIG"
    longest = "user." + "n" * 250
    os.setxattr(image, longest, b"value")
    assert _get(image, longest) == b"value"
    assert failure(os.setxattr, image, longest + "n", b"") == "ERANGE"
    assert failure(os.setxattr, image, "user.", b"") == "EINVAL"
    assert failure(os.setxattr, image, "nonsense", b"") == NOT_SUPPORTED
    assert failure(os.setxattr, image, "nonsense.x", b"") == NOT_SUPPORTED
    for number in range(100):
        os.setxattr(image, f"user.{number}", b"%d" % number * 50)
    assert len(os.listxattr(image)) == 102
    assert _get(image, "user.77") == b"77" * 50


def test_an_image_has_at_most_a_mebibyte_of_attributes(here: Path) -> None:
    (here / "image").touch()

    def fill() -> None:
        for number in range(20):
            os.setxattr(here / "image", f"user.{number}", bytes(VALUE_BYTES_MAX))

    assert failure(fill) == "ENOSPC"
    assert len(os.listxattr(here / "image")) == 15
    assert _get(here / "image", "user.14") == bytes(VALUE_BYTES_MAX)


@pytest.mark.parametrize("kind", NO_DIRECTORIES)
def test_user_attributes_are_for_files_and_directories(place: Path, kind: str) -> None:
    path = place / "it"
    KINDS[kind](path)
    if kind != "file":
        assert failure(lambda: os.setxattr(path, "user.x", b"x", follow_symlinks=False)) == "EPERM"
    os.setxattr(path, "trusted.x", b"kept", follow_symlinks=False)
    assert _get(path, "trusted.x") == b"kept"
    assert os.listxattr(path, follow_symlinks=False) == ["trusted.x"]


def test_who_may(place: Path) -> None:
    image = place / "image"
    image.touch()
    os.chown(image, OWNER, GROUP)
    os.setxattr(image, "user.x", b"x")
    os.setxattr(image, "trusted.x", b"x")
    other, owner = (OTHER, OTHER_GROUP), (OWNER, GROUP)
    image.chmod(0o600)
    assert outcome_as(*owner, os.setxattr, image, "user.x", b"mine") == "ok"
    assert outcome_as(*other, os.getxattr, image, "user.x") == "EACCES"
    assert outcome_as(*other, os.setxattr, image, "user.x", b"x") == "EACCES"
    image.chmod(0o644)
    assert outcome_as(*other, os.getxattr, image, "user.x") == "ok"
    assert outcome_as(*other, os.setxattr, image, "user.x", b"x") == "EACCES"
    assert outcome_as(*other, os.removexattr, image, "user.x") == "EACCES"
    image.chmod(0o666)
    assert outcome_as(*other, os.setxattr, image, "user.x", b"theirs") == "ok"
    # trusted. is for root alone: others do not even see that there are any.
    for who in (owner, other):
        assert outcome_as(*who, os.getxattr, image, "trusted.x") == NO_ATTRIBUTE
        assert outcome_as(*who, os.setxattr, image, "trusted.x", b"x") == "EPERM"
        assert outcome_as(*who, os.removexattr, image, "trusted.x") == "EPERM"
        assert outcome_as(*who, os.setxattr, image, "security.x", b"x") == "EPERM"
    # In a directory with the sticky bit only its owner.
    sticky = place / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    assert outcome_as(*other, os.setxattr, sticky, "user.x", b"x") == "EPERM"


def test_attributes_stay_with_the_image(place: Path) -> None:
    image = place / "image"
    image.write_bytes(b"content")
    os.setxattr(image, "user.x", b"kept")
    os.link(image, place / "link")
    os.rename(image, place / "renamed")
    (place / "renamed").write_bytes(b"changed")
    os.truncate(place / "link", 3)
    assert _get(place / "link", "user.x") == b"kept"
    with open(place / "renamed", "rb") as file:
        os.unlink(place / "renamed")
        os.unlink(place / "link")
        assert os.getxattr(file.fileno(), "user.x") == b"kept"
    image.touch()
    assert os.listxattr(image) == []


def test_access_control_lists_are_refused(here: Path) -> None:
    """Kept but not enforced they would be worse than refused."""
    (here / "image").touch()
    for path, name in ((here, "access"), (here, "default"), (here / "image", "access")):
        assert failure(os.setxattr, path, f"system.posix_acl_{name}", ACL) == NOT_SUPPORTED
        assert failure(os.getxattr, path, f"system.posix_acl_{name}") == NOT_SUPPORTED
    assert failure(os.setxattr, here, "system.other", b"") == NOT_SUPPORTED


def test_attributes_of_imgfs_are_for_reading(here: Path) -> None:
    (here / "image").write_bytes(b"content")
    for name in ("checksum", "volume", "offset", "mime_type"):
        assert _get(here / "image", f"user.imgfs.{name}")
        assert failure(os.setxattr, here / "image", f"user.imgfs.{name}", b"x") == "EINVAL"
        assert failure(os.removexattr, here / "image", f"user.imgfs.{name}") == "EINVAL"
    assert os.listxattr(here / "image") == []


def test_without_the_option_there_are_none(mounted: Mounted) -> None:
    mounted.stop()
    mounted.start("allow_other,noxattr")
    image = mounted.point / "image"
    image.touch()
    assert failure(os.setxattr, image, "user.x", b"x") == NOT_SUPPORTED
    assert failure(os.getxattr, image, "user.x") == NOT_SUPPORTED
    assert failure(os.listxattr, image) == NOT_SUPPORTED
