"""File handles as an NFS server uses them: they lead to the same file whatever the kernel, or the daemon, forgot."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounted import Mounted, failure

pytestmark = [pytest.mark.mount, pytest.mark.root]

AT_FDCWD = -100
HANDLE_BYTES_MAX = 128


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_uint),
        ("type", ctypes.c_int),
        ("data", ctypes.c_ubyte * HANDLE_BYTES_MAX),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def _handle_of(path: Path) -> _FileHandle:
    handle, mount = _FileHandle(HANDLE_BYTES_MAX), ctypes.c_int()
    if _libc.name_to_handle_at(AT_FDCWD, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount), 0):
        raise OSError(ctypes.get_errno(), "name_to_handle_at", path)
    return handle


@contextlib.contextmanager
def _opened(point: Path, handle: _FileHandle, flags: int = os.O_RDONLY) -> Iterator[int]:
    mount = os.open(point, os.O_RDONLY)
    file = _libc.open_by_handle_at(mount, ctypes.byref(handle), flags)
    number = ctypes.get_errno()
    os.close(mount)
    if file < 0:
        raise OSError(number, "open_by_handle_at")
    try:
        yield file
    finally:
        os.close(file)


def _open(point: Path, handle: _FileHandle) -> None:
    with _opened(point, handle):
        pass


def test_a_handle_leads_to_its_file_whatever_was_forgotten(mounted: Mounted) -> None:
    root = mounted.point
    (root / "a" / "b").mkdir(parents=True)
    image = root / "a" / "b" / "image"
    image.write_bytes(b"content")
    os.link(image, root / "second name")
    handles = {path: _handle_of(path) for path in (root, root / "a", root / "a" / "b", image)}
    assert bytes(_handle_of(root / "second name")) == bytes(handles[image])

    def check(name: Path) -> None:
        # The deepest first: the kernel has to find the way up.
        with _opened(root, handles[image], os.O_RDWR) as file:
            assert os.fstat(file).st_ino == name.stat().st_ino
            assert os.pread(file, 100, 0) == b"content"
            os.pwrite(file, b"c", 0)
        for path in (root / "a" / "b", root / "a", root):
            with _opened(root, handles[path]) as directory:
                assert os.readlink(f"/proc/self/fd/{directory}") == str(path)
                assert os.listdir(directory)

    check(image)
    mounted.drop_caches()
    check(image)
    os.rename(image, root / "a" / "b" / "renamed")
    mounted.drop_caches()
    check(root / "a" / "b" / "renamed")
    mounted.stop()
    mounted.start()
    check(root / "a" / "b" / "renamed")
    mounted.kill()
    mounted.start()
    check(root / "a" / "b" / "renamed")
    assert bytes(_handle_of(root / "a" / "b" / "renamed")) == bytes(handles[image])


def test_a_handle_of_what_was_removed_is_stale(mounted: Mounted) -> None:
    root = mounted.point
    (root / "directory").mkdir()
    (root / "image").write_bytes(b"content")
    handles = [_handle_of(root / "image"), _handle_of(root / "directory")]
    with open(root / "image", "rb") as file:
        (root / "image").unlink()
        (root / "directory").rmdir()
        with _opened(root, handles[0]) as again:
            assert os.read(again, 100) == file.read() == b"content"
    mounted.drop_caches()
    for handle in handles:
        assert failure(_open, root, handle) == "ESTALE"
    # Nor does it lead to what gets the slot next.
    for number in range(50):
        (root / f"{number}").write_bytes(b"another")
    mounted.stop()
    mounted.start()
    for number in range(50):
        (root / f"more {number}").write_bytes(b"another")
    for handle in handles:
        assert failure(_open, root, handle) == "ESTALE"
