"""The file systems that are measured, behind one interface: how each is brought up and down, and filled.

All of them keep what they hold on the same XFS. `neighbours` has those that run a server of their own kind.
Must not know what is measured.
"""

import abc
import functools
import mmap
import os
import re
import resource
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from bench.commands import Failed, imgfs, run
from bench.measure import together
from bench.serving import DEADLINE_S, MountServer
from bench.site import Site, XfsDisk, drop_caches, touch_memory
from bench.stores import make_large_store
from bench.trees import name_directory, name_file
from imgfs.volumes import VOLUMES

# Debian ships the example with the headers.
_PASSTHROUGH = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")
_COPIERS = 4
_CAP_SYS_RESOURCE = 1 << 24


class System(abc.ABC):
    """A file system under test: mounted, filled, emptied of what the kernel remembers, taken down."""

    name: ClassVar[str]
    is_slow: ClassVar[bool] = False
    """It takes minutes to fill where others take seconds."""

    def __init__(self, site: Site, disk: XfsDisk) -> None:
        self.site = site
        self.disk = disk
        self.home = disk.path / self.name.replace(", ", "-").replace(" ", "-")
        self.home.mkdir()

    @classmethod
    def missing(cls) -> str:
        """Return why it cannot be had here, nothing if it can."""
        return ""

    @property
    @abc.abstractmethod
    def directory(self) -> Path:
        """Where its files are seen while it is mounted."""

    @abc.abstractmethod
    def mount(self) -> None:
        """Begin to serve."""

    @abc.abstractmethod
    def unmount(self) -> None:
        """Stop serving; all that was written is on the disk below then, or on its way."""

    @abc.abstractmethod
    def close(self) -> None:
        """End whatever runs, in whatever state it is."""

    @abc.abstractmethod
    def kill(self) -> None:
        """Cut off who serves it, so that no request waits any longer; called from another thread."""

    def files_max(self) -> int | None:
        """Return how many files it can be asked for from one mount to the next; None: as many as there are."""
        return None

    @abc.abstractmethod
    def load(self, source: Path) -> None:
        """Bring in what is in the directory *source*, in the quickest way there is; it is mounted before and after."""

    @abc.abstractmethod
    def load_names(self, images: int, directories: int) -> None:
        """Fill it with so many images without content, `trees.name_file` of them; it is mounted before and after."""

    def settle(self) -> None:
        """Return once nothing that was written waits for the disk; it may be mounted elsewhere then."""
        os.sync()
        touch_memory()

    def drop_caches(self) -> None:
        """Let all that was read be forgotten: by the kernel, and by what serves it."""
        self.unmount()
        drop_caches()
        self.mount()


class Xfs(System):
    """Plain files."""

    name = "XFS"

    @property
    def directory(self) -> Path:
        return self.home

    def mount(self) -> None:
        pass

    def unmount(self) -> None:
        pass

    def close(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def load(self, source: Path) -> None:
        copy_in(source, self.home)

    def load_names(self, images: int, directories: int) -> None:
        make_names(self.home, images, directories)


class Served(System):
    """What a program serves at a mountpoint."""

    def __init__(self, site: Site, disk: XfsDisk) -> None:
        super().__init__(site, disk)
        self._server: MountServer | None = None

    @property
    def server(self) -> MountServer:
        assert self._server is not None, f"{self.name} is not mounted"
        return self._server

    @property
    def directory(self) -> Path:
        return self.server.point

    @abc.abstractmethod
    def command(self, point: Path) -> Sequence[str | Path]:
        """Return what serves it at *point*, in the foreground."""

    def mount(self) -> None:
        point = self.site.fresh("mnt")
        self._server = MountServer(point, *self.command(point))
        self._server.wait_until(self._server.mounted)

    def unmount(self) -> None:
        self.server.unmount()
        self.close()

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def kill(self) -> None:
        if server := self._server:
            server.kill()

    def load(self, source: Path) -> None:
        copy_in(source, self.directory)

    def load_names(self, images: int, directories: int) -> None:
        make_names(self.directory, images, directories)


class Imgfs(Served):
    """What all of this is about, with as many workers as it takes by itself."""

    name = "imgfs"
    workers: ClassVar[int | None] = None
    options: ClassVar[str] = ""

    def __init__(self, site: Site, disk: XfsDisk) -> None:
        super().__init__(site, disk)
        self.store = site.make_store(self.home / "store")

    def command(self, point: Path) -> Sequence[str | Path]:
        raise NotImplementedError

    def mount(self) -> None:
        workers = "" if self.workers is None else f"workers={self.workers}"
        self._server = self.site.serve(self.store, "imgfs", "-o", f"{self.options},{workers}")

    def load(self, source: Path) -> None:
        self.unmount()
        imgfs("import", "--quiet", source, self.store)
        self.mount()

    def load_names(self, images: int, directories: int) -> None:
        self.unmount()
        shutil.rmtree(self.store)
        make_large_store(self.store, images, directories)
        self.mount()

    def drop_caches(self) -> None:
        """The daemon reads the names in at its start: they are what has to be resident."""
        super().drop_caches()
        for path in (self.store / VOLUMES).glob("*.names"):
            _wait_until_resident(path)


class ImgfsOneWorker(Imgfs):
    name = "imgfs, 1 worker"
    workers = 1


class ImgfsNoawake(Imgfs):
    name = "imgfs, noawake"
    options = "noawake"


class ImgfsTwoWorkers(Imgfs):
    name = "imgfs, 2 workers"
    workers = 2


class Passing(Served):
    """A program that passes every request on to the XFS below."""

    def __init__(self, site: Site, disk: XfsDisk) -> None:
        super().__init__(site, disk)
        self.below = self.home / "below"
        self.below.mkdir()

    def load(self, source: Path) -> None:
        self.unmount()
        copy_in(source, self.below)
        self.mount()

    def load_names(self, images: int, directories: int) -> None:
        self.unmount()
        make_names(self.below, images, directories)
        self.mount()


class Bindfs(Passing):
    """As Debian packs it. In more than one thread it was no faster here."""

    name = "bindfs"

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("bindfs") else "bindfs is not installed"

    def command(self, point: Path) -> Sequence[str | Path]:
        return "bindfs", "-f", self.below, point


class Passthrough(Passing):
    """The example server of libfuse, in C on its low level, with all caching on."""

    name = "passthrough_ll"

    @classmethod
    def missing(cls) -> str:
        if not _PASSTHROUGH.exists():
            return "libfuse3-dev has not installed its source"
        return "" if shutil.which("gcc") and shutil.which("pkg-config") else "there is no gcc or pkg-config"

    def command(self, point: Path) -> Sequence[str | Path]:
        most = _descriptors_max()
        options = f"source={self.below},cache=always,timeout=86400"
        return "prlimit", f"--nofile={most}:{most}", _passthrough(self.site), "-f", "-o", options, point

    def files_max(self) -> int:
        """It holds every file open that the kernel knows, and no limit on that may be lifted without a privilege."""
        return _descriptors_max() * 9 // 10

    def settle(self) -> None:
        """Also what it holds open is let go: at its limit `close(dup(fd))` of its flush says EBADF for EMFILE."""
        self.unmount()
        super().settle()
        self.mount()


def _descriptors_max() -> int:
    """Return how many files a process that is started here may have open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    may_raise = found is not None and int(found[1], 16) & _CAP_SYS_RESOURCE
    return int(Path("/proc/sys/fs/nr_open").read_text()) if may_raise else most


@functools.cache
def _passthrough(site: Site) -> Path:
    """Compile it; return the program."""
    program = site.fresh("passthrough_ll")
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "fuse3"))
    run("gcc", "-O2", "-Wno-all", _PASSTHROUGH, "-o", program, *flags)
    return program


def copy_in(source: Path, target: Path) -> None:
    """Copy what is in *source* into *target*, some directories at a time; on one XFS the bytes are shared."""
    if source == target:
        return
    entries = sorted(source.iterdir())
    together([functools.partial(_copy, mine, target) for n in range(_COPIERS) if (mine := entries[n::_COPIERS])])


def _copy(entries: Sequence[Path], target: Path) -> None:
    run("cp", "-r", "--reflink=auto", "-t", target, *entries)


def make_names(top: Path, images: int, directories: int) -> None:
    """Make empty files, spread over so many directories, or in *top* itself if it is one."""
    paths = [top / name_directory(number) for number in range(directories)] if directories > 1 else [top]
    for number, path in enumerate(paths):
        path.mkdir(exist_ok=True)
        at = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        for image in range(number, images, directories):
            os.mknod(name_file(image), 0o644, dir_fd=at)
        os.close(at)


def _wait_until_resident(path: Path) -> None:
    """Wait until the daemon's prefetch has brought the whole file at *path* into the page cache."""
    deadline = time.monotonic() + DEADLINE_S
    page = bytearray(1)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                os.preadv(file.fileno(), [page], at, os.RWF_NOWAIT)
                at += mmap.PAGESIZE
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Failed(f"{path.name} is not in the page cache: the daemon did not prefetch it") from None
                time.sleep(0.005)
