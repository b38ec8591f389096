"""Random reads, writes, cuts and mappings of one image on a real mount agree with the same done to a bytearray."""

import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import Mounted

pytestmark = [pytest.mark.mount, pytest.mark.root]

# Around the sizes at which something changes: a page, what is copied on the loop, a MiB with a checksum of its own.
SIZES = [1, 100, 4096, 131_072, 300_000]
REACH = 1_300_000
STEPS = 150


class Image:
    """An open image and what must be in it."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path = path
        self.expected = bytearray()
        self._chance = chance
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)

    def write(self) -> None:
        data, offset = self._data(), self._chance.randrange(REACH)
        os.pwrite(self._file, data, offset)
        self._extend_to(offset)
        self.expected[offset : offset + len(data)] = data

    def append(self) -> None:
        data = self._data()
        with open(self.path, "ab", buffering=0) as file:
            file.write(data)
        self.expected += data

    def cut(self) -> None:
        size = self._chance.randrange(REACH)
        if self._chance.random() < 0.5:
            os.ftruncate(self._file, size)
        else:
            os.truncate(self.path, size)
        del self.expected[size:]
        self._extend_to(size)

    def write_mapped(self) -> None:
        if not self.expected:
            return
        data, start = self._data(), self._chance.randrange(len(self.expected))
        data = data[: len(self.expected) - start]
        with mmap.mmap(self._file, len(self.expected)) as mapping:
            mapping[start : start + len(data)] = data
        self.expected[start : start + len(data)] = data

    def read(self) -> None:
        size, offset = self._chance.choice(SIZES), self._chance.randrange(REACH)
        assert os.pread(self._file, size, offset) == self.expected[offset : offset + size]

    def read_by_name(self) -> None:
        assert self.path.read_bytes() == self.expected

    def reopen(self) -> None:
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR)

    def sync(self) -> None:
        os.fsync(self._file)

    def forget(self) -> None:
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def step(self) -> None:
        """Do one of these, and see whether the size is right."""
        steps: list[Callable[[], None]] = [self.write, self.append, self.cut, self.write_mapped]
        steps += [self.read, self.read_by_name, self.reopen, self.sync, self.forget]
        self._chance.choice(steps)()
        assert os.fstat(self._file).st_size == len(self.expected)

    def close(self) -> None:
        os.close(self._file)

    def _data(self) -> bytes:
        return self._chance.randbytes(self._chance.choice(SIZES))

    def _extend_to(self, size: int) -> None:
        self.expected += bytes(max(0, size - len(self.expected)))


def test_random_steps(mounted: Mounted) -> None:
    images = [Image(mounted.point / f"{seed}", random.Random(seed)) for seed in range(3)]
    for _ in range(STEPS):
        for image in images:
            image.step()
    for image in images:
        image.close()
        image.read_by_name()
    mounted.kill()
    mounted.start()
    for image in images:
        image.read_by_name()
