"""Pipes, sockets and devices, on a mount as on plain XFS, and after a crash."""

import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from mounted import Mounted, failure
from places import KINDS, opened

# One mount for all of them.
pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.xdist_group("posix special")]

DEADLINE_S = 30.0


def test_a_pipe(place: Path) -> None:
    pipe = place / "pipe"
    os.mkfifo(pipe, 0o640)
    assert failure(os.open, pipe, os.O_WRONLY | os.O_NONBLOCK) == "ENXIO"
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    pipe.write_bytes(b"through the pipe")
    reader.join(DEADLINE_S)
    assert received == [b"through the pipe"]
    status = pipe.stat()
    assert (stat.S_ISFIFO(status.st_mode), stat.S_IMODE(status.st_mode), status.st_size) == (True, 0o640, 0)


def test_a_socket(place: Path) -> None:
    # The path of a socket has at most 107 bytes.
    at = Path(f"/proc/self/fd/{os.open(place, os.O_PATH)}")
    try:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind(str(at / "socket"))
            server.listen()
            assert failure(os.open, place / "socket", os.O_RDONLY) == "ENXIO"
            os.rename(place / "socket", place / "renamed")
            client.connect(str(at / "renamed"))
            client.sendall(b"hello")
            accepted, _ = server.accept()
            with accepted:
                assert accepted.recv(10) == b"hello"
        with socket.socket(socket.AF_UNIX) as again:
            assert failure(again.bind, str(at / "renamed")) == "EADDRINUSE"
        assert stat.S_ISSOCK(os.stat(place / "renamed").st_mode)
    finally:
        os.close(int(at.name))


def test_devices(place: Path) -> None:
    os.mknod(place / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with opened(place / "zero", os.O_RDWR) as file:
        assert os.read(file, 5) == bytes(5)
    os.mknod(place / "absent", stat.S_IFBLK | 0o600, os.makedev(511, 262_143))
    status = os.stat(place / "absent")
    assert (os.major(status.st_rdev), os.minor(status.st_rdev)) == (511, 262_143)
    assert failure(os.open, place / "absent", os.O_RDONLY) in ("ENXIO", "ENODEV")


def test_special_files_outlive_crash_and_remount(mounted: Mounted) -> None:
    names = ["pipe", "socket", "block device", "character device"]
    for name in names:
        KINDS[name](mounted.point / name)
        os.chown(mounted.point / name, 12, 34)
        os.chmod(mounted.point / name, 0o4640)
        os.utime(mounted.point / name, ns=(5, 5))
    before = {name: os.lstat(mounted.point / name) for name in names}
    mounted.kill()
    mounted.start()
    for name in names:
        status = os.lstat(mounted.point / name)
        for field in ("st_mode", "st_rdev", "st_uid", "st_gid", "st_mtime_ns", "st_ino", "st_nlink", "st_size"):
            assert getattr(status, field) == getattr(before[name], field), (name, field)
