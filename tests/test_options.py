"""Mount options: what is understood, what is let pass, what is refused in one line."""

import pytest

from imgfs.errors import EXIT_USAGE
from imgfs.options import BadOption, MountOptions, parse


def test_nothing_asked_for_is_the_default() -> None:
    assert parse([]) == parse([""]) == parse(["defaults"]) == MountOptions()


def test_every_option_of_our_own() -> None:
    options = parse(["ro,allow_other,timeout=1.5", "sync_interval=0.5,read_ahead=4096,log=/var/log/imgfs.log"])
    assert options == MountOptions(
        writable=False,
        allow_other=True,
        timeout_s=1.5,
        sync_interval_s=0.5,
        read_ahead_kib=4096,
        log="/var/log/imgfs.log",
    )


def test_extended_attributes_the_later_one_counts() -> None:
    assert parse(["xattr"]).xattrs
    assert not parse(["xattr,noxattr"]).xattrs
    assert parse(["noxattr", "xattr"]).xattrs


def test_when_an_image_is_published() -> None:
    assert parse(["publish=close"]).publish_at_close
    assert not parse(["publish=close,publish=create"]).publish_at_close


def test_a_line_of_fstab() -> None:
    line = "rw,noauto,user,user=alice,_netdev,nofail,noatime,relatime,x-systemd.automount,X-mount.mkdir,comment=a b"
    assert parse([line]) == MountOptions()


def test_what_mount_fuse_adds() -> None:
    assert parse(["rw,allow_other,dev,suid"]).kernel == {"dev", "suid"}


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        ("nosuid,nodev,noexec", {"nosuid", "nodev", "noexec"}),
        ("nosuid,suid", {"suid"}),
        ("suid,nosuid", {"nosuid"}),
        ("sync,dirsync", {"sync", "dirsync"}),
        ("sync,async", {"async"}),
        ("noexec,exec,noexec", {"noexec"}),
    ],
)
def test_kernel_flags_the_later_one_counts(text: str, kernel: set[str]) -> None:
    assert parse([text]).kernel == kernel


def test_ro_and_rw_the_later_one_counts() -> None:
    assert not parse(["rw,ro"]).writable
    assert not parse(["rw", "ro"]).writable
    assert parse(["ro,rw"]).writable


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("allow_othr", "unknown mount option 'allow_othr'; did you mean allow_other?"),
        ("frobnicate", "unknown mount option 'frobnicate'"),
        ("=", "unknown mount option '='"),
        ("timeout", "mount option 'timeout' needs a value, as in timeout=..."),
        ("log=", "mount option 'log=' needs a value, as in log=..."),
        ("timeout=soon", "mount option 'timeout=soon' needs a number from 0 to 1e+09"),
        ("timeout=-1", "mount option 'timeout=-1' needs a number from 0 to 1e+09"),
        ("timeout=nan", "mount option 'timeout=nan' needs a number from 0 to 1e+09"),
        ("timeout=inf", "mount option 'timeout=inf' needs a number from 0 to 1e+09"),
        ("sync_interval=0", "mount option 'sync_interval=0' needs a number from 0.1 to 1e+09"),
        ("publish", "mount option 'publish' needs a value, as in publish=..."),
        ("publish=later", "mount option 'publish=later': publish is create or close"),
        ("xattr=1", "mount option 'xattr=1' takes no value"),
        ("xatr", "unknown mount option 'xatr'; did you mean xattr?"),
        ("ro=1", "mount option 'ro=1' takes no value"),
        ("noexec=yes", "mount option 'noexec=yes' takes no value"),
    ],
)
def test_what_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(BadOption) as caught:
        parse(["ro", text])
    assert str(caught.value) == complaint
    assert caught.value.exit_code == EXIT_USAGE
