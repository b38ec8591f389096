"""A store of which some files are changed: which bytes were touched, and what may be read back.

Owns the seed that a case is made from, and how a part of it is chosen by chance. Must not know which mutators there
are, nor how recovery works.

*Concurrency:* none; a case is made from one `Random`, so that its number makes it again.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from damage_model import At
from snapshots import Attributes, Snapshot

from imgfs.errors import ImgfsError
from imgfs.format import Kind, Needle, VolumeHeader, unpack_xattrs

STORE = "/store"
VOLUMES = f"{STORE}/volumes"
SUPERBLOCK = f"{STORE}/imgfs.json"


@dataclass
class Seed:
    """A store that is whole, and what may be read from it."""

    name: str
    files: dict[str, bytes]
    needles: list[At]
    headers: dict[str, VolumeHeader]
    wanted: Snapshot
    images: dict[int, frozenset[bytes]]
    """By inode: what was ever written to it as a whole image or link."""
    attributes: dict[int, frozenset[Attributes]]
    names: dict[int, frozenset[bytes]]

    def data(self, at: At) -> bytes:
        part = at.parts()["data"]
        return self.files[at.path][part.start : part.stop]


@dataclass
class Case:
    """The files of a store, some of them changed.

    Attributes:
        touched: (path, start, end) of volumes whose bytes were changed; a needle that is none of them must be served.
        lying: bytes were written whose checksums are right, so that more than what was touched may be lost.
        log: what was done, for people.
    """

    seed: Seed
    files: dict[str, bytearray]
    images: dict[int, set[bytes]] = field(default_factory=dict)
    attributes: dict[int, set[Attributes]] = field(default_factory=dict)
    touched: list[tuple[str, int, int]] = field(default_factory=list)
    lying: bool = False
    rearranged: bool = False
    """Files of the volumes came, went, or changed their length before the end: only general rules hold."""
    log: list[str] = field(default_factory=list)

    def touch(self, path: str, start: int, end: int) -> None:
        if path.endswith(".vol"):
            self.touched.append((path, start, end))

    def lie(self, needle: Needle, data: bytes) -> None:
        """Note that *needle* with *data* was written, with right checksums."""
        self.lying = True
        if needle.kind in (Kind.FILE, Kind.SYMLINK, Kind.SPECIAL):
            self.images.setdefault(needle.inode, set()).add(data)
        if needle.kind == Kind.XATTR:
            try:
                told = tuple(sorted(unpack_xattrs(data).items()))
            except (ImgfsError, struct.error):
                return
            self.attributes.setdefault(needle.inode, set()).add(told)

    def spoils(self, path: str, start: int, end: int) -> bool:
        """Return whether any of these bytes was touched."""
        return any(where == path and first < end and start < last for where, first, last in self.touched)

    @property
    def harmless(self) -> bool:
        """Whether the volumes say what they said, so that nothing may be lost."""
        return not (self.touched or self.lying or self.rearranged)


Mutator = Callable[[Case, Random], None]

_NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 1 << 15, 0xFFFF, 1 << 24, 1 << 28, (1 << 28) + 1, (1 << 31) - 1, 1 << 31)
_NUMBERS += ((1 << 32) - 1, 1 << 32, (1 << 32) | 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8)
NAMES = (b"", b".", b"..", b"/", b"a/b", b"\0", b"a\0b", b"n" * 255, b"n" * 256, b"\xff\xfe", b"lost+found-1", b"a")


def number(random: Random, bits: int) -> int:
    """Return a number of so many bits at which parsers break."""
    if random.random() < 0.3:
        return random.getrandbits(bits)
    return (random.choice(_NUMBERS) + random.choice((0, 0, 0, 1, -1))) & ((1 << bits) - 1)


def any_file(case: Case, random: Random, suffix: str = "") -> str:
    """Return the path of a file that ends in *suffix*, "" if there is none."""
    paths = [path for path in sorted(case.files) if path.endswith(suffix)]
    return random.choice(paths) if paths else ""


def current(needles: list[At]) -> dict[int, At]:
    """Return by inode where its bytes lie, for what has any; a copy of a needle has the same number."""
    found = sorted(needles, key=lambda at: at.needle.sequence)
    return {at.needle.inode: at for at in found if at.needle.kind in (Kind.FILE, Kind.SYMLINK)}


def any_needle(case: Case, random: Random) -> At | None:
    """Return a needle whose bytes are still there, None if there is none."""
    found = [at for at in case.seed.needles if at.path in case.files and len(case.files[at.path]) >= at.end]
    if random.random() < 0.5:  # what is still needed
        found = list(current(found).values()) or found
    return random.choice(found) if found else None
