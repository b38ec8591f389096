"""The FUSE handlers: each translates a request, makes one store call, and translates the answer back.

Owns nothing but two locks and the threads that wait for the disk; all state is in the store. Must not know how
images are kept, nor how the mount came about or who else serves it. What is not answered here is answered by the
kernel, which stops asking after one ENOSYS: locks (they are local to the machine), `access` (the mount is made with
`default_permissions`), `poll`, and extended attributes unless they were asked for.

A mutation that a worker had applied when it died, before it could answer, comes once more: `Desk.resent` then has the
answer. Everything else can be done twice: writes carry their offset, a flush finds nothing left to do.

*Concurrency:* every handler runs on one trio loop, which never waits for the disk: what is not in memory is read
in a thread. State changes between two awaits; those that copy much run in a thread, and `_changes` keeps the
others waiting meanwhile. What tells the kernel to forget is called from a thread: it can wait for the loop.
"""

import errno
import functools
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterable
from typing import TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from imgfs.acts import BLOCK_BYTES, Acts, Listed, Shown, mode_of
from imgfs.answers import all_answered
from imgfs.calls import Calls
from imgfs.desk import Desk
from imgfs.disk import WouldBlock
from imgfs.errors import BadHandle, ImgfsError, InvalidArgument, Spoiled, Stale, StoreFull
from imgfs.format import NAME_BYTES_MAX, Kind
from imgfs.handles import directory_of
from imgfs.store import PERMISSIONS, Attr, Store

log = logging.getLogger(__name__)

T = TypeVar("T")

# Entries fetched at once where a listing has to wait for the disk: about one answer full.
LISTING_BATCH = 256


@all_answered
class Filesystem(pyfuse3.Operations):
    """One mounted store."""

    supports_dot_lookup = True

    def __init__(self, store: Store, desk: Desk, acts: Acts, calls: Calls) -> None:
        """Serve *store*: what requests ask of it is in *acts*, and *calls* how that is waited for.

        *desk* knows the row of the request in hand, and whether a worker that died had applied it already.
        """
        self._store = store
        self._desk = desk
        self._acts = acts
        self._timeout_s = acts.manner.timeout_s
        self._xattrs = acts.manner.xattrs
        self._atimes = store.access_times
        self._cold, self._in_thread = calls.cold, calls.in_thread
        self._change, self._change_of = calls.change, calls.change_of
        self.find_room = calls.find_room
        self._syncs = calls.syncs

    async def sync(self) -> None:
        """Make durable all that was answered so far."""
        if self._store.writable:
            with self._desk.wait:
                await self._syncs.wait()

    # -- names ------------------------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._shown(await self._cold(self._acts.lookup, parent, name, ctx.pid))

    # A plain function: pyfuse3 awaits what it returns only if that is not None, and there is nothing to do.
    def forget(self, inode_list: Iterable[tuple[int, int]]) -> None:  # type: ignore[override]
        """Do nothing: inode numbers carry their generation, so nobody counts lookups."""

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        store = self._store
        if done := self._desk.resent():
            return self._entry(store.attr(done.inode))
        gid, set_gid = self._acts.group_in(parent, ctx.gid)
        mode = mode & PERMISSIONS & ~ctx.umask | set_gid
        return self._entry(store.attr(await self._change(store.mkdir, parent, name, mode, ctx.uid, gid)))

    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        store = self._store
        if done := self._desk.resent():
            return self._entry(store.attr(done.inode))
        gid, _ = self._acts.group_in(parent, ctx.gid)
        return self._entry(store.attr(await self._change(store.symlink, parent, name, target, ctx.uid, gid)))

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._cold(self._store.readlink, inode)

    async def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        if self._desk.resent() is None:
            await self._change(self._store.unlink, parent, name)

    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        if self._desk.resent() is None:
            await self._change(self._store.rmdir, parent, name)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: RequestContext
    ) -> None:
        if flags == pyfuse3.RENAME_EXCHANGE:
            if self._desk.resent() is None:
                await self._change(self._store.exchange, parent, name, new_parent, new_name)
            await self._moved(parent, name, new_parent)
            await self._moved(new_parent, new_name, parent)
            return
        if flags not in (0, pyfuse3.RENAME_NOREPLACE):
            raise InvalidArgument("a rename may exchange, or not replace; there is nothing else")
        if self._desk.resent() is None:
            rename = functools.partial(self._store.rename, replace=not flags)
            await self._change(rename, parent, name, new_parent, new_name)
        await self._moved(new_parent, new_name, parent)

    async def _moved(self, parent: int, name: bytes, old_parent: int) -> None:
        """Let the kernel list a directory anew that lies elsewhere now: what it keeps says what was above it."""
        if parent != old_parent:
            inode = await self._cold(self._store.find, parent, name)
            if inode and self._store.attr(inode).kind == Kind.DIRECTORY:
                await self._in_thread(self._desk.forget, inode)

    async def link(self, inode: int, new_parent: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        if self._desk.resent() is None:
            await self._change(self._store.link, inode, new_parent, new_name)
        return self._entry(self._store.attr(inode))

    # -- attributes -------------------------------------------------------------------------------------------

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self._store.attr(inode))

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        store = self._store
        mode = attr.st_mode & PERMISSIONS if fields.update_mode else None
        uid = attr.st_uid if fields.update_uid else None
        gid = attr.st_gid if fields.update_gid else None
        mtime_ns = attr.st_mtime_ns if fields.update_mtime else None
        if mode is None and (fields.update_uid or fields.update_gid or (fields.update_size and ctx.uid)):
            mode = self._acts.mode_without_set_id(inode)
        if fields.update_size:
            size = store.attr(inode).size
            # Where that is its size already, truncate(2) does nothing, but ftruncate(2) moves its times.
            if size != attr.st_size or fh is not None:
                cut = functools.partial(store.truncate, inode, attr.st_size, at_once=fh is None)
                await self._change_of(max(size, attr.st_size), cut)
        changes = {"mode": mode, "uid": uid, "gid": gid, "mtime_ns": mtime_ns}
        if any(value is not None for value in changes.values()):
            await self._change(functools.partial(store.set_attr, inode, **changes))
        if self._xattrs and (fields.update_uid or fields.update_gid or fields.update_size):
            await self._change(store.drop_capability, inode)
        if fields.update_atime:
            self._atimes.put(inode, attr.st_atime_ns)
        return self._entry(store.attr(inode))

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = self._store.space()
        answer = StatvfsData()
        answer.f_bsize = answer.f_frsize = space.block_size
        answer.f_blocks = space.blocks
        answer.f_bfree = space.free
        answer.f_bavail = space.available
        answer.f_files = space.images_max
        answer.f_ffree = answer.f_favail = space.images_max - space.images
        answer.f_namemax = NAME_BYTES_MAX
        return answer

    # -- extended attributes ----------------------------------------------------------------------------------

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        self._desk.expect_setxattr()
        return await self._cold(self._with_xattrs(self._store.get_xattr), inode, name)

    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return await self._cold(self._with_xattrs(self._store.list_xattrs), inode)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        if self._desk.resent() is None:
            await self._change(self._with_xattrs(self._store.set_xattr), inode, name, value)

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        if self._desk.resent() is None:
            await self._change(self._with_xattrs(self._store.remove_xattr), inode, name)

    def _with_xattrs(self, call: Callable[..., T]) -> Callable[..., T]:
        """Return *call*, unless extended attributes are off: the kernel stops asking after the first ENOSYS."""
        if not self._xattrs:
            raise FUSEError(errno.ENOSYS)
        return call

    # -- directories ------------------------------------------------------------------------------------------

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self._store.open_directory(inode)

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory, shown = directory_of(fh), False
        try:
            for listed in self._acts.listing(directory, start_id, nowait=True):
                if not self._show(listed, token):
                    return
                shown = True
        except Stale:
            if start_id < 1:
                raise
            return  # removed while it was open: nothing is in it
        except WouldBlock:
            # A short answer is an answer: the kernel comes back for the rest.
            if shown:
                return
            for listed in await self._in_thread(_first_entries, self._acts, directory, start_id):
                if not self._show(listed, token):
                    return

    async def releasedir(self, fh: int) -> None:
        pass

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.sync()
        self._store.check_directory(fh)

    # -- open images ------------------------------------------------------------------------------------------

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        done = self._desk.resent()
        inode, handle = (done.inode, done.handle) if done else await self._create(parent, name, mode, ctx)
        return FileInfo(fh=handle, keep_cache=True), self._shown(self._acts.created(inode))

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        done = self._desk.resent()
        if not stat.S_ISREG(mode):
            gid, _ = self._acts.group_in(parent, ctx.gid)
            special = functools.partial(self._store.special, parent, name, mode & ~ctx.umask, rdev, ctx.uid, gid)
            return self._entry(self._store.attr(done.inode if done else await self._change(special)))
        inode, handle = (done.inode, done.handle) if done else await self._create(parent, name, mode, ctx)
        try:
            await self._change(self._store.release, handle)
        except BadHandle:
            pass  # the worker that died had come so far
        return self._entry(self._store.attr(inode))

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        open_image = functools.partial(self._store.open_image, row=self._desk.row())
        if flags & os.O_TRUNC:
            handle = await self._change(functools.partial(open_image, inode, write=True, truncate=True))
            if ctx.uid:
                await self._drop_privileges(inode)
        elif flags & os.O_ACCMODE != os.O_RDONLY:
            handle = await self._cold(functools.partial(open_image, inode, write=True))
        else:
            handle = await self._cold(open_image, inode)
        return FileInfo(fh=handle, keep_cache=True)

    # pyfuse3 takes any buffer; a view spares a copy.
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        return await self._cold(self._store.read, fh, off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        store = self._store
        size, write = len(buf) + store.stage_bytes(fh), functools.partial(store.write, fh, off, buf)
        try:
            done = await self._change_of(size, functools.partial(write, last_try=False))
        except Spoiled:
            raise
        except StoreFull:
            await self.find_room()
            done = await self._change_of(size, write)
        await self._drop_privileges(store.handle_inode(fh))
        return done

    async def flush(self, fh: int) -> None:
        await self._commit(fh)

    async def release(self, fh: int) -> None:
        store = self._store
        try:
            if not store.may_write(fh):
                store.release(fh)
                return
        except BadHandle:
            return  # released already, by a worker that died before it could say so
        size, inode = store.flush_bytes(fh), store.handle_inode(fh)
        if not size or not store.attr(inode).nlink:
            await self._change(store.release, fh)
            return
        # It is dirty again: a mapping wrote after the last close, or that failed and this is the last try.
        parent, name = store.parent(inode), store.name(inode)
        try:
            await self._commit(fh)
        except Spoiled:
            pass  # no room helps; it is dropped at once, or who opens it next would find it so
        except StoreFull:
            await self.find_room()
        try:
            await self._change_of(size, store.release, fh)
        except ImgfsError as error:
            log.error("what was written to %r is lost: %s", name, error)
            await self._in_thread(self._desk.forget, inode)
            await self._in_thread(self._desk.forget_name, parent, name)
            raise FUSEError(error.errno) from None  # there is no other try

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._commit(fh)
        await self.sync()
        self._store.check_kept(fh)

    # -- how the store is called ------------------------------------------------------------------------------

    async def _commit(self, handle: int) -> None:
        size = self._store.flush_bytes(handle)
        if size:
            await self._change_of(size, self._store.flush, handle)

    async def _drop_privileges(self, inode: int) -> None:
        """Take from image *inode*, whose bytes were changed, what it was trusted with."""
        mode = self._acts.mode_without_set_id(inode)
        if mode is not None:
            await self._change(functools.partial(self._store.set_attr, inode, mode=mode))
        if self._xattrs and self._store.has_xattrs(inode):
            await self._change(self._store.drop_capability, inode)

    async def _create(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> tuple[int, int]:
        return await self._change(self._acts.create, parent, name, mode & ~ctx.umask, ctx.uid, ctx.gid, ctx.pid)

    # -- attributes as the kernel wants them ------------------------------------------------------------------

    def _shown(self, shown: Shown) -> EntryAttributes:
        entry = EntryAttributes() if shown.attr is None else self._entry(shown.attr)
        if shown.attr is None:
            entry.st_ino = 0
            entry.attr_timeout = shown.name_timeout_s
        entry.entry_timeout = shown.name_timeout_s
        return entry

    def _entry(self, attr: Attr) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = attr.inode
        entry.generation = attr.inode >> 32
        entry.entry_timeout = entry.attr_timeout = self._timeout_s
        entry.st_mode = mode_of(attr)
        entry.st_rdev = attr.device
        entry.st_nlink = attr.nlink
        entry.st_uid = attr.uid
        entry.st_gid = attr.gid
        entry.st_size = attr.size
        entry.st_blksize = BLOCK_BYTES
        entry.st_blocks = attr.blocks
        entry.st_atime_ns = self._atimes.get(attr.inode, attr.mtime_ns)
        entry.st_mtime_ns = attr.mtime_ns
        entry.st_ctime_ns = attr.ctime_ns
        return entry

    def _show(self, listed: Listed, token: pyfuse3.ReaddirToken) -> bool:
        """Add *listed* to the listing *token*; return False when that is full."""
        return pyfuse3.readdir_reply(token, listed.name, self._entry(listed.attr), listed.position)


def _first_entries(acts: Acts, directory: int, position: int) -> list[Listed]:
    return list(itertools.islice(acts.listing(directory, position), LISTING_BATCH))
