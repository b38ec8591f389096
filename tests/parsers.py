"""Inputs for each parser by itself: what it is given, and what it may make of it.

Owns an entry for every place that reads bytes from outside without a store around it; the rest goes through whole
stores (fuzzing.py). docs/crash.md lists both. Must not know who counts the cases.

*Concurrency:* none; an input is made from one `Random`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

from powercut import SimulatedDisk

from imgfs.errors import Damaged, ImgfsError, MountFailed, NewerFormat
from imgfs.format import (
    NEEDLES_START,
    IndexState,
    Kind,
    Needle,
    PreviousEnd,
    Tag,
    VolumeHeader,
    checksums,
    footer_bytes,
    pack_footer,
    pack_needle_header,
    pack_volume_header,
    pack_xattrs,
    unpack_extras,
    unpack_footer,
    unpack_needle_header,
    unpack_volume_header,
    unpack_xattrs,
)
from imgfs.handover import Handover
from imgfs.index import Names, pack_name
from imgfs.mountpoint import mounts
from imgfs.opening import LOCK, owner
from imgfs.options import WORKERS_MAX, BadOption, MountOptions, parse
from imgfs.superblock import Superblock, pack_superblock, unpack_superblock
from imgfs.view import check_name
from imgfs.volumes import volume_id_of

_CHARACTERS = b" ,=-_/\\.:\"'{}[]0123456789eE+xX\n\t\0\x7f\x80\xff"


def mangled(data: bytes, random: Random) -> bytes:
    """Return *data* with some bytes changed, dropped, repeated or put in."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(changed) + 1)
        match random.randrange(6):
            case 0 | 1 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 2:
                changed[at:at] = bytes([random.choice(_CHARACTERS)])
            case 3:
                del changed[at : at + random.choice((1, 2, 8, 100))]
            case 4:
                changed[at:at] = changed[at : at + random.choice((1, 4, 30))]
            case 5:
                changed[at : at + 4] = random.choice((bytes(4), b"\xff" * 4, b"\1\0\0\0", random.randbytes(4)))
    return bytes(changed)


_STATE = IndexState(9000, 3, 1, 20, 2)
_HEADER = VolumeHeader(bytes(range(16)), bytes(16), 7, 100, -1, 1 << 20, PreviousEnd(6, 8, _STATE))
_PACKED_HEADER = pack_volume_header(_HEADER)


def _volume_header(random: Random) -> None:
    start = random.choice((0, 0, 4096))
    copy = mangled(_PACKED_HEADER[start : start + 200], random)
    data = (_PACKED_HEADER[:start] + copy + bytes(4096))[:NEEDLES_START]
    if random.random() < 0.5:  # the other copy is lost, too
        data = bytes(start) + copy
    try:
        assert unpack_volume_header(data) == _HEADER
    except (Damaged, NewerFormat):
        pass


def _needle_header(random: Random) -> None:
    extras: dict[int, bytes] = {Tag.TARGET: random.randbytes(8)} if random.random() < 0.5 else {}
    needle = Needle(Kind.FILE, 5, 1, b"name", random.choice((0, 9)), 0o644, sequence=9, extras=extras)
    packed = pack_needle_header(needle, 77, 8192)
    read = unpack_needle_header(mangled(packed, random), 77, 8192)
    assert read is None or read == needle


def _footer(random: Random) -> None:
    size = random.choice((1, 100, (1 << 20) + 1, 3 << 20))
    sums = checksums(b"x" * 100)._replace(chunks=tuple(range((footer_bytes(size) - 8) // 4)))
    read = unpack_footer(mangled(pack_footer(sums, size, 99), random), size, 99)
    assert read is None or read == sums


def _extras(random: Random) -> None:
    data = mangled(b"\1\0\x08\0" + bytes(8) + b"\0\0\0\0\2\0\3\0abc\0", random)
    assert sum(map(len, unpack_extras(data).values())) <= len(data)


def _attributes(random: Random) -> None:
    data = mangled(pack_xattrs({b"user.a": b"1", b"user.b": b"", b"trusted.c": bytes(300)}), random)
    try:
        assert sum(len(name) + len(value) for name, value in unpack_xattrs(data).items()) <= len(data)
    except Damaged:
        pass


_SUPERBLOCK = Superblock(bytes(range(16)), 1 << 30)


def _superblock(random: Random) -> None:
    try:
        assert unpack_superblock(mangled(pack_superblock(_SUPERBLOCK), random)) == _SUPERBLOCK
    except (Damaged, NewerFormat):
        pass


_WORDS = "ro rw timeout sync_interval read_ahead workers grace log publish xattr noexec user x-a  a"
_VALUES = "0 1 8 9 -1 1e9 1e10 1e400 nan inf 0x1 close create 1_0 5.5 / \u0663 \u00b2 , " + "9" * 5000


def _options(random: Random) -> None:
    words, values = _WORDS.split(" "), _VALUES.split(" ")
    items = [random.choice(words) + random.choice(("", "=", "=" + random.choice(values))) for _ in range(3)]
    try:
        options = parse([",".join(items)])
    except BadOption:
        return
    assert options.workers is None or 1 <= options.workers <= WORKERS_MAX
    assert 0 <= options.grace_s <= 1e9
    assert options.read_ahead_kib <= 1e9


@contextmanager
def _file(content: bytes) -> Iterator[int]:
    """Give the descriptor of a file that holds *content*."""
    descriptor = os.memfd_create("parsers", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield descriptor
    finally:
        os.close(descriptor)


_MOUNTS = (
    b"36 35 98:0 / /mnt\\040two rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
    b"41 36 0:45 / /run/mnt\\134x ro - fuse.imgfs /srv/\\011store ro,user_id=0\n"
)


def _mount_table(random: Random) -> None:
    with _file(mangled(_MOUNTS, random)) as descriptor:
        for mount in mounts(f"/proc/self/fd/{descriptor}"):
            assert isinstance(mount.point, str)


def _handover(random: Random) -> None:
    state = Handover("/s", "/m", MountOptions(), False, 3, 4, None, 5, 6, {8: 1}, 9, b"init", "0:1")
    written = state.write()
    try:
        content = mangled(os.pread(written, 1 << 16, 0), random)
    finally:
        os.close(written)
    with _file(content) as descriptor:
        try:
            Handover.read(descriptor)
        except MountFailed:
            pass


def _names(random: Random) -> None:
    content = mangled(bytes(16) + pack_name(b"a") + pack_name(b"n" * 255) + pack_name(b"\xff.jpg"), random)
    disk = SimulatedDisk()
    disk.set_content("/names", content)
    for names in (Names(disk, disk.open("/names")), Names(disk, None, 0, content)):
        try:
            check_name(names.get(random.randrange(1, len(content) + 20)))
        except Damaged:
            pass


def _lock(random: Random) -> None:
    disk = SimulatedDisk()
    disk.lock(f"/{LOCK}")
    disk.set_content(f"/{LOCK}", mangled(b"1234\n", random))
    pid = owner("", disk)
    assert pid is not None
    assert pid >= 0


def _volume_name(random: Random) -> None:
    name = mangled(b"00000012.vol", random).decode("utf-8", "surrogateescape")
    assert 0 <= volume_id_of(name + random.choice(("", "\u00b2", "\u0663"))) < 1 << 63


PARSERS: tuple[Callable[[Random], None], ...] = (
    _volume_header,
    _needle_header,
    _footer,
    _extras,
    _attributes,
    _superblock,
    _options,
    _mount_table,
    _handover,
    _names,
    _lock,
    _volume_name,
)


def fuzz_parsers(random: Random) -> None:
    """Give one input to some of the parsers.

    Raises:
        AssertionError, or anything that no parser may raise.
    """
    for parser in random.sample(PARSERS, 3):
        try:
            parser(random)
        except ImgfsError as error:
            raise AssertionError(f"{parser.__name__}: {type(error).__name__} is not for this") from error
