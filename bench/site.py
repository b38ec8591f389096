"""Where benches work: a scratch directory, an XFS on a loop device in it, stores mounted by daemons of their own.

Owns everything outside the bench process. All of it lies under one directory named after the process, and is taken
down to the last mount and loop device, whatever happens; what a killed run has left is swept by the next one.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.result import PROJECT
from imgfs import mountpoint
from imgfs.settings import Settings
from imgfs.store import make_store

PREFIX = "imgfs-bench-"
_DEADLINE_S = 60.0
_POLL_S = 0.005
_SECTOR_BYTES = 512


class Failed(Exception):
    """A bench cannot run here, or what it ran failed."""


def run(*command: str | Path, deadline_s: float = 3600.0) -> str:
    """Run *command* to its end and return its standard output. Failed if it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=deadline_s,
        check=False,
        env=environment(),
        cwd="/",
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise Failed(f"{' '.join(map(str, command))} ended with {done.returncode}: {said}")
    return done.stdout.decode(errors="replace")


def environment() -> dict[str, str]:
    """Return the environment of what benches start: nothing of the user's, and this project's code."""
    # Debian keeps mkfs and losetup where a user's PATH does not look.
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    return {"PATH": path, "PYTHONPATH": str(PROJECT), "LC_ALL": "C.UTF-8"}


def python(module: str, *arguments: str | Path) -> str:
    """Run a module of this project in a process of its own and return its standard output."""
    return run(sys.executable, "-m", module, *arguments)


def imgfs(*arguments: str | Path) -> str:
    """Run the command line of imgfs."""
    return python("imgfs", *arguments)


def drop_caches() -> None:
    """Let the kernel forget all pages, inodes and names that are not in use."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@dataclass(frozen=True)
class XfsDisk:
    """A mounted XFS on a loop device that reads past the cache of the disk below it."""

    path: Path
    device: str

    def reads(self) -> tuple[int, int]:
        """Return (reads completed, bytes read) at the block device so far."""
        fields = Path(f"/sys/block/{os.path.basename(self.device)}/stat").read_text().split()
        return int(fields[0]), int(fields[2]) * _SECTOR_BYTES


@dataclass(frozen=True)
class Mounted:
    """A store that a daemon serves at `point`."""

    point: Path
    pid: int


class Site:
    """The scratch directory of one run; see `open_site`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._used = 0

    def fresh(self, name: str) -> Path:
        """Return a path in the scratch directory that nothing has."""
        self._used += 1
        return self.directory / f"{name}{self._used}"

    @contextlib.contextmanager
    def disk(self, size_bytes: int) -> Iterator[XfsDisk]:
        """Make an XFS of *size_bytes*, mount it, and take it away again."""
        image, path = self.fresh("xfs"), self.fresh("disk")
        if shutil.disk_usage(self.directory).free < size_bytes:
            raise Failed(f"{self.directory} has no room for {size_bytes >> 20} MiB; name another with --directory")
        with contextlib.ExitStack() as stack:
            stack.callback(image.unlink, missing_ok=True)
            with open(image, "wb") as file:
                file.truncate(size_bytes)
            run("mkfs.xfs", "-q", image)
            device = run("losetup", "--direct-io=on", "--find", "--show", image).strip()
            stack.callback(run, "losetup", "-d", device)
            path.mkdir()
            stack.callback(path.rmdir)
            run("mount", device, path)
            stack.callback(_unmount, path)
            yield XfsDisk(path, device)

    def make_store(self, path: Path, settings: Settings | None = None) -> Path:
        """Make an empty store at *path* and return that."""
        make_store(str(path), settings or Settings(), uid=os.geteuid(), gid=os.getegid())
        return path

    @contextlib.contextmanager
    def mounted(self, store: Path, module: str = "imgfs", *arguments: str | Path) -> Iterator[Mounted]:
        """Serve *store* by a daemon of its own, `python -m MODULE mount ...`; end it when all is done."""
        point = self.fresh("mnt")
        point.mkdir()
        log = point.with_suffix(".log")
        command = [sys.executable, "-m", module, "mount", *arguments, store, point]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(), cwd="/"
            )
        try:
            _wait_for_mount(process, point, log)
            yield Mounted(point, process.pid)
            _unmount(point)
            if process.wait(_DEADLINE_S):
                raise Failed(f"the daemon ended with {process.returncode}: {log.read_text()}")
        finally:
            _end(process, point)


def _wait_for_mount(process: "subprocess.Popen[bytes]", point: Path, log: Path) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while b"mounted at" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"no mount at {point}: {log.read_text()}")
        time.sleep(_POLL_S)


def _unmount(point: Path) -> None:
    """Unmount; whoever looks at every new mount, as a desktop does, gets a moment to finish."""
    deadline = time.monotonic() + _DEADLINE_S
    while True:
        try:
            run("umount", point)
            return
        except Failed:
            if time.monotonic() > deadline or not os.path.ismount(point):
                raise
            time.sleep(_POLL_S * 20)


def _end(process: "subprocess.Popen[bytes]", point: Path) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    while mountpoint.find(str(point)):
        run("umount", "-l", point)
    point.rmdir()


@contextlib.contextmanager
def open_site(base: str | None = None) -> Iterator[Site]:
    """Make the scratch directory of this run under *base*, by default where temporary files go."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        raise Failed("benches mount file systems and drop caches: be root, with /dev/fuse")
    base = os.path.realpath(base or tempfile.gettempdir())
    for name in os.listdir(base):
        if name.startswith(PREFIX) and not _lives(name):
            _sweep(Path(base, name))
    directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=base))
    directory.chmod(0o755)
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield Site(directory)
    finally:
        _sweep(directory)
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _lives(name: str) -> bool:
    pid = name.removeprefix(PREFIX).partition("-")[0]
    try:
        return b"python" in Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return False


def _sweep(directory: Path) -> None:
    """Take down every mount and loop device under *directory*, then its files; daemons end by that."""
    for mount in reversed(mountpoint.mounts()):
        if mount.point.startswith(f"{directory}/"):
            run("umount", "-l", mount.point)
    for line in run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").splitlines():
        device, _, file = line.partition(" ")
        if file.strip().startswith(f"{directory}/"):
            run("losetup", "-d", device)
    shutil.rmtree(directory, ignore_errors=True)
