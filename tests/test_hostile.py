"""Options, tables of mounts, handovers and file handles that are unlike any other: one error, or left out.

Most of these were found by fuzzing.py: a traceback, all memory taken, or no end, where one line and one image was due.
"""

import os

import pytest
from stores import new_store, put

from imgfs.errors import MountFailed
from imgfs.handover import Handover
from imgfs.mountpoint import mounts
from imgfs.options import BadOption, parse
from imgfs.store import ROOT, Store

pytestmark = pytest.mark.usefixtures("no_store_stays_open")


@pytest.mark.parametrize("option", ["workers=" + "9" * 5000, "workers=\u0663", "sync_interval=1e10", "grace=1e300"])
def test_numbers_without_end_are_no_options(option: str) -> None:
    with pytest.raises(BadOption):
        parse([option])


def descriptor_of(data: bytes) -> int:
    descriptor = os.memfd_create("hostile", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    return descriptor


def test_lines_of_the_mount_table_that_are_unlike_others() -> None:
    descriptor = descriptor_of(
        b"36 35 98:0 / /mnt rw - ext3 /dev/root rw,a b=c\n"
        b"nothing\n"
        b"41 36 0:45 / /run/\\040x ro - fuse.imgfs\n"
        b"42 36 0:46 / /last rw - fuse.imgfs /store rw\n"
    )
    found = mounts(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)
    assert [(mount.point, mount.source) for mount in found] == [
        ("/mnt", "/dev/root"),
        ("/run/ x", ""),
        ("/last", "/store"),
    ]


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"{}", b'{"version": 1}', b'{"version": 1, "options": 7}', b"[" * 99999]
)
def test_a_handover_that_is_none(text: bytes) -> None:
    descriptor = descriptor_of(text)
    with pytest.raises(MountFailed):
        Handover.read(descriptor)
    os.close(descriptor)


def test_any_inode_and_any_handle_is_answered() -> None:
    """As a file handle of NFS may hold any number."""
    store = new_store()
    inode = put(store, ROOT, b"a")
    for number in (0, inode + 1, inode | 1 << 32, 1 << 28, 0xFFFF_FFFF, 1 << 40, (1 << 64) - 1):
        for ask in (Store.attr, Store.name, Store.parent, Store.open_image, Store.readlink, Store.list_xattrs):
            with pytest.raises(Exception, match="is gone"):
                ask(store, number)
        with pytest.raises(Exception, match="is not open"):
            store.read(number, 0, 1)
