"""Where benches work: a scratch directory, an XFS on a loop device in it, stores mounted by daemons of their own.

Owns everything outside the bench process. All of it lies under one directory named after the process, and is taken
down to the last mount and loop device, whatever happens; what a killed run has left is swept by the next one.
"""

import contextlib
import mmap
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.commands import Failed, run
from bench.serving import MountServer, unmount
from imgfs import mountpoint
from imgfs.settings import Settings
from imgfs.store import make_store

PREFIX = "imgfs-bench-"
_SECTOR_BYTES = 512
# Larger image files are written whole before, as a disk is; smaller ones are for tries.
_SPARSE_BYTES_MAX = 2 << 30
_WRITE_BYTES = 4 << 20
# More than most turns take.
_TOUCHED_BYTES = 1 << 30
# Python 3.11 has no name for it.
_MADV_POPULATE_WRITE = 23


def drop_caches() -> None:
    """Let the kernel forget all pages, inodes and names that are not in use; as `touch_memory`."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    touch_memory()


def touch_memory() -> None:
    """Have the memory at hand that the next turn takes.

    A virtual machine may give what is free back to its host, and then waits for each page that is used anew: on the
    machine that docs/performance.md tells of 8 us, five times what it takes to write an image's bytes there.
    """
    with mmap.mmap(-1, min(_TOUCHED_BYTES, _available_bytes() // 4), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):  # in smaller pages, then
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_MADV_POPULATE_WRITE)


def _available_bytes() -> int:
    """Return how much memory is free, or could be."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def caches_dropped() -> str:
    """Return how often somebody has let the kernel forget what it had: whoever did costs others requests."""
    with open("/proc/vmstat", encoding="ascii") as lines:
        return "".join(line for line in lines if line.startswith("drop_"))


@dataclass(frozen=True)
class XfsDisk:
    """A mounted XFS on a loop device that reads past the cache of the disk below it."""

    path: Path
    device: str

    def reads(self) -> tuple[int, int]:
        """Return (reads completed, bytes read) at the block device so far."""
        fields = Path(f"/sys/block/{os.path.basename(self.device)}/stat").read_text().split()
        return int(fields[0]), int(fields[2]) * _SECTOR_BYTES


class Site:
    """The scratch directory of one run; see `open_site`."""

    def __init__(self, directory: Path, systems: Collection[str] = ()) -> None:
        self.directory = directory
        self._systems = systems
        self._used = 0

    def wants(self, system: str) -> bool:
        """Return whether this run is to measure *system*; imgfs and XFS always."""
        short = system.partition(",")[0].lower()
        return not self._systems or short in ("imgfs", "xfs", *self._systems)

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
            if size_bytes > _SPARSE_BYTES_MAX:
                # The first write to a block of a sparse file is one more change of the file system below.
                count = f"count={size_bytes // _WRITE_BYTES}"
                run("dd", "if=/dev/zero", f"of={image}", f"bs={_WRITE_BYTES}", count, "oflag=direct", "status=none")
            else:
                with open(image, "wb") as file:
                    file.truncate(size_bytes)
            run("mkfs.xfs", "-q", image)
            device = run("losetup", "--direct-io=on", "--find", "--show", image).strip()
            stack.callback(run, "losetup", "-d", device)
            path.mkdir()
            stack.callback(path.rmdir)
            run("mount", device, path)
            stack.callback(unmount, path)
            yield XfsDisk(path, device)

    def make_store(self, path: Path, settings: Settings | None = None) -> Path:
        """Make an empty store at *path* and return that."""
        make_store(str(path), settings or Settings(), uid=os.geteuid(), gid=os.getegid())
        return path

    @contextlib.contextmanager
    def mounted(self, store: Path, module: str = "imgfs", *arguments: str | Path) -> Iterator[MountServer]:
        """Serve *store* by a daemon of its own, `python -m MODULE mount ...`; end it when all is done."""
        server = self.serve(store, module, *arguments)
        try:
            yield server
            server.unmount()
        finally:
            server.stop()

    def serve(self, store: Path, module: str = "imgfs", *arguments: str | Path) -> MountServer:
        """As `mounted`, for who ends it himself."""
        point = self.fresh("mnt")
        # Not mortal: the processes of the daemon look after each other, and end with the mount.
        command = (sys.executable, "-m", module, "mount", *arguments, store, point)
        server = MountServer(point, *command, mortal=False)
        try:
            server.wait_until(lambda: server.has_said("mounted at"))
        except BaseException:
            server.stop()
            raise
        return server


@contextlib.contextmanager
def open_site(base: str | None = None, systems: Collection[str] = ()) -> Iterator[Site]:
    """Make the scratch directory of this run under *base*, by default where temporary files go.

    *systems* are those beside imgfs and XFS that are to be measured; if there are none, all.
    """
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
        yield Site(directory, systems)
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
