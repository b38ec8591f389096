"""What is mounted where: finds mounts of imgfs, recognises those whose daemon is dead, takes them away.

Owns the reading of the mount table and the system calls that unmount. Must not know stores, nor pyfuse3.
"""

import ctypes
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from typing import NamedTuple

from imgfs.errors import Busy, ImgfsError, MountFailed
from imgfs.opening import owner

log = logging.getLogger(__name__)

# What tells a daemon to put the installed release in its place.
UPGRADE = signal.SIGHUP
FILESYSTEM_TYPE = "fuse.imgfs"
MOUNT_TABLE = "/proc/self/mountinfo"
# A living daemon answers a stat from memory; a dead one fails at once. What takes longer hangs.
PATIENCE_S = 5.0
# Closing a store writes out what the page cache holds of it.
CLOSE_PATIENCE_S = 120.0
CLOSE_POLL_S = 0.01
# The kernel tells the daemon at once that its mount is gone, unless it is not gone everywhere.
NAMESPACE_PATIENCE_S = 1.0

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_ESCAPE = re.compile(r"\\([0-7]{3})")
# What a system call on the mount of a dead daemon fails with.
_DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


class Mount(NamedTuple):
    """One line of the mount table."""

    point: str
    device: str  # major:minor
    type: str
    source: str  # for imgfs, the path of the store
    writable: bool


def mounts(table: str = MOUNT_TABLE) -> list[Mount]:
    """Return the mount table, in the order in which things were mounted."""
    found = []
    with open(table, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            # 36 35 98:0 /root /point rw,noatime master:1 - type source rw,errors=continue
            left, _, right = line.rstrip("\n").partition(" - ")
            fields, (type_, source, options, *_) = left.split(" "), [*right.split(" ", 2), "", ""]
            if len(fields) < 6:
                continue  # no mount; what a file system says of its options is its own
            writable = options.split(",")[0] == "rw"
            found.append(Mount(_unescaped(fields[4]), fields[2], _unescaped(type_), _unescaped(source), writable))
    return found


def find(path: str) -> Mount | None:
    """Return what is mounted at *path*, as `canonical` returns it; of several the one on top."""
    return next((mount for mount in reversed(mounts()) if mount.point == path), None)


def of_store(path: str) -> list[Mount]:
    """Return where the store at *path* is mounted."""
    # The mount table has other than ASCII characters of the path escaped.
    source = os.path.abspath(path).encode("ascii", "backslashreplace").decode()
    return [mount for mount in mounts() if mount.source == source and mount.type == FILESYSTEM_TYPE]


def canonical(path: str) -> str:
    """Return *path* as the mount table has it, without a look into what is mounted there: that could hang."""
    parent, name = os.path.split(os.path.abspath(path))
    unlooked = os.path.join(os.path.realpath(parent), name)
    return unlooked if find(unlooked) else os.path.realpath(path)


def prepare(mountpoint: str, store_path: str) -> str:
    """Return the canonical path of *mountpoint*, where the store at *store_path* can be mounted now.

    The stale mount of a dead daemon is taken away.

    Raises:
        Busy: a store is mounted there, and its daemon lives.
        MountFailed: that is no place to mount this store.
    """
    path = canonical(mountpoint)
    while (mount := find(path)) and mount.type == FILESYSTEM_TYPE:
        if not _is_dead(mount):
            raise Busy(f"{mount.source} is mounted at {path}; unmount it first: imgfs umount {path}")
        log.warning("%s: the daemon that had mounted %s is dead; clearing its stale mount", path, mount.source)
        take_away(path, lazy=True)
    try:
        if not os.path.isdir(path):
            os.stat(path)
            raise MountFailed(f"mountpoint {path} is not a directory")
    except FileNotFoundError:
        raise MountFailed(f"mountpoint {path} does not exist; make it first: mkdir -p {path}") from None
    except OSError as error:
        raise MountFailed(f"mountpoint {path}: {error.strerror}") from None
    store_path = os.path.realpath(store_path)
    if os.path.commonpath([path, store_path]) == path:
        raise MountFailed(f"the store {store_path} lies inside the mountpoint {path}, which would hide it")
    if os.path.commonpath([path, store_path]) == store_path:
        raise MountFailed(f"the mountpoint {path} lies inside the store {store_path}; name a directory outside of it")
    return path


def daemon_of(mount: Mount) -> int | None:
    """Return the pid of the supervisor of *mount*, None if we may not know."""
    connection = f"fuse_connection:\t{mount.device.partition(':')[2]}\n"
    serving = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            for descriptor in os.listdir(f"/proc/{name}/fd"):
                if os.readlink(f"/proc/{name}/fd/{descriptor}") == "/dev/fuse":
                    with open(f"/proc/{name}/fdinfo/{descriptor}", encoding="utf-8") as info:
                        if connection in info.read():
                            serving.add(int(name))
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
    # Older kernels do not say which mount a descriptor is of, but the writer of a store is known by its lock.
    return next((pid for pid in serving if _parent_of(pid) not in serving), None) or _writer_of(mount)


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Take the mount of imgfs at *mountpoint* away, and wait until all is on the disk and the store is free.

    With *lazy* it goes from the tree at once, for those who use it when they are done, and nothing is waited for.
    The mount of a dead daemon is just taken away.

    Raises:
        Busy: somebody has a file open or a working directory in it, and *lazy* is not set; or the daemon does not end.
        MountFailed: no store is mounted there.
    """
    path = canonical(mountpoint)
    mount = find(path)
    if mount is None:
        raise MountFailed(f"nothing is mounted at {path}")
    if mount.type != FILESYSTEM_TYPE:
        raise MountFailed(f"what is mounted at {path} is {mount.type}, not imgfs; use umount")
    if lazy or _is_dead(mount):
        take_away(path, lazy=True)
        return
    daemon = _writer_of(mount)
    take_away(path)
    _wait_for_end(daemon, mount)


def take_away(path: str, *, lazy: bool = False) -> None:
    """Unmount what is mounted at *path*, and do not wait for anybody; *lazy*: who uses it still can, until done.

    Raises:
        Busy: it is in use, and *lazy* is not set.
        MountFailed: the kernel refuses.
    """
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        # The call may wait for the daemon, so it must not be made while holding the interpreter: CDLL lets go of it.
        if libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)) == 0:
            return
        number = ctypes.get_errno()
        if number == errno.EBUSY:
            raise _in_use(path)
        raise MountFailed(f"cannot unmount {path}: {os.strerror(number)}")
    program = shutil.which("fusermount3")
    if program is None:
        raise MountFailed("fusermount3 is missing; install the package fuse3")
    command = [program, "-u", *(["-z"] if lazy else []), "--", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip()
        raise _in_use(path) if "busy" in said else MountFailed(f"cannot unmount {path}: {said}")


def set_read_ahead(mountpoint: str, kib: int) -> bool:
    """Let the kernel read *kib* KiB ahead in the file system at *mountpoint*; return whether we may."""
    device = os.stat(mountpoint).st_dev
    try:
        with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w") as setting:
            setting.write(str(kib))
    except OSError as error:
        log.debug("read-ahead stays as it is: %s", error)
        return False
    return True


def _unescaped(text: str) -> str:
    """Return *text* of the mount table without its octal escapes of blanks and backslashes."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def _is_dead(mount: Mount) -> bool:
    """Return whether the daemon of *mount* is gone.

    Raises:
        Busy: it is there, and does not answer.
    """
    answer: list[int] = []

    def ask() -> None:
        try:
            os.statvfs(mount.point)
            answer.append(0)
        except OSError as error:
            answer.append(error.errno or errno.EIO)

    # A request that hangs can only be left behind, with its thread.
    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(PATIENCE_S)
    if not answer:
        raise Busy(
            f"{mount.source} is mounted at {mount.point}, but its daemon has not answered for {PATIENCE_S:.0f} s; "
            f"end that daemon, then try again"
        )
    return answer[0] in _DEAD


def _writer_of(mount: Mount) -> int | None:
    """Return the pid of the daemon that has the store of *mount* open for writing, None if that cannot be told."""
    try:
        return owner(mount.source) if mount.writable else None
    except OSError:
        return None  # somebody else's store


def _wait_for_end(daemon: int | None, mount: Mount) -> None:
    """Wait until the process *daemon*, whose *mount* was taken away, has closed its store."""
    start = time.monotonic()
    while daemon is not None and _writer_of(mount) == daemon:
        waited_s = time.monotonic() - start
        if waited_s > CLOSE_PATIENCE_S:
            raise Busy(
                f"{mount.point} is unmounted, but its daemon (process {daemon}) has not closed {mount.source} "
                f"within {CLOSE_PATIENCE_S:.0f} s; do not pull the plug yet"
            )
        if waited_s > NAMESPACE_PATIENCE_S and (other := _seen_by(mount)):
            raise Busy(
                f"{mount.point} is unmounted here, but process {other} still has it in a mount namespace of its own, "
                f"as containers have; end that, or the daemon (process {daemon}), to free {mount.source}"
            )
        time.sleep(CLOSE_POLL_S)


def _seen_by(mount: Mount) -> int | None:
    """Return the pid of a process that has *mount* in its mount table."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if any(other.device == mount.device for other in mounts(f"/proc/{name}/mountinfo")):
                return int(name)
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
    return None


def _in_use(path: str) -> ImgfsError:
    return Busy(
        f"{path} is in use: a process has a file open or its working directory there; "
        f"end it, or unmount anyway: imgfs umount --lazy {path}"
    )
