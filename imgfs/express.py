"""Answers requests past pyfuse3: on the spot where nobody has to be waited for, later what the disk has to do.

Owns how the bytes of such a request are read. Must not know the device, nor who else serves it.

Most requests ask for what is in memory, or change little. What pyfuse3 and trio do for each, coroutines, objects and
turns of a loop, costs more than the answer. So a worker tries here first. What cannot be answered at once, or not well,
is not answered at all, and nothing has happened: then pyfuse3 gets the request, and its handler (fs.py) does it again
from the start, with all that errors, threads and full disks need; but who only looks at what is not in memory is
answered here, from a thread. Both ask the same of the store (acts.py).

*Concurrency:* `answer` waits for nothing but a moment for the store's lock, so a request is done before the next is
read; `answer_late` awaits. `synced` is called in a thread.
"""

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from imgfs import replies
from imgfs.acts import Acts, Listed, Shown
from imgfs.answers import errno_of
from imgfs.calls import Calls
from imgfs.disk import Buffer, WouldBlock
from imgfs.errors import ImgfsError, InvalidArgument, StoreFull
from imgfs.format import Kind
from imgfs.giving import Giving
from imgfs.late import Unsynced
from imgfs.listers import Listers
from imgfs.prepared import Prepared
from imgfs.replies import CACHE_DIRECTORY, KEEP_CACHE, NO_FLUSH, Reply
from imgfs.store import Store
from imgfs.wire import IN_HEADER, NAMES, Head, Opcode, error_reply

_U32 = struct.Struct("<I")
_HANDLE = struct.Struct("<Q")
_RANGE = struct.Struct("<QQI")  # handle, offset, size
_WRITE_HEADER_BYTES = 40
_CREATE = struct.Struct("<IIII")  # flags, mode, umask, padding
_HEADER_BYTES = IN_HEADER.size
_DIRECTORY = Kind.DIRECTORY
_SYNCS = frozenset({Opcode.FSYNC, Opcode.FSYNCDIR})


class Asked(NamedTuple):
    """A request."""

    unique: int
    node: int
    uid: int
    gid: int
    thread: int
    body: Buffer
    row: int
    """Where it is noted as being in hand."""


# `_make` of what has the right number of fields by nature.
_asked: Callable[..., Asked] = tuple.__new__


class Express:
    """Answers for one worker."""

    def __init__(
        self, store: Store, acts: Acts, calls: Calls, listers: Listers | None = None, giving: Giving | None = None
    ) -> None:
        self._store = store
        self._listers = listers or Listers()
        self._prepared = Prepared(store, acts, store.access_times, calls.start)
        self._giving = giving
        self._acts = acts
        self._calls = calls
        self._timeout_s = acts.manner.timeout_s
        self._looked_up = 0  # an image that nobody has opened since
        self._looks: dict[int, Callable[..., Reply]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.READDIRPLUS: self._readdirplus,
        }
        self._others: dict[int, Callable[[Asked], Reply | None]] = {
            Opcode.GETATTR: self._getattr,
            Opcode.OPENDIR: self._opendir,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.FLUSH: self._flush,
            Opcode.RELEASE: self._release,
        }
        if store.writable:
            self._others |= {
                Opcode.CREATE: self._create,
                Opcode.WRITE: self._write,
                Opcode.UNLINK: self._unlink,
                Opcode.FSYNC: self._fsync,
                Opcode.FSYNCDIR: self._fsyncdir,
            }

    def answer(self, head: Head, request: memoryview, row: int) -> Reply | None:
        """Do what *request*, as the device gave it, with *head* in front, asks for; None: nothing was done.

        *row* is where it is noted as being in hand.

        Raises:
            WouldBlock: it is for `answer_late`; nothing was done.
            Unsynced: it is for `synced`; if it is done again, that finds nothing left.
        """
        _, opcode, unique, node, uid, gid, thread, _, _ = head
        asked = _asked(Asked, (unique, node, uid, gid, thread, request[_HEADER_BYTES:], row))
        try:
            look = self._looks.get(opcode)
            if look is not None:
                return look(asked, nowait=True)
            answer = self._others.get(opcode)
            return answer(asked) if answer is not None else None
        except WouldBlock:
            if look is not None:
                raise
        except (ImgfsError, OSError):
            pass
        return None

    def go_on(self) -> None:
        """Let the disk begin to read what was just looked up: it works while the answer and the open travel."""
        inode, self._looked_up = self._looked_up, 0
        if inode:
            with contextlib.suppress(ImgfsError, OSError):  # told when it is opened
                self._store.prefetch(inode)

    def ask_disk(self, head: Head) -> bool:
        """Let the disk begin to read what `answer` had to wait for; return whether it is little."""
        _, opcode, _, node, *_ = head
        if opcode == Opcode.OPEN:
            self._store.prefetch(node)
            if self._giving is not None:
                self._giving.expect(node)
        return opcode == Opcode.OPEN

    async def answer_late(self, head: Head, request: bytes, row: int) -> Reply:
        """Answer *request*, for which `answer` has raised `WouldBlock`, when the disk has given what it asks for.

        Or for which `synced` found that the disk has no room: that is waited for.
        """
        _, opcode, unique, node, uid, gid, thread, _, _ = head
        if opcode in _SYNCS:
            return await self._sync_with_room(head, request, row)
        asked = Asked(unique, node, uid, gid, thread, request[_HEADER_BYTES:], row)
        try:
            return await self._calls.cold(self._looks[opcode], asked)
        except Exception as error:
            return (error_reply(unique, errno_of(error, NAMES[opcode].lower())),)

    # -- looking ----------------------------------------------------------------------------------------------

    def _lookup(self, asked: Asked, *, nowait: bool = False) -> Reply:
        name = bytes(asked.body).partition(b"\0")[0]
        shown = self._acts.lookup(asked.node, name, asked.thread, nowait=nowait)
        attr = shown.attr
        if attr is not None and attr.kind != _DIRECTORY:
            self._listers.looked_up(asked.thread, asked.node)
            if attr.kind == Kind.FILE:
                self._looked_up = attr.inode
                if self._giving is not None:
                    self._giving.expect(attr.inode)
        return self._shown(asked.unique, shown)

    def _shown(self, unique: int, shown: Shown) -> Reply:
        attr = shown.attr
        if attr is None:
            return replies.absent(unique, shown.name_timeout_s)
        atime_ns = self._store.access_times.get(attr.inode, attr.mtime_ns)
        return replies.entry(unique, attr, atime_ns, shown.name_timeout_s, self._timeout_s)

    def _open(self, asked: Asked, *, nowait: bool = False) -> Reply:
        if _U32.unpack_from(asked.body)[0] & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY:
            raise InvalidArgument("an image that is opened to be written is for pyfuse3's handler")
        handle = self._open_soon(asked) if nowait else 0
        if not handle:
            handle = self._store.open_image(asked.node, nowait=nowait, row=asked.row)
        return replies.opened(asked.unique, handle, KEEP_CACHE | NO_FLUSH)

    def _open_soon(self, asked: Asked) -> int:
        """Open a small image that is whole, 0 for any other; the kernel gets its bytes with it if it has none."""
        store, giving, inode = self._store, self._giving, asked.node
        seen = store.see(inode)
        if seen is None:
            return 0
        handle = store.take_handle(inode, nowait=True, row=asked.row)
        if giving is not None and giving.expects(inode):
            giving.give(inode, seen)
        return handle

    def _read(self, asked: Asked, *, nowait: bool = False) -> Reply:
        handle, offset, size = _RANGE.unpack_from(asked.body)
        return replies.data(asked.unique, self._store.read(handle, offset, size, nowait=nowait))

    def forget_listings(self) -> bool:
        """Free what listings needed that are over; return whether that were the last of them."""
        prepared_any = self._prepared.forget()
        return self._store.forget_listings() or prepared_any

    def _readdirplus(self, asked: Asked, *, nowait: bool = False) -> Reply:
        directory = asked.node
        _, position, size = _RANGE.unpack_from(asked.body)
        bare = self._listers.wants_names_alone(asked.thread, directory)
        reply = self._prepared.answer(asked.unique, directory, position, size, bare=bare, nowait=nowait)
        if reply is None:
            listing = _until_it_blocks(self._acts.listing(directory, position, nowait=nowait))
            times = self._store.access_times
            reply = replies.listing(asked.unique, listing, times, self._timeout_s, size, bare=bare)
        if not bare:
            self._listers.gave_attributes(asked.thread)
        return reply

    def _opendir(self, asked: Asked) -> Reply:
        # What a directory shows depends on who asks, where images are published when they are closed.
        keep = 0 if self._acts.manner.publish_at_close else KEEP_CACHE | CACHE_DIRECTORY
        if self._listers.wants_anew(asked.thread, asked.node):
            keep &= ~KEEP_CACHE
        return replies.opened(asked.unique, self._store.open_directory(asked.node), keep)

    def _releasedir(self, asked: Asked) -> Reply:
        return replies.done(asked.unique)

    def _getattr(self, asked: Asked) -> Reply:
        attr = self._store.attr(asked.node)
        atime_ns = self._store.access_times.get(asked.node, attr.mtime_ns)
        return replies.attributes(asked.unique, attr, atime_ns, self._timeout_s)

    # -- changes ----------------------------------------------------------------------------------------------
    #
    # What a worker had applied when it died is told to pyfuse3's handlers; so these wait until there is no such thing.

    def _create(self, asked: Asked) -> Reply | None:
        if self._store.requests.any_noted():
            return None
        _, mode, umask, _ = _CREATE.unpack_from(asked.body)
        name = bytes(asked.body[_CREATE.size :]).partition(b"\0")[0]
        who = asked.uid, asked.gid, asked.thread
        inode, handle = self._calls.at_once(asked.row, 0, self._acts.create, asked.node, name, mode & ~umask, *who)
        return replies.created(self._shown(asked.unique, self._acts.created(inode)), handle, KEEP_CACHE)

    def _write(self, asked: Asked) -> Reply | None:
        store = self._store
        handle, offset, size = _RANGE.unpack_from(asked.body)
        inode, mode, copied = store.about_to_write(handle)
        if self._acts.loses_privileges(inode, mode):
            return None
        content = asked.body[_WRITE_HEADER_BYTES : _WRITE_HEADER_BYTES + size]
        self._calls.at_once(asked.row, size + copied, store.write, handle, offset, content, last_try=False)
        return replies.written(asked.unique, size)

    def _flush(self, asked: Asked) -> Reply:
        self._commit(asked)
        return replies.done(asked.unique)

    def _commit(self, asked: Asked) -> None:
        handle = _HANDLE.unpack_from(asked.body)[0]
        size = self._store.flush_bytes(handle)
        if size:
            self._calls.at_once(asked.row, size, self._store.flush, handle)

    def _release(self, asked: Asked) -> Reply | None:
        store = self._store
        handle = _HANDLE.unpack_from(asked.body)[0]
        if not store.has_staged(handle):
            store.release(handle)
        elif store.flush_bytes(handle):
            return None
        else:
            self._calls.at_once(asked.row, 0, store.release, handle)
        return replies.done(asked.unique)

    def _unlink(self, asked: Asked) -> Reply | None:
        if self._store.requests.any_noted():
            return None
        self._calls.at_once(asked.row, 0, self._store.unlink, asked.node, bytes(asked.body).partition(b"\0")[0])
        return replies.done(asked.unique)

    # -- syncing ----------------------------------------------------------------------------------------------

    def ask_sync(self, told: Callable[[Exception | None], None]) -> None:
        """Have *told* called, in a thread, when all that is done is durable, or could not be made so."""
        self._calls.syncs.ask(told)

    def synced(self, head: Head, request: bytes, error: Exception | None) -> Reply | None:
        """Answer *request*, for which `answer` has raised `Unsynced`, after a sync that raised *error*; in any thread.

        None: the disk is full; it is for `answer_late`.
        """
        return None if isinstance(error, StoreFull) else self._synced(head, request, error)

    def _synced(self, head: Head, request: bytes, error: Exception | None) -> Reply:
        _, opcode, unique, *_ = head
        try:
            if error is None:
                handle = _HANDLE.unpack_from(request, _HEADER_BYTES)[0]
                if opcode == Opcode.FSYNC:
                    self._store.check_kept(handle)
                else:
                    self._store.check_directory(handle)
        except Exception as failure:
            error = failure
        if error is not None:
            return (error_reply(unique, errno_of(error, NAMES[opcode].lower())),)
        return replies.done(unique)

    async def _sync_with_room(self, head: Head, request: bytes, row: int) -> Reply:
        await self._calls.find_room(row)
        error: Exception | None = None
        try:
            await self._calls.syncs.wait()
        except Exception as failure:
            error = failure
        return self._synced(head, request, error)

    def _fsync(self, asked: Asked) -> Reply:
        self._commit(asked)
        raise Unsynced

    def _fsyncdir(self, asked: Asked) -> Reply:
        raise Unsynced


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
