"""The bytes of the FUSE protocol that pyfuse3 hides: request headers, INIT, RESEND, and the answer of an error.

Owns their structs (include/uapi/linux/fuse.h), and what identifies a request: its raw bytes and the arguments of its
handler give the same `Request`. Must not know who reads or writes a device, nor what a request does.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from imgfs.requests import Request

# length, opcode, unique, node, uid, gid, thread id, length of extensions, padding
IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
assert (IN_HEADER.size, OUT_HEADER.size) == (40, 16)

# IN_HEADER, unpacked.
Head = tuple[int, int, int, int, int, int, int, int, int]

# The kernel refuses to hand a request to a smaller buffer.
READ_BYTES_MIN = 8192
# What a request carries beside the data of a write.
READ_BYTES_EXTRA = 4096
# What identifies a request, two paths at most, lies within so many bytes.
_PARSED_BYTES_MAX = 2 * READ_BYTES_MIN
# More requests do not help whoever reads a line of the log.
_NAMED_MAX = 20

# Bit 63 of a request's number: it was handed out before, and was not answered (Linux 6.9).
RESENT = 1 << 63
_NOTIFY_RESEND = 7
RESEND = OUT_HEADER.pack(OUT_HEADER.size, _NOTIFY_RESEND, 0)

_NOTIFY_INVAL_INODE = 2
_NOTIFY_INVAL_ENTRY = 3
_NOTIFY_STORE = 4
_INVAL_INODE = struct.Struct("<Qqq")  # inode, offset, length: 0 for all
_INVAL_ENTRY = struct.Struct("<QII")  # parent, length of the name, flags
_STORE = struct.Struct("<IiQ" + "QQII")  # behind the header: inode, offset, size, padding

_INIT_IN = struct.Struct("<IIIII")  # major, minor, max_readahead, flags, flags2
_INIT_EXT = 1 << 30
_HAS_RESEND_2 = 1 << 39 - 32
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write
_INIT_OUT = struct.Struct("<IIIIHHI")


class Opcode:
    """What a request asks for; of those that come in two forms, the one that pyfuse3's handler is named for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45


NAMES = {number: name for name, number in vars(Opcode).items() if isinstance(number, int)}
# `_make` of what has the right number of fields by nature.
_request: Callable[..., Request] = tuple.__new__
# Nobody waits for an answer to these.
UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})


class RawRequest(NamedTuple):
    """A request as the device gave it."""

    unique: int
    request: Request

    @property
    def resent(self) -> bool:
        """Whether it was handed out before."""
        return bool(self.unique & RESENT)


def parse(data: memoryview | bytes) -> RawRequest:
    """Return what *data*, all of one request, identifies."""
    head = IN_HEADER.unpack_from(data)
    return RawRequest(head[2], identify(head, data))


def identify(head: Head, data: memoryview | bytes) -> Request:
    """Return what tells the request *data*, which begins with *head*, from others."""
    _, opcode, _, node, _, _, thread, _, _ = head
    read = _BODIES.get(opcode)
    if read is None:
        return _request(Request, (opcode, thread, node, 0))
    opcode, anonymous, key = read(bytes(data[IN_HEADER.size : _PARSED_BYTES_MAX]))
    return _request(Request, (opcode, 0, 0, key) if anonymous else (opcode, thread, node, key))


def error_reply(unique: int, number: int) -> bytes:
    """Return the answer that makes the request *unique* fail with errno *number*."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def forget_inode(inode: int) -> bytes:
    """Return what makes the kernel drop all pages and attributes of *inode*."""
    return OUT_HEADER.pack(OUT_HEADER.size + _INVAL_INODE.size, _NOTIFY_INVAL_INODE, 0) + _INVAL_INODE.pack(inode, 0, 0)


def forget_name(parent: int, name: bytes) -> bytes:
    """Return what makes the kernel drop what it knows of *name* in *parent*."""
    head = OUT_HEADER.pack(OUT_HEADER.size + _INVAL_ENTRY.size + len(name) + 1, _NOTIFY_INVAL_ENTRY, 0)
    return head + _INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0"


def keep_bytes(inode: int, size: int) -> bytes:
    """Return what, with *size* bytes behind it, makes the kernel take them for the first ones of *inode*."""
    return _STORE.pack(_STORE.size + size, _NOTIFY_STORE, 0, inode, 0, size, 0)


def can_resend(init: bytes) -> bool:
    """Return whether the kernel that sent the request *init* can send unanswered requests again."""
    if len(init) < IN_HEADER.size + _INIT_IN.size:
        return False
    _, _, _, flags, flags_2 = _INIT_IN.unpack_from(init, IN_HEADER.size)
    return bool(flags & _INIT_EXT and flags_2 & _HAS_RESEND_2)


def max_write(reply: bytes) -> int:
    """Return the largest number of bytes of one write, as the answer *reply* to INIT has it."""
    return int(_INIT_OUT.unpack_from(reply, OUT_HEADER.size)[6])


def same_session(one: bytes, other: bytes) -> bool:
    """Return whether two answers to the same INIT promise the kernel the same."""
    return one[OUT_HEADER.size :] == other[OUT_HEADER.size :] and one[4:8] == other[4:8]


# -- which request it is ----------------------------------------------------------------------------------------------
#
# A thread has one request in hand, so its id, the opcode, the inode and a hash of names tell requests apart. Handlers
# of open files are not told the thread: there the handle and the range do.

_WORDS = struct.Struct("<QQQ")
_U64 = struct.Struct("<Q")
_READ_IN = struct.Struct("<QQI")


def _of_names(*parts: bytes) -> int:
    return xxh3_64_intdigest(b"\0".join(parts))


def _of_words(first: int, second: int, third: int = 0) -> int:
    return xxh3_64_intdigest(_WORDS.pack(first, second & 0xFFFF_FFFF_FFFF_FFFF, third))


def _named(opcode: int, skip: int = 0, names: int = 1) -> Callable[[bytes], tuple[int, bool, int]]:
    """Return what reads a body of *names* behind *skip* bytes."""

    def read(body: bytes) -> tuple[int, bool, int]:
        return opcode, False, _of_names(*body[skip:].split(b"\0")[:names])

    return read


def _handled(opcode: int) -> Callable[[bytes], tuple[int, bool, int]]:
    return lambda body: (opcode, True, _U64.unpack_from(body)[0])


def _ranged(opcode: int, *, sized: bool = True) -> Callable[[bytes], tuple[int, bool, int]]:
    def read(body: bytes) -> tuple[int, bool, int]:
        handle, offset, size = _READ_IN.unpack_from(body)
        return opcode, True, _of_words(handle, offset, size if sized else 0)

    return read


def _renamed(skip: int) -> Callable[[bytes], tuple[int, bool, int]]:
    def read(body: bytes) -> tuple[int, bool, int]:
        old, new = body[skip:].split(b"\0")[:2]
        return Opcode.RENAME, False, _of_names(old, new, body[:8])

    return read


_BODIES: dict[int, Callable[[bytes], tuple[int, bool, int]]] = {
    Opcode.LOOKUP: _named(Opcode.LOOKUP),
    Opcode.SYMLINK: _named(Opcode.SYMLINK, names=2),
    Opcode.MKNOD: _named(Opcode.MKNOD, 16),
    Opcode.MKDIR: _named(Opcode.MKDIR, 8),
    Opcode.UNLINK: _named(Opcode.UNLINK),
    Opcode.RMDIR: _named(Opcode.RMDIR),
    Opcode.RENAME: _renamed(8),
    Opcode.RENAME2: _renamed(16),
    Opcode.LINK: lambda body: (Opcode.LINK, False, _of_names(body[8:].split(b"\0")[0], body[:8])),
    Opcode.READ: _ranged(Opcode.READ),
    Opcode.WRITE: _ranged(Opcode.WRITE),
    Opcode.STATFS: lambda _: (Opcode.STATFS, True, 0),
    Opcode.RELEASE: _handled(Opcode.RELEASE),
    Opcode.FSYNC: _handled(Opcode.FSYNC),
    Opcode.SETXATTR: _named(Opcode.SETXATTR, 8),
    Opcode.GETXATTR: _named(Opcode.GETXATTR, 8),
    Opcode.REMOVEXATTR: _named(Opcode.REMOVEXATTR),
    Opcode.FLUSH: _handled(Opcode.FLUSH),
    Opcode.READDIR: _ranged(Opcode.READDIR, sized=False),
    Opcode.READDIRPLUS: _ranged(Opcode.READDIR, sized=False),
    Opcode.RELEASEDIR: _handled(Opcode.RELEASEDIR),
    Opcode.FSYNCDIR: _handled(Opcode.FSYNCDIR),
    Opcode.CREATE: _named(Opcode.CREATE, 16),
}

# By the name of the handler: the request that its arguments belong to. pyfuse3 passes them by position.
HANDLERS: dict[str, Callable[..., Request]] = {
    "lookup": lambda parent, name, ctx: Request(Opcode.LOOKUP, ctx.pid, parent, _of_names(name)),
    "getattr": lambda inode, ctx: Request(Opcode.GETATTR, ctx.pid, inode, 0),
    "setattr": lambda inode, attr, fields, fh, ctx: Request(Opcode.SETATTR, ctx.pid, inode, 0),
    "readlink": lambda inode, ctx: Request(Opcode.READLINK, ctx.pid, inode, 0),
    "symlink": lambda parent, name, target, ctx: Request(Opcode.SYMLINK, ctx.pid, parent, _of_names(name, target)),
    "mknod": lambda parent, name, mode, rdev, ctx: Request(Opcode.MKNOD, ctx.pid, parent, _of_names(name)),
    "mkdir": lambda parent, name, mode, ctx: Request(Opcode.MKDIR, ctx.pid, parent, _of_names(name)),
    "unlink": lambda parent, name, ctx: Request(Opcode.UNLINK, ctx.pid, parent, _of_names(name)),
    "rmdir": lambda parent, name, ctx: Request(Opcode.RMDIR, ctx.pid, parent, _of_names(name)),
    "rename": lambda parent, name, new_parent, new_name, flags, ctx: Request(
        Opcode.RENAME, ctx.pid, parent, _of_names(name, new_name, _U64.pack(new_parent))
    ),
    "link": lambda inode, new_parent, name, ctx: Request(
        Opcode.LINK, ctx.pid, new_parent, _of_names(name, _U64.pack(inode))
    ),
    "open": lambda inode, flags, ctx: Request(Opcode.OPEN, ctx.pid, inode, 0),
    "read": lambda fh, offset, size: Request(Opcode.READ, 0, 0, _of_words(fh, offset, size)),
    "write": lambda fh, offset, data: Request(Opcode.WRITE, 0, 0, _of_words(fh, offset, len(data))),
    "statfs": lambda ctx: Request(Opcode.STATFS, 0, 0, 0),
    "release": lambda fh: Request(Opcode.RELEASE, 0, 0, fh),
    "fsync": lambda fh, data_only: Request(Opcode.FSYNC, 0, 0, fh),
    "setxattr": lambda inode, name, value, ctx: Request(Opcode.SETXATTR, ctx.pid, inode, _of_names(name)),
    "getxattr": lambda inode, name, ctx: Request(Opcode.GETXATTR, ctx.pid, inode, _of_names(name)),
    "listxattr": lambda inode, ctx: Request(Opcode.LISTXATTR, ctx.pid, inode, 0),
    "removexattr": lambda inode, name, ctx: Request(Opcode.REMOVEXATTR, ctx.pid, inode, _of_names(name)),
    "flush": lambda fh: Request(Opcode.FLUSH, 0, 0, fh),
    "opendir": lambda inode, ctx: Request(Opcode.OPENDIR, ctx.pid, inode, 0),
    "readdir": lambda fh, start, token: Request(Opcode.READDIR, 0, 0, _of_words(fh, start)),
    "releasedir": lambda fh: Request(Opcode.RELEASEDIR, 0, 0, fh),
    "fsyncdir": lambda fh, data_only: Request(Opcode.FSYNCDIR, 0, 0, fh),
    "access": lambda inode, mode, ctx: Request(Opcode.ACCESS, ctx.pid, inode, 0),
    "create": lambda parent, name, mode, flags, ctx: Request(Opcode.CREATE, ctx.pid, parent, _of_names(name)),
}


def describe(request: Request) -> str:
    """Return *request* as a line of the log has it."""
    name = NAMES.get(request.opcode, f"request {request.opcode}")
    where = f" at inode {request.node}" if request.node else ""
    who = f" of thread {request.pid}" if request.pid else ""
    return f"{name}{where}{who}"


def describe_all(requests: list[Request]) -> str:
    """Return what a worker had in hand, as a part of a sentence."""
    if not requests:
        return "with nothing in hand"
    more = f" and {len(requests) - _NAMED_MAX} more" if len(requests) > _NAMED_MAX else ""
    return "with in hand: " + ", ".join(map(describe, requests[:_NAMED_MAX])) + more
