"""What the crash and damage tests let a store do: every operation by hand, and as many at random as wanted.

Must not know what may be left of it after a crash.

*Concurrency:* none.
"""

import stat
from random import Random

from crash_model import Thing, Workload, photo

from imgfs.format import Kind


def small_images(work: Workload) -> None:
    """Every operation, over three volumes; synced now and then, once in the middle of a volume."""
    long_name = b"n" * 255
    work.mkdir(b"/a")
    work.mkdir(b"/a/deep", 0o700)
    work.create(b"/a/one", photo(3000, 1))
    work.create(b"/two", photo(517, 2), 0o640)
    work.create(b"/empty", b"")
    work.sync()
    work.overwrite(b"/a/one", photo(7000, 3))
    work.symlink(b"/link", b"a/one")
    work.create(b"/a/\xff\xfe \n", photo(100, 4))
    work.rename(b"/two", b"/a/one")  # over another, in another directory
    work.set_attr(b"/a/one", mode=0o400, mtime_ns=123_456_789_012)
    work.fsync(b"/a/one")
    work.unlink(b"/empty")
    work.create(b"/empty", photo(1, 5))  # the same name again
    work.put(b"/" + long_name, photo(9000, 6))
    work.append(b"/" + long_name, photo(900, 7))
    work.put(b"/" + long_name, photo(20_000, 8))  # over an image, same inode
    work.rename(b"/a/deep", b"/deep")
    work.create(b"/deep/x", photo(12_000, 9))
    work.truncate(b"/deep/x", 5000)
    work.set_attr(b"/deep", mode=0o1777, uid=7, mtime_ns=-1)
    work.create(b"/deep/.tmp", photo(2000, 10))
    work.rename(b"/deep/.tmp", b"/deep/x")  # as an editor saves
    work.sync()
    work.mkdir(b"/gone")
    work.create(b"/gone/y", photo(300, 11))
    work.unlink(b"/gone/y")
    work.rmdir(b"/gone")
    work.unlink(b"/link")
    work.symlink(b"/link", b"")
    work.create(b"/deep/reuse", photo(800, 12))  # a slot of the deleted, of another generation
    work.rename(b"/deep", b"/a/deep")
    work.overwrite(b"/a/deep/x", photo(15_000, 13))
    work.create(b"/a/deep/.tmp", photo(14_000, 14))
    work.rename(b"/a/deep/.tmp", b"/a/deep/reuse")
    work.put(b"/last", photo(18_000, 15))
    work.sync()
    work.mkdir(b"/e")
    work.mkdir(b"/f")
    work.rename(b"/e", b"/f")  # a directory over an empty one
    work.create(b"/f/one", photo(10, 16))
    work.rename(b"/a/one", b"/f/one")
    work.truncate(b"/last", 0)
    work.set_attr(b"/f/one", mtime_ns=5)
    work.rename(b"/f/one", b"/f/two")
    work.unlink(b"/a/\xff\xfe \n")


def restarts(work: Workload) -> None:
    """Clean stops and starts, with changes that come first, last, and not at all in between."""
    work.mkdir(b"/a")
    work.create(b"/a/one", photo(3000, 1), attributes=((b"user.a", b"b"),))
    work.link(b"/a/one", b"/two")
    work.restart()
    work.restart()
    work.unlink(b"/a/one")
    work.restart()
    work.put(b"/large", photo(40_000, 2))
    work.put(b"/larger", photo(40_000, 3))  # in a volume of its own
    work.restart()
    work.create(b"/a/three", photo(500, 4))
    work.sync()
    work.rename(b"/large", b"/a/one")
    work.restart()
    work.set_attr(b"/two", mtime_ns=5)


def large_images(work: Workload) -> None:
    """Images above 1 MiB, which are written in pieces and alone may be larger than a volume."""
    mib = 1 << 20
    work.create(b"/large", photo(mib + 1, 20))
    work.put(b"/piece", photo(30_000, 21))
    work.sync()
    work.put(b"/huge", photo(mib + mib // 2, 22))
    work.rename(b"/huge", b"/large")


def many_at_once(work: Workload) -> None:
    """Many new images in one append: in several directories, over two volumes, with an owner that is new there."""
    work.mkdir(b"/a")
    work.mkdir(b"/b", 0o700)
    work.put_new({b"/a/%d" % number: photo(700 * number, number) for number in range(7)})
    work.sync()
    first = {b"/b/%d" % number: photo(900, number) for number in range(5)}
    work.put_new(first | {b"/a/x%d" % number: photo(2000, 10 + number) for number in range(5)}, 0o640)
    work.rename(b"/b/3", b"/a/3")
    work.put_new({b"/%d" % number: photo(3000, 20 + number) for number in range(14)})
    work.sync()
    work.put_new({b"/b/3": photo(100, 40), b"/b/5": photo(100, 41), b"/b/6": photo(0, 42)}, 0o600)


def names_and_attributes(work: Workload) -> None:
    """Every operation on further names, swapped names, special files and extended attributes, over two volumes."""
    work.mkdir(b"/d")
    work.create(b"/a", photo(3000, 1))
    work.link(b"/a", b"/d/a2")
    work.create(b"/attributed", photo(2000, 2), attributes=((b"user.one", b"1"), (b"trusted.two", photo(600, 3))))
    work.link(b"/attributed", b"/d/also")
    work.sync()
    work.overwrite(b"/d/a2", photo(4000, 4))
    work.set_xattr(b"/d/a2", b"user.x", b"x" * 300)
    work.unlink(b"/a")  # the own name first: only a link is left
    work.set_attr(b"/d/a2", mode=0o600)
    work.append(b"/d/a2", photo(1000, 5))  # put without a name of its own
    work.link(b"/d/a2", b"/a3")
    work.rename(b"/a3", b"/d/a3")
    work.unlink(b"/d/a2")
    work.sync()
    work.unlink(b"/d/a3")  # the last name, a link
    work.special(b"/pipe", stat.S_IFIFO | 0o640)
    work.special(b"/d/disk", stat.S_IFBLK | 0o600, 0x0123_4567)
    work.link(b"/d/disk", b"/disk2")
    work.create(b"/one", photo(5000, 6))
    work.mkdir(b"/e", 0o700)
    work.create(b"/e/two", photo(9000, 7))
    work.exchange(b"/one", b"/e/two")
    work.exchange(b"/d", b"/e")  # two directories
    work.exchange(b"/e/also", b"/d")  # a link and a directory
    work.sync()
    work.link(b"/one", b"/one2")
    work.rename(b"/attributed", b"/one2")  # over a link: what it named has a name left
    work.link(b"/one2", b"/one3")
    work.rename(b"/one3", b"/one")  # a link over an own name, and the last
    work.set_xattr(b"/pipe", b"trusted.p", b"")
    work.set_xattr(b"", b"user.root", b"of the root")
    work.remove_xattr(b"/one", b"user.one")
    work.remove_xattr(b"/one", b"trusted.two")
    work.symlink(b"/s", b"pipe")
    work.link(b"/s", b"/s2")
    work.unlink(b"/s")
    work.rename(b"/s2", b"/pipe")  # a link that is the only name, over a special file
    work.create(b"/r", photo(100, 8), attributes=((b"user.r", b"r"),))
    work.link(b"/r", b"/r2")
    work.link(b"/r", b"/r3")
    work.unlink(b"/r2")
    work.unlink(b"/r3")  # the links first
    work.unlink(b"/r")
    work.put(b"/r", photo(13_000, 9))  # slots used again
    work.link(b"/r", b"/r2")
    work.sync()
    work.put(b"/r2", photo(16_000, 10))  # over a link: both names have it
    work.put(b"/filler", photo(20_000, 11))  # into another volume
    work.truncate(b"/r2", 50)
    work.exchange(b"/r", b"/filler")
    work.set_xattr(b"/filler", b"user.r", b"again")
    work.overwrite(b"/r2", b"in another volume than its names")
    work.rename(b"/filler", b"/r")  # an own name over another's, which no link has
    work.unlink(b"/r")
    work.unlink(b"/r2")
    work.create(b"/last", b"", attributes=((b"user.empty", b""),))


_NAMES = (b"a", b"b", b"c", b"d", b"e")
_ATTRIBUTES = (b"user.a", b"user.b", b"trusted.c")
_SIZES = (0, 1, 90, 700, 700, 4000)
# How often each is chosen, of 100.
_WEIGHTS = {
    "create": 11,
    "create_attributed": 5,
    "rewrite": 8,
    "put": 5,
    "mkdir": 8,
    "symlink": 3,
    "special": 4,
    "link": 14,
    "unlink": 10,
    "rmdir": 4,
    "rename": 10,
    "exchange": 7,
    "set_attr": 3,
    "set_xattr": 7,
    "remove_xattr": 3,
    "sync": 6,
}


def random_operations(work: Workload, random: Random, count: int) -> None:
    """Do *count* things that can be done."""
    chooser = _Chooser(work, random)
    done = 0
    while done < count:
        (what,) = random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        done += getattr(chooser, what)()


class _Chooser:
    """Does one thing with names chosen at random; each method returns whether it found one that can be done."""

    def __init__(self, work: Workload, random: Random) -> None:
        self._work = work
        self._random = random

    def _some(self, *kinds: Kind) -> bytes | None:
        """Return the path of something that has one of *kinds*, any but the root."""
        paths = [path for path, thing in sorted(self._work.model.items(), key=_path) if path and thing.kind in kinds]
        return self._random.choice(paths) if paths else None

    def _image(self) -> bytes | None:
        return self._some(Kind.FILE, Kind.SYMLINK, Kind.SPECIAL)

    def _place(self) -> bytes:
        directories = [path for path, thing in self._work.model.items() if thing.kind == Kind.DIRECTORY]
        return self._random.choice(sorted(directories)) + b"/" + self._random.choice(_NAMES)

    def _free(self) -> bytes | None:
        place = self._place()
        return None if place in self._work.model else place

    def _data(self) -> bytes:
        return photo(self._random.choice(_SIZES), self._random.getrandbits(32))

    def _attribute(self) -> tuple[bytes, bytes]:
        return self._random.choice(_ATTRIBUTES), self._data()

    def create(self) -> bool:
        path = self._free()
        if path:
            self._work.create(path, self._data())
        return bool(path)

    def create_attributed(self) -> bool:
        path = self._free()
        if path:
            self._work.create(path, self._data(), attributes=tuple(sorted((self._attribute(), self._attribute())))[:1])
        return bool(path)

    def rewrite(self) -> bool:
        path = self._some(Kind.FILE)
        if path and self._random.random() < 0.6:
            self._work.overwrite(path, self._data())
        elif path and self._random.random() < 0.5:
            self._work.append(path, self._data() + b"more")
        elif path:
            self._work.truncate(path, self._random.choice(_SIZES))
        return bool(path)

    def put(self) -> bool:
        path = self._place() if self._random.random() < 0.5 else self._image()
        thing = self._work.model.get(path) if path else None
        if path and (thing is None or thing.kind != Kind.DIRECTORY):
            self._work.put(path, self._data())
            return True
        return False

    def mkdir(self) -> bool:
        path = self._free()
        if path:
            self._work.mkdir(path)
        return bool(path)

    def symlink(self) -> bool:
        path = self._free()
        if path:
            self._work.symlink(path, self._data())
        return bool(path)

    def special(self) -> bool:
        path = self._free()
        if path:
            kind = self._random.choice((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR))
            device = self._random.getrandbits(32) if kind == stat.S_IFCHR else 0
            self._work.special(path, kind | 0o600, device)
        return bool(path)

    def link(self) -> bool:
        path, new = self._image(), self._free()
        if path and new:
            self._work.link(path, new)
        return bool(path and new)

    def unlink(self) -> bool:
        path = self._image()
        if path:
            self._work.unlink(path)
        return bool(path)

    def rmdir(self) -> bool:
        path = self._some(Kind.DIRECTORY)
        if path and not self._is_full(path):
            self._work.rmdir(path)
            return True
        return False

    def _is_full(self, directory: bytes) -> bool:
        return any(path.startswith(directory + b"/") for path in self._work.model)

    def rename(self) -> bool:
        path, new = self._some(*Kind), self._place()
        if path is None or new.startswith(path + b"/"):
            return False
        thing, target = self._work.model[path], self._work.model.get(new)
        if target is not None and target is not thing:
            if (thing.kind == Kind.DIRECTORY) != (target.kind == Kind.DIRECTORY):
                return False
            if target.kind == Kind.DIRECTORY and self._is_full(new):
                return False
        self._work.rename(path, new)
        return True

    def exchange(self) -> bool:
        path, other = self._some(*Kind), self._some(*Kind)
        if path is None or other is None or self._work.model[path] is self._work.model[other]:
            return False
        if other.startswith(path + b"/") or path.startswith(other + b"/"):
            return False
        self._work.exchange(path, other)
        return True

    def set_attr(self) -> bool:
        path = self._some(*Kind) or b""
        self._work.set_attr(
            path, mode=self._random.choice((0o600, 0o644, 0o755)), mtime_ns=self._random.getrandbits(50)
        )
        return True

    def set_xattr(self) -> bool:
        path = self._some(*Kind) or b""
        self._work.set_xattr(path, *self._attribute())
        return True

    def remove_xattr(self) -> bool:
        things = [(path, thing) for path, thing in sorted(self._work.model.items(), key=_path) if thing.attributes]
        if things:
            path, thing = self._random.choice(things)
            self._work.remove_xattr(path, self._random.choice(sorted(thing.attributes)))
        return bool(things)

    def sync(self) -> bool:
        self._work.sync()
        return True


def _path(row: tuple[bytes, Thing]) -> bytes:
    return row[0]
