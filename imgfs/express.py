"""Answers requests on the spot, past pyfuse3, where nobody has to be waited for.

Owns how the bytes of such a request are read. Must not know the device, nor who else serves it.

Most requests ask for what is in memory, or change little. What pyfuse3 and trio do for each, coroutines, objects and
turns of a loop, costs more than the answer. So a worker tries here first. What cannot be answered at once, or not well,
is not answered at all, and nothing has happened: then pyfuse3 gets the request, and its handler (fs.py) does it again
from the start, with all that errors, threads and full disks need. Both ask the same of the store (acts.py).

*Concurrency:* nothing here waits, so a request is done before the next is read.
"""

import os
import struct
from collections.abc import Callable, Iterator

from imgfs import replies
from imgfs.acts import Acts, Listed, Shown
from imgfs.calls import Calls
from imgfs.disk import WouldBlock
from imgfs.errors import ImgfsError
from imgfs.replies import CACHE_DIRECTORY, KEEP_CACHE, NO_FLUSH, Reply
from imgfs.store import Store
from imgfs.wire import IN_HEADER, Head, Opcode

_U32 = struct.Struct("<I")
_HANDLE = struct.Struct("<Q")
_RANGE = struct.Struct("<QQI")  # handle, offset, size
_WRITE_HEADER_BYTES = 40
_CREATE = struct.Struct("<IIII")  # flags, mode, umask, padding
_HEADER_BYTES = IN_HEADER.size


class Express:
    """Answers for one worker."""

    def __init__(self, store: Store, acts: Acts, calls: Calls) -> None:
        self._store = store
        self._acts = acts
        self._calls = calls
        self._timeout_s = acts.manner.timeout_s
        self._by_opcode: dict[int, Callable[[int, int, tuple[int, int, int], memoryview, int], Reply | None]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.FLUSH: self._flush,
            Opcode.RELEASE: self._release,
        }
        if store.writable:
            self._by_opcode |= {
                Opcode.CREATE: self._create,
                Opcode.WRITE: self._write,
                Opcode.UNLINK: self._unlink,
            }

    def answer(self, head: Head, request: memoryview, row: int) -> Reply | None:
        """Do what *request*, as the device gave it, with *head* in front, asks for; None: nothing was done.

        *row* is where it is noted as being in hand.
        """
        _, opcode, unique, node, uid, gid, thread, _, _ = head
        answer = self._by_opcode.get(opcode)
        if answer is None:
            return None
        try:
            return answer(unique, node, (uid, gid, thread), request[_HEADER_BYTES:], row)
        except (WouldBlock, ImgfsError, OSError):
            return None

    def _shown(self, unique: int, shown: Shown) -> Reply:
        attr = shown.attr
        if attr is None:
            return replies.absent(unique, shown.name_timeout_s)
        atime_ns = self._store.access_times.get(attr.inode, attr.mtime_ns)
        return replies.entry(unique, attr, atime_ns, shown.name_timeout_s, self._timeout_s)

    # -- looking ----------------------------------------------------------------------------------------------

    def _lookup(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply:
        return self._shown(unique, self._acts.lookup(node, bytes(body[:-1]), who[2], nowait=True))

    def _getattr(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply:
        attr = self._store.attr(node)
        atime_ns = self._store.access_times.get(node, attr.mtime_ns)
        return replies.attributes(unique, attr, atime_ns, self._timeout_s)

    def _opendir(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply:
        # What a directory shows depends on who asks, where images are published when they are closed.
        keep = 0 if self._acts.manner.publish_at_close else KEEP_CACHE | CACHE_DIRECTORY
        return replies.opened(unique, node, keep)

    def _readdirplus(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply:
        directory, position, size = _RANGE.unpack_from(body)
        listing = _until_it_blocks(self._acts.listing(directory, position, nowait=True))
        return replies.listing(unique, listing, self._store.access_times, self._timeout_s, size)

    def _releasedir(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply:
        return replies.done(unique)

    # -- open images ------------------------------------------------------------------------------------------

    def _open(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply | None:
        if _U32.unpack_from(body)[0] & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY:
            return None
        handle = self._store.open_image(node, nowait=True, row=row)
        return replies.opened(unique, handle, KEEP_CACHE | NO_FLUSH)

    def _read(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply:
        handle, offset, size = _RANGE.unpack_from(body)
        return replies.data(unique, self._store.read(handle, offset, size, nowait=True))

    def _flush(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply:
        handle = _HANDLE.unpack_from(body)[0]
        size = self._store.flush_bytes(handle)
        if size:
            self._calls.at_once(row, size, self._store.flush, handle)
        return replies.done(unique)

    def _release(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply | None:
        store = self._store
        handle = _HANDLE.unpack_from(body)[0]
        if not store.may_write(handle):
            store.release(handle)
        elif store.flush_bytes(handle):
            return None
        else:
            self._calls.at_once(row, 0, store.release, handle)
        return replies.done(unique)

    # -- changes ----------------------------------------------------------------------------------------------
    #
    # What a worker had applied when it died is told to pyfuse3's handlers; so these wait until there is no such thing.

    def _create(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply | None:
        if self._store.requests.any_noted():
            return None
        _, mode, umask, _ = _CREATE.unpack_from(body)
        name = bytes(body[_CREATE.size :]).partition(b"\0")[0]
        inode, handle = self._calls.at_once(row, 0, self._acts.create, node, name, mode & ~umask, *who)
        return replies.created(self._shown(unique, self._acts.created(inode)), handle, KEEP_CACHE)

    def _write(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply | None:
        store = self._store
        handle, offset, size = _RANGE.unpack_from(body)
        if self._acts.loses_privileges(store.handle_inode(handle)):
            return None
        content = body[_WRITE_HEADER_BYTES : _WRITE_HEADER_BYTES + size]
        copied = size + store.stage_bytes(handle)
        self._calls.at_once(row, copied, store.write, handle, offset, content, last_try=False)
        return replies.written(unique, size)

    def _unlink(self, unique: int, node: int, who: tuple[int, int, int], body: memoryview, row: int) -> Reply | None:
        if self._store.requests.any_noted():
            return None
        self._calls.at_once(row, 0, self._store.unlink, node, bytes(body[:-1]))
        return replies.done(unique)


def _until_it_blocks(listing: Iterator[Listed]) -> Iterator[Listed]:
    """Yield what comes of *listing*; a short answer is an answer, and the kernel comes back for the rest."""
    came = False
    try:
        for listed in listing:
            yield listed
            came = True
    except WouldBlock:
        if not came:
            raise
