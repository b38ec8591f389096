"""Clients of a mount that check every answer they get: run as `mount_load.py ROLE DIRECTORY SEED`, until stdin ends.

Owns a directory each, and a model of what must be in it: each change must succeed exactly once, so a change that is
lost, done twice or answered wrongly shows at once or in the last comparison. Prints one JSON object, and exits with
1 at the first surprise. Must not know how the mount is served.
"""

import errno
import json
import os
import random
import select
import stat
import struct
import sys
import time
from pathlib import Path

# length of the data, seed; the bytes behind it follow from both
_HEAD = struct.Struct("<QQ")
_SIZES = [0, 1, 100, 4096, 20_000, 20_000, 20_000, 70_000, 300_000, 1_200_000]
_IMAGES_MAX = 40
_READ_BYTES = 1 << 20


def image(seed: int, size: int) -> bytes:
    """Return the image of that seed; any part of it tells where it belongs."""
    return _HEAD.pack(size, seed) + random.Random(seed).randbytes(size)


def compare(data: bytes, wanted: bytes, where: str) -> None:
    """Fail, and say where, unless *data* is what was *wanted*."""
    if data != wanted:
        first = next((at for at, (a, b) in enumerate(zip(data, wanted, strict=False)) if a != b), "the end")
        raise AssertionError(f"{where}: {len(data)} bytes instead of {len(wanted)}, wrong from {first} on")


def check_image(data: bytes, where: str) -> None:
    """Fail unless *data* is one whole image."""
    assert len(data) >= _HEAD.size, f"{where}: {len(data)} bytes"
    size, seed = _HEAD.unpack_from(data)
    compare(data, image(seed, size), where)


class Client:
    """Counts what it does, and how long the longest call took."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.chance = random.Random(seed)
        self.done = 0
        self.longest_s = 0.0

    def step(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Compare what is there with what must be."""

    def read_whole(self, path: Path) -> bytes:
        file = os.open(path, os.O_RDONLY)
        try:
            pieces = []
            while piece := os.read(file, _READ_BYTES):
                pieces.append(piece)
            return b"".join(pieces)
        finally:
            os.close(file)


class Reader(Client):
    """Reads images that nobody changes, lists them, and checks every byte."""

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(directory, seed)
        self._names = sorted(os.listdir(directory))
        self._open = os.open(directory / self._names[0], os.O_RDONLY)

    def step(self) -> None:
        name = self.chance.choice(self._names)
        check_image(self.read_whole(self.directory / name), name)
        if self.chance.random() < 0.02:
            assert sorted(os.listdir(self.directory)) == self._names
        if self.chance.random() < 0.1:
            check_image(os.pread(self._open, 1 << 21, 0), "the one that stays open")
        if self.chance.random() < 0.1:
            try:
                os.stat(self.directory / f"missing{self.chance.random()}")
            except FileNotFoundError:
                pass
            else:
                raise AssertionError("what is not there was found")


class Changer(Client):
    """Creates, overwrites, appends, renames, links, removes; a model says what each must do."""

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(directory, seed)
        self._files: dict[str, bytes] = {}
        self._directories: set[str] = set()
        self._links: dict[str, str] = {}
        self._number = 0
        self._writing: dict[str, int] = {}

    def _new_name(self) -> str:
        self._number += 1
        parent = self.chance.choice(["", *(f"{name}/" for name in sorted(self._directories))])
        return f"{parent}{self._number}"

    def _image(self) -> bytes:
        return image(self.chance.getrandbits(60), self.chance.choice(_SIZES))

    def _write(self, file: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view[: self.chance.choice([4096, 65536, 1 << 20])]) :]

    def step(self) -> None:
        kinds = [self._create, self._create, self._make_directory, self._symlink, self._append, self._keep_open]
        if self._files:
            kinds += [
                self._overwrite,
                self._rename,
                self._rename,
                self._replace,
                self._unlink,
                self._look,
                self._attributes,
            ]
        if len(self._files) > _IMAGES_MAX:
            kinds += [self._unlink] * 6
        if self._directories:
            kinds.append(self._remove_directory)
        if self._links:
            kinds.append(self._unlink_link)
        self.chance.choice(kinds)()

    def _create(self) -> None:
        name, data = self._new_name(), self._image()
        file = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._write(file, data)
        if self.chance.random() < 0.1:
            os.fsync(file)
        os.close(file)
        self._files[name] = data

    def _overwrite(self) -> None:
        if (name := self._not_writing()) is not None:
            data = self._image()
            file = os.open(self.directory / name, os.O_WRONLY | os.O_TRUNC)
            self._write(file, data)
            os.close(file)
            self._files[name] = data

    def _append(self) -> None:
        """Write through one handle in many small steps: a write done twice would make it longer."""
        name = self._new_name()
        data = self._image()
        file = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        for start in range(0, len(data), 9973):
            piece = data[start : start + 9973]
            assert os.write(file, piece) == len(piece)
        assert os.fstat(file).st_size == len(data)
        os.close(file)
        self._files[name] = data

    def _keep_open(self) -> None:
        """Leave an image open for a while: begun by one worker, finished by another."""
        if len(self._writing) < 3:
            name = self._new_name()
            self._writing[name] = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._files[name] = b""
            return
        name = self.chance.choice(sorted(self._writing))
        file = self._writing.pop(name)
        data = self._image()
        self._write(file, data)
        os.lseek(file, 0, os.SEEK_SET)
        compare(b"".join(iter(lambda: os.read(file, _READ_BYTES), b"")), data, f"{name}, open")
        os.close(file)
        if name in self._files:
            self._files[name] = data

    def _make_directory(self) -> None:
        if len(self._directories) < 8:
            self._number += 1
            name = f"d{self._number}"
            os.mkdir(self.directory / name)
            self._directories.add(name)

    def _remove_directory(self) -> None:
        name = self.chance.choice(sorted(self._directories))
        inside = [other for other in [*self._files, *self._links] if other.startswith(f"{name}/")]
        if inside:
            refused = False
            try:
                os.rmdir(self.directory / name)
            except OSError as error:
                refused = error.errno == errno.ENOTEMPTY
            assert refused, f"{name} was not refused for what is in it"
        else:
            os.rmdir(self.directory / name)
            self._directories.remove(name)

    def _symlink(self) -> None:
        if len(self._links) < 20:
            name = self._new_name()
            os.symlink(f"target of {name}", self.directory / name)
            self._links[name] = f"target of {name}"

    def _unlink_link(self) -> None:
        name = self.chance.choice(sorted(self._links))
        assert os.readlink(self.directory / name) == self._links.pop(name)
        os.unlink(self.directory / name)

    def _not_writing(self) -> str | None:
        names = sorted(self._files.keys() - self._writing.keys())
        return self.chance.choice(names) if names else None

    def _rename(self) -> None:
        if (old := self._not_writing()) is not None:
            new = self._new_name()
            os.rename(self.directory / old, self.directory / new)
            self._files[new] = self._files.pop(old)

    def _replace(self) -> None:
        old, new = self._not_writing(), self._not_writing()
        if old is not None and new is not None and old != new:
            os.rename(self.directory / old, self.directory / new)
            self._files[new] = self._files.pop(old)

    def _unlink(self) -> None:
        if (name := self._not_writing()) is not None:
            os.unlink(self.directory / name)
            del self._files[name]

    def _look(self) -> None:
        if (name := self._not_writing()) is not None:
            compare(self.read_whole(self.directory / name), self._files[name], name)

    def _attributes(self) -> None:
        if (name := self._not_writing()) is not None:
            path, mtime_ns = self.directory / name, self.chance.getrandbits(60)
            os.chmod(path, 0o640)
            os.utime(path, ns=(0, mtime_ns))
            seen = os.stat(path)
            assert (stat.S_IMODE(seen.st_mode), seen.st_mtime_ns) == (0o640, mtime_ns), seen

    def finish(self) -> None:
        for file in self._writing.values():
            os.close(file)
        found = {}
        for place, directories, files in os.walk(self.directory):
            for name in [*directories, *files]:
                path = Path(place) / name
                found[str(path.relative_to(self.directory))] = path
        wanted = {*self._files, *self._directories, *self._links}
        assert set(found) == wanted, f"lost: {wanted - set(found)}, too much: {set(found) - wanted}"
        for name, data in self._files.items():
            compare(self.read_whole(found[name]), data, f"{name}, at the end")


class Renamer(Client):
    """Passes one image on from name to name."""

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(directory, seed)
        self._data = image(seed, 5000)
        (directory / "0").write_bytes(self._data)
        self._at = 0

    def step(self) -> None:
        os.rename(self.directory / f"{self._at}", self.directory / f"{self._at + 1}")
        self._at += 1
        if self._at % 10 == 0:
            assert os.listdir(self.directory) == [f"{self._at}"]

    def finish(self) -> None:
        assert os.listdir(self.directory) == [f"{self._at}"]
        assert (self.directory / f"{self._at}").read_bytes() == self._data


ROLES = {"reader": Reader, "changer": Changer, "renamer": Renamer}


def main() -> int:
    role, directory, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    client = ROLES[role](directory, seed)
    code, surprise = 0, ""
    try:
        while not select.select([sys.stdin], [], [], 0)[0]:
            start = time.monotonic()
            client.step()
            client.longest_s = max(client.longest_s, time.monotonic() - start)
            client.done += 1
        client.finish()
    except (OSError, AssertionError) as error:
        code, surprise = 1, f"{type(error).__name__}: {error}"[:2000]
        import traceback

        surprise += " at " + "; ".join(
            f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
        )
    print(json.dumps({"role": role, "done": client.done, "longest_s": client.longest_s, "surprise": surprise}))
    return code


if __name__ == "__main__":
    sys.exit(main())
