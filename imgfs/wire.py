"""The bytes of the FUSE protocol that pyfuse3 hides: request headers, INIT, RESEND, and the answer of an error.

Owns their structs (include/uapi/linux/fuse.h), and what of them identifies a request. Must not know who reads or writes
a device, nor what a request does.
"""

import struct
from collections.abc import Callable

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
# More requests do not help whoever reads a line of the log.
_NAMED_MAX = 20

# Bit 63 of a request's number: it was handed out before, and was not answered (Linux 6.9).
RESENT = 1 << 63
_UNIQUE_MASK = RESENT - 1
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


def identify(head: Head) -> Request:
    """Return the request that begins with *head*: the same, whether or not it was handed out before."""
    _, opcode, unique, node, _, _, thread, _, _ = head
    return _request(Request, (opcode, thread, node, unique & _UNIQUE_MASK))


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
