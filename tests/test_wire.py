"""A request is known by the same `Request` from its raw bytes and from what its handler is called with."""

import struct
from types import SimpleNamespace

import pytest

from imgfs import wire
from imgfs.wire import IN_HEADER, NAMES, RESENT, Opcode

CTX = SimpleNamespace(pid=77)
NODE = 5 | 3 << 32
HANDLE = 9 | 4 << 32

# opcode, body as the kernel sends it, name of the handler, its arguments
CASES = [
    (Opcode.LOOKUP, b"a\xff\0", "lookup", (NODE, b"a\xff", CTX)),
    (Opcode.GETATTR, bytes(16), "getattr", (NODE, CTX)),
    (Opcode.SETATTR, bytes(88), "setattr", (NODE, None, None, None, CTX)),
    (Opcode.READLINK, b"", "readlink", (NODE, CTX)),
    (Opcode.SYMLINK, b"name\0to/it\0", "symlink", (NODE, b"name", b"to/it", CTX)),
    (Opcode.MKNOD, bytes(16) + b"name\0", "mknod", (NODE, b"name", 0o644, 0, CTX)),
    (Opcode.MKDIR, bytes(8) + b"name\0", "mkdir", (NODE, b"name", 0o755, CTX)),
    (Opcode.UNLINK, b"name\0", "unlink", (NODE, b"name", CTX)),
    (Opcode.RMDIR, b"name\0", "rmdir", (NODE, b"name", CTX)),
    (Opcode.RENAME, struct.pack("<Q", 8) + b"old\0new\0", "rename", (NODE, b"old", 8, b"new", 0, CTX)),
    (Opcode.RENAME2, struct.pack("<QII", 8, 1, 0) + b"old\0new\0", "rename", (NODE, b"old", 8, b"new", 1, CTX)),
    (Opcode.LINK, struct.pack("<Q", 8) + b"new\0", "link", (8, NODE, b"new", CTX)),
    (Opcode.OPEN, bytes(8), "open", (NODE, 0, CTX)),
    (Opcode.READ, struct.pack("<QQIIQII", HANDLE, 4096, 100, 0, 0, 0, 0), "read", (HANDLE, 4096, 100)),
    (Opcode.WRITE, struct.pack("<QQIIQII", HANDLE, 7, 3, 0, 0, 0, 0) + b"abc", "write", (HANDLE, 7, b"abc")),
    (Opcode.STATFS, b"", "statfs", (CTX,)),
    (Opcode.RELEASE, struct.pack("<QIIQ", HANDLE, 0, 0, 0), "release", (HANDLE,)),
    (Opcode.FSYNC, struct.pack("<QII", HANDLE, 0, 0), "fsync", (HANDLE, False)),
    (Opcode.SETXATTR, struct.pack("<II", 3, 0) + b"user.a\0abc", "setxattr", (NODE, b"user.a", b"abc", CTX)),
    (Opcode.GETXATTR, struct.pack("<II", 3, 0) + b"user.a\0", "getxattr", (NODE, b"user.a", CTX)),
    (Opcode.LISTXATTR, struct.pack("<II", 3, 0), "listxattr", (NODE, CTX)),
    (Opcode.REMOVEXATTR, b"user.a\0", "removexattr", (NODE, b"user.a", CTX)),
    (Opcode.FLUSH, struct.pack("<QIIQ", HANDLE, 0, 0, 0), "flush", (HANDLE,)),
    (Opcode.OPENDIR, bytes(8), "opendir", (NODE, CTX)),
    (Opcode.READDIRPLUS, struct.pack("<QQIIQII", 1, 12, 4096, 0, 0, 0, 0), "readdir", (1, 12, None)),
    (Opcode.RELEASEDIR, struct.pack("<QIIQ", 1, 0, 0, 0), "releasedir", (1,)),
    (Opcode.FSYNCDIR, struct.pack("<QII", 1, 0, 0), "fsyncdir", (1, False)),
    (Opcode.ACCESS, bytes(8), "access", (NODE, 4, CTX)),
    (Opcode.CREATE, bytes(16) + b"name\0", "create", (NODE, b"name", 0o644, 0, CTX)),
]


def raw(opcode: int, body: bytes, unique: int = 2) -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, NODE, 0, 0, CTX.pid, 0, 0) + body


@pytest.mark.parametrize(("opcode", "body", "handler", "arguments"), CASES, ids=[NAMES[case[0]] for case in CASES])
def test_bytes_and_arguments_tell_the_same(
    opcode: int, body: bytes, handler: str, arguments: tuple[object, ...]
) -> None:
    assert wire.parse(raw(opcode, body)).request == wire.HANDLERS[handler](*arguments)


def test_every_handler_has_a_case() -> None:
    assert {case[2] for case in CASES} == wire.HANDLERS.keys()


def test_requests_differ_by_all_that_tells_them_apart() -> None:
    requests = [wire.HANDLERS[handler](*arguments) for _, _, handler, arguments in CASES]
    other = SimpleNamespace(pid=78)
    requests += [
        wire.HANDLERS["mkdir"](NODE, b"name", 0o755, other),
        wire.HANDLERS["mkdir"](NODE + 1, b"name", 0o755, CTX),
        wire.HANDLERS["mkdir"](NODE, b"nam", 0o755, CTX),
        wire.HANDLERS["symlink"](NODE, b"namet", b"o/it", CTX),
        wire.HANDLERS["read"](HANDLE, 4096, 101),
        wire.HANDLERS["read"](HANDLE, 4097, 100),
        wire.HANDLERS["link"](9, NODE, b"new", CTX),
    ]
    # Both forms of rename are one.
    assert len(set(requests)) == len(requests) - 1


def test_what_was_handed_out_before_says_so() -> None:
    assert not wire.parse(raw(Opcode.OPEN, bytes(8))).resent
    assert wire.parse(raw(Opcode.OPEN, bytes(8), 2 | RESENT)).resent


def test_an_error_is_answered_as_the_kernel_reads_it() -> None:
    assert struct.unpack("<IiQ", wire.error_reply(2 | RESENT, 5)) == (16, -5, 2 | RESENT)
