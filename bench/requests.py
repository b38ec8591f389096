"""FUSE requests per image of everyday operations, counted by the daemon itself (`counting`)."""

import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.commands import Failed
from bench.commands import run as run_command
from bench.counting import make_counts, read_counts
from bench.measure import say
from bench.result import Result
from bench.serving import MountServer
from bench.site import Site, caches_dropped
from bench.trees import make_tree

_IMAGE_BYTES = 20_000
_SETTLED_S = 0.1


@dataclass(frozen=True)
class _Size:
    images: int


SIZES = {"tiny": _Size(16), "quick": _Size(50), "full": _Size(500)}


# Extended attributes cost requests even where there are none, so everything is counted without and with them.
OPTIONS = ("noxattr", "xattr")


def run(site: Site, size: str) -> Result:
    """Measure it."""
    images = SIZES[size].images
    result = Result("requests", "FUSE requests per image", parameters={"images": images})
    benches = [_counted(site, images, options) for options in OPTIONS]
    without, having = (bench.counted for bench in benches)
    result.parameters["disturbed"] = sorted(what for bench in benches for what in bench.disturbed)
    for what, made in without.items():
        # A request more or less is chance: a page that the kernel forgot, a RELEASE that came late.
        same = abs(_for_attributes(having[what]) - _for_attributes(made)) * 2 < images
        for options, counts in zip(OPTIONS[:1] if same else OPTIONS, (made, having[what]), strict=False):
            name = what if same else f"{what}, `{options}`"
            result.add(name, "", counts.total() / images)
            result.parameters[name] = dict(counts)
            common = [
                f"{handler} {count / images:.3g}" for handler, count in counts.most_common() if count * 2 >= images
            ]
            result.notes.append(f"{name}: {', '.join(common) or 'less than one for two images'}.")
    result.notes.append(
        "Where neither stands, it is the same with extended attributes (`-o xattr`) as without (`-o noxattr`). "
        f"Each operation on {images} images of {_IMAGE_BYTES:,} bytes in one directory; what is done once for the "
        "directory is in the sum. FORGET, which takes no answer, is left out. New to the kernel: just mounted."
    )
    return result


def _for_attributes(made: Counter[str]) -> int:
    return sum(count for handler, count in made.items() if handler.endswith("xattr"))


def _counted(site: Site, images: int, options: str) -> "_Bench":
    bench = _Bench(site, images, options)
    bench.fill()
    bench.serve()
    bench.look()
    bench.change()
    return bench


class _Bench:
    """A store, and what was counted so far."""

    def __init__(self, site: Site, images: int, options: str) -> None:
        self.counted: dict[str, Counter[str]] = {}
        self.disturbed: set[str] = set()
        self._dropped = ""
        self._site = site
        self._images = images
        self._options = options
        self._source = site.fresh("source")
        self._names = make_tree(self._source, images, _IMAGE_BYTES)
        self._store = site.make_store(site.fresh("store"))
        self._counts = make_counts(site.fresh("counts"))

    @contextmanager
    def _mounted(self) -> Iterator[MountServer]:
        with self._site.mounted(self._store, "bench.counting", self._counts, self._options) as mounted:
            self._dropped = caches_dropped()
            yield mounted

    def _count(self, what: str, operation: Callable[[], object]) -> None:
        before = read_counts(self._counts)
        operation()
        made = self._settled() - before
        # It comes whenever the kernel has no better use for its memory.
        which = ", ".join(f"{name} {count / self._images:.2f}" for name, count in made.most_common())
        say(f"{self._options}: {what}: {made.total() / self._images:.2f} per image: {which}")
        self.counted[what] = made
        if caches_dropped() != self._dropped:
            self.disturbed.add(what)

    def _settled(self) -> Counter[str]:
        """Return the counts once they stand still: nobody waits for RELEASE."""
        counts = read_counts(self._counts)
        while True:
            time.sleep(_SETTLED_S)
            before, counts = counts, read_counts(self._counts)
            if counts == before:
                return counts

    def _run(self, what: str, *command: str | Path) -> None:
        if shutil.which(str(command[0])):
            self._count(what, lambda: run_command(*command))
        else:
            say(f"{what}: {command[0]} is not installed")

    def fill(self) -> None:
        """Count what brings images in."""
        with self._mounted() as mounted:
            for what, *command in (
                ("`cp -r` in", "cp", "-r"),
                ("`cp -a` in", "cp", "-a"),
                ("`rsync -a` in", "rsync", "-a"),
            ):
                # rsync takes what is in a directory with a slash behind it; to cp that is the same.
                self._run(what, *command, f"{self._source}/", mounted.point / f"from-{command[0]}{command[1]}")
            self._run("`cp -r` over the same names", "cp", "-rT", self._source, mounted.point / "from-cp-r")

    def serve(self) -> None:
        """Count what a web server does, the first time and again."""
        with self._mounted() as mounted:
            top = mounted.point / "from-cp-r"
            os.stat((top / self._names[0]).parent)
            self._count("GET of an image that is new to the kernel", lambda: self._serve(top))
            # A read makes the access time that the kernel knows invalid, though nobody keeps one: fstat asks once more.
            self._count("GET of an image that was read once", lambda: self._serve(top))
            self._count("GET of a known image", lambda: self._serve(top))
            absent = [top / name.replace("img", "none") for name in self._names]
            self._count("404, new to the kernel", lambda: [path.exists() for path in absent])
            self._count("404 again", lambda: [path.exists() for path in absent])

    def _serve(self, top: Path) -> None:
        """As nginx without open_file_cache: open, fstat, sendfile, close."""
        server, client = socket.socketpair()
        with server, client:
            for name in self._names:
                file = os.open(top / name, os.O_RDONLY | os.O_NONBLOCK)
                sent = os.sendfile(server.fileno(), file, 0, os.fstat(file).st_size)
                os.close(file)
                if sent != _IMAGE_BYTES:
                    raise Failed(f"{sent} bytes of {name} were served")
                left = sent
                while left:
                    left -= len(client.recv(left))

    def look(self) -> None:
        """Count what lists and compares."""
        with self._mounted() as mounted:
            self._run("`ls -lR`, new to the kernel", "ls", "-lR", mounted.point / "from-cp-r")
            self._run("`ls -lR` again", "ls", "-lR", mounted.point / "from-cp-r")
        with self._mounted() as mounted:
            self._run("`find`, new to the kernel", "find", mounted.point / "from-cp-r")
            for what in ("`rsync -a` again, new to the kernel", "`rsync -a` again"):
                self._run(what, "rsync", "-a", f"{self._source}/", mounted.point / "from-rsync-a")

    def change(self) -> None:
        """Count renaming and removing."""
        with self._mounted() as mounted:
            top = mounted.point / "from-cp-r"
            os.stat((top / self._names[0]).parent)
            self._count("upload: write a temporary file, rename it", lambda: self._upload(top))
            self._run("`rm -rf`", "rm", "-rf", top)

    def _upload(self, top: Path) -> None:
        data = bytes(_IMAGE_BYTES)
        for name in self._names:
            temporary = top / f"{name}.part"
            temporary.write_bytes(data)
            temporary.rename(top / name)
