"""The FUSE device: opens it, mounts it, and does on it by hand what pyfuse3 does not: INIT, RESEND, single answers.

Owns the descriptor that holds the mount: the mount lives as long as some process has it open. Must not know stores or
workers.

*Concurrency:* reading never waits; workers read while the gate (board.py) is open, the supervisor while it is shut.
"""

import array
import ctypes
import errno
import fcntl
import os
import select
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from imgfs import wire
from imgfs.errors import MountFailed
from imgfs.mountpoint import FILESYSTEM_TYPE

DEVICE = "/dev/fuse"
# The kernel asks right after mount(2).
_INIT_PATIENCE_MS = 30_000

_CLONE = 0x8004E500  # FUSE_DEV_IOC_CLONE
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_SYNCHRONOUS, _MS_DIRSYNC = 1, 2, 4, 8, 16, 128
_FLAGS = {
    "ro": _MS_RDONLY,
    "nosuid": _MS_NOSUID,
    "nodev": _MS_NODEV,
    "noexec": _MS_NOEXEC,
    "sync": _MS_SYNCHRONOUS,
    "dirsync": _MS_DIRSYNC,
}
_OPPOSITES = {"nosuid": "suid", "nodev": "dev"}


class Mounting(NamedTuple):
    """How to mount: the source that the mount table shall name, and options by their names in mount(8)."""

    source: str
    path: str
    options: frozenset[str]


class Device:
    """An open, mounted FUSE device."""

    def __init__(self, descriptor: int, init: bytes) -> None:
        """*init* is the kernel's INIT request, which whoever serves the device has to answer."""
        self.descriptor = descriptor
        self.init = init

    @classmethod
    def mount(cls, mounting: Mounting) -> "Device":
        """Mount, and read the kernel's first request.

        Raises:
            MountFailed: the kernel or fusermount3 refuses.
        """
        descriptor = _mount(mounting)
        try:
            return cls(descriptor, _first_request(descriptor))
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Give this process's share of the device up; with the last one the mount is dead."""
        os.close(self.descriptor)

    def is_dead(self) -> bool:
        """Return whether the kernel has ended the connection: it was unmounted, or aborted."""
        poll = select.poll()
        poll.register(self.descriptor, 0)
        return bool(poll.poll(0))

    def clone(self) -> int:
        """Return a descriptor of its own for one worker: when it dies, the kernel fails the requests it had read."""
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _CLONE, array.array("I", [self.descriptor]))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def answer(self, reply: bytes) -> bool:
        """Write *reply*; return whether anybody waited for it."""
        try:
            os.write(self.descriptor, reply)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def resend(self) -> None:
        """Let the kernel put all requests that were read and not answered before those that were not read."""
        os.write(self.descriptor, wire.RESEND)

    def queued(self, bytes_max: int) -> Iterator[memoryview]:
        """Read the requests that wait, until none is left; each is overwritten by the next. The gate is shut."""
        buffer = memoryview(bytearray(bytes_max))
        # For good: workers read like this too, and one that comes second must not wait while it says that it reads.
        os.set_blocking(self.descriptor, False)
        while True:
            try:
                size = os.readv(self.descriptor, [buffer])
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue  # the caller gave up while its request was read
                if error.errno in (errno.EAGAIN, errno.ENODEV):
                    return
                raise
            yield buffer[:size]


def _first_request(descriptor: int) -> bytes:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(_INIT_PATIENCE_MS):
        raise MountFailed("the kernel does not speak to a mount it has just made")
    return os.read(descriptor, wire.READ_BYTES_MIN)


def _mount(mounting: Mounting) -> int:
    if os.geteuid() == 0:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        number = _system_mount(descriptor, mounting)
        if number == 0:
            return descriptor
        os.close(descriptor)
        # Root of a container without CAP_SYS_ADMIN may have a fusermount3 that can.
        if number != errno.EPERM or shutil.which("fusermount3") is None:
            raise MountFailed(f"cannot mount at {mounting.path}: {os.strerror(number)}")
    return _fusermount(mounting)


def _system_mount(descriptor: int, mounting: Mounting) -> int:
    """Call mount(2); return its errno, 0 if it is mounted."""
    options = mounting.options | {name for name, opposite in _OPPOSITES.items() if opposite not in mounting.options}
    flags = sum(flag for name, flag in _FLAGS.items() if name in options)
    data = [f"fd={descriptor}", "rootmode=40000", f"user_id={os.geteuid()}", f"group_id={os.getegid()}"]
    data += sorted(mounting.options & {"allow_other", "default_permissions"})
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mount(
        os.fsencode(mounting.source),
        os.fsencode(mounting.path),
        FILESYSTEM_TYPE.encode(),
        ctypes.c_ulong(flags),
        ",".join(data).encode(),
    )
    return ctypes.get_errno() if done else 0


def _fusermount(mounting: Mounting) -> int:
    # fusermount3 takes a comma for the end of an option unless a backslash is before it.
    source = mounting.source.replace("\\", "\\\\").replace(",", "\\,")
    options = ",".join([*sorted(mounting.options), f"fsname={source}", f"subtype={FILESYSTEM_TYPE.partition('.')[2]}"])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = ["fusermount3", "-o", options, "--", mounting.path]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
            check=False,
        )
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if done.returncode or not descriptors:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise MountFailed(f"cannot mount at {mounting.path}: {said or 'fusermount3 gave no reason'}")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
