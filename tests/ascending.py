"""Writers of images with ascending numbers, by which a copy of a store that is written to shows whether it is a prefix.

Owns what a copy must hold: of each writer all images up to some number, whole, but those that were deleted before. Must
not know how the copy is made.

*Concurrency:* each writer is a thread.
"""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imgfs.settings import MIB
from imgfs.store import ROOT, Store

# Of each writer so many images are there at a time; it deletes older ones.
KEPT = 20
_IMAGE_BYTES = 30_000
_WRITERS = 3
_DEADLINE_S = 30


def image(writer: int, number: int) -> bytes:
    return random.Random(writer << 32 | number).randbytes(_IMAGE_BYTES + number % 7)


class Writer(threading.Thread):
    """Writes images with ascending numbers into a directory, and deletes those that are KEPT behind."""

    def __init__(self, directory: Path, number: int) -> None:
        super().__init__(daemon=True)
        self.directory = directory
        self.number = number
        self.closed = -1  # the last image that was closed
        self.begun = -1
        self.failure: BaseException | None = None
        self._ending = threading.Event()
        directory.mkdir()

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                self.begun += 1
                (self.directory / f"{self.begun}").write_bytes(image(self.number, self.begun))
                self.closed = self.begun
                if self.closed >= KEPT:
                    (self.directory / f"{self.closed - KEPT}").unlink()
        except BaseException as error:
            self.failure = error

    def end(self) -> None:
        self._ending.set()
        self.join(_DEADLINE_S)
        assert not self.is_alive()
        if self.failure is not None:
            raise self.failure


def newest_in(snapshot: Store, writer: Writer) -> int:
    """Return the number of the last image of *writer*; before it all must be there that had not been deleted."""
    directory = snapshot.lookup(ROOT, os.fsencode(writer.directory.name))
    numbers = sorted(int(entry.name) for entry in snapshot.list(directory))
    for number in numbers:
        inode = snapshot.lookup(directory, b"%d" % number)
        handle = snapshot.open_image(inode)
        assert bytes(snapshot.read(handle, 0, MIB)) == image(writer.number, number), f"{writer.directory} {number}"
        snapshot.release(handle)
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert len(numbers) in {min(numbers[-1] + 1, KEPT), min(numbers[-1] + 1, KEPT + 1)}
    return numbers[-1]


@contextmanager
def writing(directory: Path) -> Iterator[list[Writer]]:
    """Let writers write into directories of their own below *directory*, meanwhile."""
    writers = [Writer(directory / f"writer {number}", number) for number in range(_WRITERS)]
    for writer in writers:
        writer.start()
    try:
        yield writers
    finally:
        for writer in writers:
            writer.end()
