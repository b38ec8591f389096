"""Real mounts for tests: an XFS image file on a loop device, stores on it, `imgfs mount` as a process of its own.

Owns everything outside the test process: what it makes lies under one directory named after the process, and is
taken down to the last mount and loop device; what a run that died has left is swept when the next one starts. A
test fails if its daemon logs a line that the test does not expect.

Its fixtures are registered in `conftest.py`.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from imgfs import mountpoint
from imgfs.errors import EXIT_OK
from imgfs.settings import MIB, Settings
from imgfs.store import make_store

PROJECT = Path(__file__).parent.parent
PREFIX = os.path.join(tempfile.gettempdir(), "imgfs-mount-test-")
# Nothing here takes a second when it works; a machine may be busy.
DEADLINE_S = 30.0
POLL_S = 0.005
# No test takes longer with one daemon.
WATCHDOG_S = 100.0
# Sparse: it takes what is written to it. Deleted space does not come back, and some tests write for a while.
XFS_BYTES = 1024 * MIB
# Small, so that some photos fill several volumes.
SETTINGS = Settings(volume_bytes_max=8 * MIB)
EXPECTED_LOG = (r"mounted at /\S+", r"SIG(TERM|INT): stopping")
# ioctl(2): its number and what it takes, the version and to wait for files that are in use.
_XFS_IOC_FREE_EOFBLOCKS = 0x8080583A
_XFS_FREE_EOFBLOCKS = struct.pack("<II120x", 1, 1)
# What is said when workers are killed.
WORKER_DIED = r"worker \d+ \(process \d+\) (died of SIG\w+|ended with code \d+), with .*"
WORKER_DEATHS = (
    WORKER_DIED,
    r"worker \d+ \(process \d+\) is killed: it (read for too long|took too long to answer .*), with .*",
    r"\d+ of \d+ workers replaced in \d+ ms",
)


def wait_until(condition: Callable[[], object], what: str, *, process: subprocess.Popen[bytes] | None = None) -> None:
    """Poll until *condition* holds; fail after a deadline, or when *process*, which should bring it about, ends."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"the process ended with {process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {DEADLINE_S:g} s: {what}")
        time.sleep(POLL_S)


def run(*command: str | Path, code: int = 0, user: str | None = None, cwd: Path | None = None) -> str:
    """Run *command* to its end, with a deadline; return what it wrote, both outputs. It must exit with *code*."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=DEADLINE_S * 2,
        check=False,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        cwd=cwd or "/",
        env=_environment(),
    )
    text = done.stdout.decode(errors="backslashreplace")
    assert done.returncode == code, f"{command} ended with {done.returncode}: {text}"
    return text


def imgfs(*arguments: str | Path, code: int = 0) -> str:
    """Run the command line of imgfs; return what it wrote."""
    return run(sys.executable, "-m", "imgfs", *arguments, code=code)


def children_of(parent: int, name: str = "") -> list[int]:
    """Return the pids of the living children of *parent* that have *name* in their name."""
    found = []
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            if name in Path(f"/proc/{pid}/comm").read_text() and _is_alive(int(pid)):
                found.append(int(pid))
        except OSError:
            continue  # it ended meanwhile
    return found


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def as_user(uid: int, gid: int, call: Callable[[], object]) -> None:
    """Run *call* in a child process of another user; it must not fail."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            call()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def failure(call: Callable[..., object], *arguments: object) -> str:
    """Return the name of the error that the system call *call* fails with."""
    number = None
    try:
        call(*arguments)
    except OSError as error:
        number = error.errno
    assert number is not None, f"{call} did not fail"
    return errno.errorcode[number]


def _environment() -> dict[str, str]:
    # Nothing of the user's: no configuration of git, no locale.
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"}


# -- the disk ---------------------------------------------------------------------------------------------------------


class XfsDisk:
    """An XFS of its own in an image file."""

    def __init__(self, directory: Path) -> None:
        self._image = directory / "xfs.img"
        self.path = directory / "disk"
        self.path.mkdir()
        with open(self._image, "wb") as image:
            image.truncate(XFS_BYTES)
        run("mkfs.xfs", "-q", self._image)
        run("mount", "-o", "loop", self._image, self.path)

    @contextlib.contextmanager
    def filled_up(self, *, leaving: int) -> Iterator[None]:
        """Let nobody have more than *leaving* bytes of the disk, for a while."""
        filler = self.path / "filler"
        size = self._available() - leaving
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        try:
            yield
        finally:
            before = self._available()
            filler.unlink()
            # XFS gives the space back in the background.
            wait_until(lambda: self._available() >= before + size - MIB, "the disk has room again")

    def _available(self) -> int:
        space = os.statvfs(self.path)
        return space.f_bavail * space.f_frsize

    def remove(self) -> None:
        run("umount", self.path)
        self.path.rmdir()
        self._image.unlink()


def give_back_ahead(directory: Path) -> None:
    """Let the XFS that holds *directory* give back what it has set aside behind the ends of files.

    It does so for files that grow, often as much again as they are long, and df and `st_blocks` count it. The first
    close of a file that was written gives it back at once; what later writes set aside stays for five minutes.
    """
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(opened, _XFS_IOC_FREE_EOFBLOCKS, _XFS_FREE_EOFBLOCKS)
    finally:
        os.close(opened)


def sweep(directory: str) -> None:
    """Take down everything a run has left under *directory*: mounts, loop devices, files; daemons end by that."""
    for mount in reversed(mountpoint.mounts()):
        if mount.point.startswith(directory + "/"):
            run("umount", "-l", mount.point)
    for line in run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").splitlines():
        device, _, file = line.partition(" ")
        if file.strip().startswith(directory + "/"):
            run("losetup", "-d", device)
    shutil.rmtree(directory)


def _lives(directory: str) -> bool:
    try:
        return b"python" in Path("/proc", directory.removeprefix(PREFIX).split("-")[0], "cmdline").read_bytes()
    except OSError:
        return False


@pytest.fixture(scope="session")
def site() -> Iterator[Path]:
    """A directory on the host that takes mounts; fails, or outside of CI skips, where nothing can be mounted."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        reason = "needs root and /dev/fuse"
        if os.environ.get("IMGFS_SKIP_NOTHING"):
            pytest.fail(reason)
        pytest.skip(reason)
    for left in glob.glob(PREFIX + "*"):
        if not _lives(left):
            sweep(left)
    directory = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")
    # Other users, such as a web server's, have to get through.
    os.chmod(directory, 0o755)
    try:
        yield Path(directory)
        assert os.listdir(directory) == []
    finally:
        sweep(directory)


@pytest.fixture(scope="session")
def disk(site: Path) -> Iterator[XfsDisk]:
    """An XFS for all tests of the session."""
    disk = XfsDisk(site)
    yield disk
    disk.remove()


# -- what is put in ---------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a program can see of one file."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    content: bytes  # a digest, the target of a link, nothing for a directory


def make_tree(directory: Path, seed: int, images: int = 60) -> None:
    """Fill *directory* with images, directories and links of many sizes, names, modes and times."""
    chance = random.Random(seed)
    top = os.fsencode(directory)
    places = [top, top + b"/a", top + b"/a/b c", top + "/ä/深".encode()]
    for place in places:
        os.makedirs(place, exist_ok=True)
    names = [b"n" * 255, "日本.jpg".encode(), b"new\nline", b"\xff\xfe not text", b"-rf", b"back\\slash, comma", b" "]
    sizes = [0, 1, 4095, 4096, 131072, 262145, MIB, MIB + 1, 3 * MIB + 5, 5 * MIB]
    for number in range(images):
        name = names[number] if number < len(names) else b"%04d.jpg" % number
        size = sizes[number] if number < len(sizes) else chance.randrange(60_000)
        path = chance.choice(places) + b"/" + name
        with open(path, "wb") as file:
            file.write(chance.randbytes(size))
        os.chmod(path, chance.choice([0o644, 0o600, 0o755, 0o444, 0o000]))
        os.chown(path, *chance.choice([(0, 0), (33, 33), (1234, 100)]))
        os.utime(path, ns=(0, chance.randrange(-(10**18), 2 * 10**18)))
    os.symlink(b"a/b c", top + b"/link")
    os.symlink(b"x" * 4095, top + b"/long link")
    for place in reversed(places):
        os.utime(place, ns=(0, chance.randrange(2 * 10**18)))


def seen(directory: Path) -> dict[bytes, Seen]:
    """Return all that a program can see below *directory*, by path."""
    found = {}
    top = os.fsencode(directory)
    for place, directories, files in os.walk(top):
        for name in [b".", *directories, *files]:
            path = os.path.join(place, name)
            status = os.lstat(path)
            content = b""
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
            found[os.path.relpath(path, top)] = Seen(
                status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, content
            )
    return found


# -- the mount --------------------------------------------------------------------------------------------------------


class Mounted:
    """A store and its mountpoint; `start` serves it by a daemon in the foreground of a process of its own."""

    def __init__(self, store: Path, point: Path) -> None:
        self.store = store
        self.point = point
        self.log = point.with_suffix(".log")
        self.expected_log = list(EXPECTED_LOG)
        self.check_code = EXIT_OK  # what `imgfs check` must find at the end of the test
        self.process: subprocess.Popen[bytes] | None = None
        self._watchdog: threading.Timer | None = None

    def start(
        self,
        options: str = "allow_other",
        *,
        store: Path | None = None,
        environment: dict[str, str] | None = None,
        fault: tuple[str, str] | None = None,
        answers: bool = True,
    ) -> None:
        """Mount, and return when the mount *answers*; *fault*: what goes wrong, as `faulty_daemon.py` takes it."""
        program = [PROJECT / "tests" / "faulty_daemon.py", *fault] if fault else ["-m", "imgfs"]
        command = [sys.executable, *program, "mount", "-o", options, store or self.store, self.point]
        with open(self.log, "ab") as log:
            start = log.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment() | (environment or {}),
            )
        self.watch()
        if answers:
            wait_until(lambda: b"mounted at" in self._logged_since(start), "the mount answers", process=self.process)

    def watch(self, seconds: float = WATCHDOG_S) -> None:
        """Kill the daemon if it still runs in so many *seconds*, counted anew at each call.

        Who waits for a daemon that hangs cannot be interrupted, but gets an error when it is killed.
        """
        assert self.process is not None
        self._unwatch()
        self._watchdog = threading.Timer(seconds, self.process.kill)
        self._watchdog.start()

    def stop(self) -> None:
        """Unmount as a user does; the daemon has to end by itself, and well."""
        imgfs("umount", self.point)
        self.wait_for_end()

    def terminate(self, number: int = signal.SIGTERM) -> None:
        """Stop as an init system does."""
        assert self.process is not None
        self.process.send_signal(number)
        self.wait_for_end()

    def wait_for_end(self, code: int = 0) -> None:
        assert self.process is not None
        assert self.process.wait(DEADLINE_S) == code, self.log.read_text()
        self._forget_process()

    def kill(self) -> None:
        """End the daemon as the kernel would, out of memory: at any instruction, without a word."""
        assert self.process is not None
        served_by = self.children()
        self.process.kill()
        self.wait_for_end(-signal.SIGKILL)
        wait_until(lambda: not any(map(_is_alive, served_by)), "its workers have died with it")
        # A dying process may hold the device a moment longer: who asks just then is told of an abort, nobody after.
        with contextlib.suppress(OSError):
            os.statvfs(self.point)
        self.expected_log.append(r".*: the daemon that had mounted \S+ is dead; clearing its stale mount")
        self.expected_log += [r"the last run was cut off: .*", r"rebuilt .*"]

    def children(self, name: str = "") -> list[int]:
        """Return the pids of the processes that serve the mount, or of those with *name* in theirs."""
        assert self.process is not None
        return children_of(self.process.pid, name)

    def drop_caches(self) -> None:
        """Let the kernel forget what it knows of the mount, and the disk below."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")

    def tear_down(self) -> None:
        """Leave nothing, whatever the test did; then fail it if the daemon had something to say."""
        process = self.process
        if process is not None:
            process.terminate()
            try:
                process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._forget_process()
        while mountpoint.find(str(self.point)):
            mountpoint.take_away(str(self.point), lazy=True)
        self.point.rmdir()
        if not self.log.exists():
            return
        lines = self.log.read_text(errors="backslashreplace").splitlines()
        self.log.unlink()
        expected = re.compile("imgfs: (" + "|".join(self.expected_log) + ")")
        surprises = [line for line in lines if not expected.fullmatch(line)]
        assert not surprises, "\n".join(["the daemon logged:", *surprises])

    def _forget_process(self) -> None:
        self.process = None
        self._unwatch()

    def _unwatch(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog.join()
            self._watchdog = None

    def _logged_since(self, start: int) -> bytes:
        return self.log.read_bytes()[start:]


@pytest.fixture
def stopped(disk: XfsDisk, site: Path) -> Iterator[Mounted]:
    """A new store on XFS, not mounted yet; at the end it must pass `imgfs check`."""
    name = f"store{random.getrandbits(32):08x}"
    store, point = disk.path / name, site / name
    point.mkdir()
    make_store(str(store), SETTINGS, uid=0, gid=0)
    mounted = Mounted(store, point)
    try:
        yield mounted
    finally:
        try:
            mounted.tear_down()
            imgfs("check", store, code=mounted.check_code)
        finally:
            shutil.rmtree(store)


@pytest.fixture
def mounted(stopped: Mounted) -> Mounted:
    """A new store, mounted with `allow_other`."""
    stopped.start()
    return stopped


@pytest.fixture
def root(mounted: Mounted) -> Path:
    """The root directory of a new, empty store that is mounted."""
    return mounted.point
