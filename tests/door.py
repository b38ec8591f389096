"""The door past pyfuse3, without a kernel before it: requests as the device would give them.

Owns their bytes. Must not know what is in the store.

*Concurrency:* none, but for who holds the lock of a store in a thread of its own.
"""

import os
import stat
import struct
import threading

from imgfs.acts import Acts, Manner
from imgfs.board import Board
from imgfs.calls import Calls
from imgfs.desk import Desk
from imgfs.device import DEVICE, Device
from imgfs.disk import WouldBlock
from imgfs.express import Express
from imgfs.replies import Reply
from imgfs.store import ROOT, Store
from imgfs.wire import IN_HEADER, OUT_HEADER, Head, Opcode

ROW = 0
PID = 4321
UNIQUE = 7
MODE = stat.S_IFREG | 0o640
_HANDLE = struct.Struct("<Q")


def request_of(opcode: int, node: int, body: bytes, unique: int = UNIQUE) -> tuple[Head, bytes]:
    """Return a request, and its head unpacked."""
    head = (IN_HEADER.size + len(body), opcode, unique, node, 1000, 100, PID, 0, 0)
    return head, IN_HEADER.pack(*head) + body


class Door:
    """Sends requests, as the kernel has them, to an `Express` of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._device = Device(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC), b"")
        self.desk = Desk(0, self._device, Board(), store.requests)
        self.calls = Calls(store, self.desk)
        self.acts = Acts(store, Manner(60.0))
        self.express = Express(store, self.acts, self.calls)

    def close(self) -> None:
        self.desk.close()
        self._device.close()

    def ask(self, opcode: int, node: int, body: bytes) -> Reply | None:
        """Return what is answered on the spot, None if nothing is. Raises Unsynced."""
        head, request = request_of(opcode, node, body)
        try:
            reply = self.express.answer(head, memoryview(request), ROW)
        except WouldBlock:
            assert opcode in (Opcode.LOOKUP, Opcode.OPEN, Opcode.READ, Opcode.READDIRPLUS)
            return None
        if reply is not None:
            assert OUT_HEADER.unpack_from(reply[0]) == (sum(map(len, reply)), 0, UNIQUE)
        return reply

    def lookup(self, name: bytes) -> Reply | None:
        return self.ask(Opcode.LOOKUP, ROOT, name + b"\0")

    def open(self, inode: int, flags: int = os.O_RDONLY) -> int | None:
        reply = self.ask(Opcode.OPEN, inode, struct.pack("<II", flags, 0))
        return None if reply is None else _HANDLE.unpack_from(reply[0], OUT_HEADER.size)[0]

    def read(self, handle: int, offset: int, size: int) -> bytes | None:
        reply = self.ask(Opcode.READ, 0, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0))
        return None if reply is None else bytes(reply[1])

    def create(self, name: bytes) -> tuple[int, int] | None:
        reply = self.ask(Opcode.CREATE, ROOT, struct.pack("<IIII", os.O_WRONLY, MODE, 0, 0) + name + b"\0")
        if reply is None:
            return None
        return _HANDLE.unpack_from(reply[1])[0], _HANDLE.unpack_from(reply[2])[0]

    def write(self, handle: int, data: bytes) -> Reply | None:
        return self.ask(Opcode.WRITE, 0, struct.pack("<QQIIQII", handle, 0, len(data), 0, 0, 0, 0) + data)

    def flush(self, handle: int) -> Reply | None:
        return self.ask(Opcode.FLUSH, 0, struct.pack("<QIIQ", handle, 0, 0, 0))

    def release(self, handle: int) -> Reply | None:
        return self.ask(Opcode.RELEASE, 0, struct.pack("<QIIQ", handle, 0, 0, 0))

    def unlink(self, name: bytes) -> Reply | None:
        return self.ask(Opcode.UNLINK, ROOT, name + b"\0")

    def fsync(self, handle: int) -> Reply | None:
        return self.ask(Opcode.FSYNC, 0, struct.pack("<QII", handle, 0, 0))


class Held:
    """Another thread has the lock of *store*."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._done = threading.Event()

    def __enter__(self) -> None:
        holds = threading.Event()

        def hold() -> None:
            with self._store.lock():
                holds.set()
                self._done.wait(60)

        self._thread = threading.Thread(target=hold)
        self._thread.start()
        assert holds.wait(60)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
