"""Changing the tree of a store: directories, links, whole images, renaming, deleting, attributes.

Owns the rules of what may be done to a name. Must not know FUSE.

*Concurrency:* each call takes the table's lock, checks, and appends one needle: that is its commit point.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, islice
from typing import TypeVar

from imgfs.batch import DIRECTORIES_AT_ONCE, IMAGES_AT_ONCE, NewImage
from imgfs.disk import Buffer
from imgfs.errors import (
    Exists,
    ImgfsError,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NotEmpty,
    NotFound,
    StoreFull,
    StoreLimit,
    TooLarge,
    TooManyLinks,
)
from imgfs.format import (
    FLAG_BARE,
    FLAG_LAST,
    IMAGE_BYTES_MAX,
    SYMLINK_BYTES_MAX,
    Kind,
    Needle,
    Tag,
    inode_of,
    slot_of,
    storable_ns,
)
from imgfs.layout import SLOTS_MAX, Flag, Word
from imgfs.log import SMALL_BYTES, Part
from imgfs.opening import ROOT
from imgfs.records import Record
from imgfs.view import View, check_name

T = TypeVar("T")

PERMISSIONS = 0o7777
# More names than any tool makes, fewer than the memory could count.
LINKS_MAX = 1 << 20


class Tree(View):
    """A view that can be changed."""

    def _locked(self, change: Callable[[int], T]) -> T:
        """Run *change* as the only writer, with the time of the change in ns."""
        log, memory = self._images.writer(), self._memory
        # As `with memory.lock()`, in half the time.
        memory.acquire()
        try:
            return change(log.now_ns())
        finally:
            memory.release()

    def _applied(self, inode: int) -> None:
        """Within `Memory.change`: mark the request in hand as applied where no needle does it."""
        row = self._images.writer().requester
        if row >= 0:
            self.requests.applied(row, inode)

    def _free_name(self, parent: int, name: bytes) -> None:
        """Make sure that *name* can be given in *parent*."""
        if self._directory(parent).flags & Flag.DEAD:
            raise NotFound("the directory was removed")
        if self._find_in(slot_of(parent), name)[1]:
            raise Exists(f"{name!r} is there already")

    def _new_inode(self) -> int:
        slot, generation = self._table.next_slot(self.settings.rest_slots, self._handles.in_use)
        return inode_of(slot, generation)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> int:
        """Make a directory and return its inode. Exists, NotFound, NotADirectory, NameTooLong, StoreFull."""

        def change(now_ns: int) -> int:
            self._free_name(parent, name)
            inode = self._new_inode()
            needle = Needle(Kind.DIRECTORY, inode, parent, name, 0, mode, uid, gid, mtime_ns=now_ns, ctime_ns=now_ns)
            self._images.writer().append(needle, [], answers=True)
            return inode

        return self._locked(change)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> int:
        """Make a symbolic link to *target*, up to 4,095 bytes, and return its inode. Errors as `mkdir`."""
        if len(target) > SYMLINK_BYTES_MAX:
            raise NameTooLong(f"the target of a link has at most {SYMLINK_BYTES_MAX} bytes")
        return self._put(parent, name, Kind.SYMLINK, [target], len(target), 0o777, uid, gid, None)

    def special(self, parent: int, name: bytes, mode: int, device: int, uid: int, gid: int) -> int:
        """Make a pipe, socket or device, as the type bits of *mode* say, and return its inode. Errors as `mkdir`."""

        def change(now_ns: int) -> int:
            self._free_name(parent, name)
            inode = self._new_inode()
            needle = Needle(Kind.SPECIAL, inode, parent, name, 0, mode, uid, gid, mtime_ns=now_ns, ctime_ns=now_ns)
            if device:
                needle.extras[Tag.DEVICE] = device.to_bytes(4, "little")
            self._images.writer().append(needle, [], answers=True)
            return inode

        return self._locked(change)

    def link(self, inode: int, parent: int, name: bytes) -> None:
        """Give *inode* a further name.

        Raises:
            IsADirectory: only what is no directory can have several.
            TooManyLinks: it has 1,048,576 names.
            Stale: it is gone.
            Exists, NotFound, NotADirectory, NameTooLong, StoreFull: as `mkdir`.
        """

        def change(now_ns: int) -> None:
            record = self._images.record(inode)
            if record.kind == Kind.DIRECTORY:
                raise IsADirectory("a directory has only one name")
            self._free_name(parent, name)
            if record.flags & Flag.DEAD:
                raise NotFound("it has lost its last name")
            if self._table.names(slot_of(inode), record) >= LINKS_MAX:
                raise TooManyLinks(f"an image has at most {LINKS_MAX} names")
            self._give_birth(inode, record)
            extras: dict[int, bytes] = {Tag.TARGET: inode.to_bytes(8, "little")}
            needle = Needle(Kind.LINK, self._new_inode(), parent, name, ctime_ns=now_ns, extras=extras)
            self._images.writer().append(needle, [], answers=True)

        self._locked(change)

    def _give_birth(self, inode: int, record: Record) -> None:
        """Make sure that a needle names *inode*: others are about to refer to it."""
        if record.flags & Flag.UNBORN:
            self._images.commit(inode)

    def put(
        self,
        parent: int,
        name: bytes,
        data: Buffer | Iterable[Buffer],
        size: int,
        *,
        mode: int,
        uid: int,
        gid: int,
        mtime_ns: int,
    ) -> int:
        """Store a whole image of *size* bytes in one append, in place of what had the name; return its inode.

        *data* is the bytes, or yields them in pieces. Raises IsADirectory if a directory has the name, TooLarge, and
        as `mkdir`.
        """
        pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        return self._put(parent, name, Kind.FILE, pieces, size, mode, uid, gid, mtime_ns)

    def put_new(self, images: Sequence[NewImage]) -> int:
        """Store the first of *images*, at least one, as `put` does, many in one append; return how many.

        They are all in the store then, in that order, or, where this raises, none is.

        Raises:
            As `put`.
        """

        def change(_: int) -> int:
            words, count = self._memory.words, 0
            # Slots that rested long enough are taken one by one, as their turn comes.
            if words[Word.FREE_COUNT] <= self.settings.rest_slots:
                count = self._free_among(images[: min(IMAGES_AT_ONCE, SLOTS_MAX - words[Word.SLOTS])])
            if count:
                try:
                    count = self._images.writer().append_images(images[:count], words[Word.SLOTS])
                except (StoreFull, StoreLimit):
                    count = 0  # one may still go in
            if not count:
                parent, name, data, uid, gid, mode, mtime_ns = images[0]
                self.put(parent, name, data, len(data), mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns)
            return max(1, count)

        return self._locked(change)

    def _free_among(self, images: Sequence[NewImage]) -> int:
        """Return how many of *images* come before the first that needs more than an append of many can do."""
        names: set[tuple[int, bytes]] = set()
        free = 0
        for parent, group in islice(groupby(images, lambda image: image.parent), DIRECTORIES_AT_ONCE):
            wanted = list(group)
            count = self._free_in(parent, wanted, names)
            free += count
            if count < len(wanted):
                break
        return free

    def _free_in(self, parent: int, images: Sequence[NewImage], names: set[tuple[int, bytes]]) -> int:
        """As `_free_among` of *images* that are all to be in *parent*; *names* are those of images before them."""
        hashes = []
        try:
            if self._directory(parent).flags & Flag.DEAD:
                return 0
            for image in images:
                check_name(image.name)
                key = parent, image.name
                if key in names or len(image.data) > SMALL_BYTES:
                    break
                names.add(key)
                hashes.append(self._table.hash(image.name))
        except ImgfsError:
            pass  # told when it is put
        count = 0
        while count < len(hashes):
            count += self._table.buckets.first_known(slot_of(parent), hashes[count:])
            if count < len(hashes):
                if self._find(parent, images[count].name)[1]:
                    break
                count += 1  # another name with that hash
        return count

    def _put(
        self,
        parent: int,
        name: bytes,
        kind: Kind,
        pieces: Iterable[Buffer],
        size: int,
        mode: int,
        uid: int,
        gid: int,
        mtime_ns: int | None,
    ) -> int:
        if size > IMAGE_BYTES_MAX:
            raise TooLarge("an image has at most 4 GiB - 1 bytes")

        def change(now_ns: int) -> int:
            own = parent, name
            try:
                self._free_name(parent, name)
                inode = self._new_inode()
            except Exists:
                if kind != Kind.FILE:
                    raise
                _, inode = self._lookup(parent, name)
                old = self._images.record(inode)
                if old.kind == Kind.DIRECTORY:
                    raise IsADirectory(f"{name!r} is a directory") from None
                own = self._images.own_name(inode, old)
            time_ns = now_ns if mtime_ns is None else storable_ns(mtime_ns)
            needle = Needle(kind, inode, *own, size, mode, uid, gid, mtime_ns=time_ns, ctime_ns=now_ns)
            if size <= SMALL_BYTES:
                buffers = [piece for piece in pieces if len(piece)]
                if sum(map(len, buffers)) != size:
                    raise InvalidArgument(f"the data of {name!r} has not the {size} bytes it was said to have")
                self._images.writer().append(needle, buffers, answers=True)
            else:
                self._images.writer().append(needle, [], large=pieces, answers=True)
            self._images.drop_staged(inode)
            return inode

        return self._locked(change)

    def _unlink(self, entry: int, inode: int, aim: Record, now_ns: int) -> None:
        """Take the name *entry* of *inode*, which is whatever its record *aim* says, out of its directory."""
        record = aim if entry == inode else self._images.record(entry)
        if record.flags & Flag.UNBORN:
            with self._memory.change():
                self._table.delete_unborn(slot_of(entry), now_ns)
                self._applied(inode)
        else:
            flags, extras = self._farewell(entry, inode, aim)
            parent = inode_of(record.parent - 1, self._table.record(record.parent - 1).generation)
            needle = Needle(Kind.DELETE, entry, parent, ctime_ns=now_ns, flags=flags, extras=extras)
            self._images.writer().append(needle, [], answers=True)
        self._images.end_staging(inode)

    def _farewell(self, entry: int, inode: int, record: Record) -> tuple[int, dict[int, bytes]]:
        """Return the flags and extra fields of a needle that takes away the name *entry* of *inode*, with *record*."""
        if record.kind == Kind.DIRECTORY:
            return 0, {}
        names = self._table.names(slot_of(inode), record)
        if entry != inode:
            return FLAG_LAST if names == 1 else 0, {Tag.TARGET: inode.to_bytes(8, "little")}
        return FLAG_BARE if names > 1 else 0, {}

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove an image or a link; who has it open can go on reading. NotFound, IsADirectory."""

        def change(now_ns: int) -> None:
            entry, inode = self._lookup(parent, name)
            record = self._images.record(inode)
            if record.kind == Kind.DIRECTORY:
                raise IsADirectory(f"{name!r} is a directory")
            self._unlink(entry, inode, record, now_ns)

        self._locked(change)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory. NotFound, NotADirectory, NotEmpty."""

        def change(now_ns: int) -> None:
            _, inode = self._lookup(parent, name)
            self._check_empty(inode)
            self._unlink(inode, inode, self._images.record(inode), now_ns)

        self._locked(change)

    def _check_empty(self, directory: int) -> None:
        self._directory(directory)
        if self._table.buckets.children(slot_of(directory)):
            raise NotEmpty("the directory is not empty")

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, replace: bool = True) -> None:
        """Give an entry another name, in one step; what had that name is gone, unless *replace* is false: Exists.

        Raises:
            NotFound, NotADirectory, IsADirectory, NotEmpty, NameTooLong: as rename(2).
            InvalidArgument: a directory into itself.
        """

        def change(now_ns: int) -> None:
            entry, inode = self._lookup(parent, name)
            record = self._images.record(inode)
            if self._directory(new_parent).flags & Flag.DEAD:
                raise NotFound("the directory was removed")
            if record.kind == Kind.DIRECTORY:
                self._check_not_inside(new_parent, inode)
            flags = 0
            extras: dict[int, bytes] = {}
            try:
                replaced, target = self._lookup(new_parent, new_name)
            except NotFound:
                target = 0
            if target:
                if not replace:
                    raise Exists(f"{new_name!r} is there already")
                if target == inode:
                    return  # two names of one image stay, as rename(2) says
                self._check_replaceable(record, target)
                self._give_birth(target, self._images.record(target))
                flags, extras = self._farewell(replaced, target, self._images.record(target))
                extras[Tag.REPLACED] = replaced.to_bytes(8, "little")
            self._give_birth(inode, record)
            extras[Tag.OLD_PARENT] = parent.to_bytes(8, "little")
            needle = Needle(Kind.RENAME, entry, new_parent, new_name, ctime_ns=now_ns, flags=flags, extras=extras)
            self._images.writer().append(needle, [], answers=True)
            if target:
                self._images.end_staging(target)

        self._locked(change)

    def exchange(self, parent: int, name: bytes, other_parent: int, other_name: bytes) -> None:
        """Let two entries swap their names, in one step, as renameat2(2) with RENAME_EXCHANGE.

        Raises:
            NotFound, NotADirectory, NameTooLong: as the names say.
            InvalidArgument: one of them lies in the other.
        """

        def change(now_ns: int) -> None:
            (first, inode), (second, other) = self._lookup(parent, name), self._lookup(other_parent, other_name)
            if inode == other:
                return
            for target, directory in ((inode, other_parent), (other, parent)):
                if self._images.record(target).kind == Kind.DIRECTORY:
                    self._check_not_inside(directory, target)
            for target in (inode, other):
                self._give_birth(target, self._images.record(target))
            needles = []
            for entry, old, new_parent, new_name in (
                (first, parent, other_parent, other_name),
                (second, other_parent, parent, name),
            ):
                extras: dict[int, bytes] = {Tag.OLD_PARENT: old.to_bytes(8, "little")}
                needles.append(Needle(Kind.RENAME, entry, new_parent, new_name, ctime_ns=now_ns, extras=extras))
            self._images.writer().append(needles[0], [], second=Part(needles[1]), answers=True)

        self._locked(change)

    def _check_not_inside(self, directory: int, inode: int) -> None:
        while True:
            if directory == inode:
                raise InvalidArgument("a directory cannot be moved into itself")
            if directory == ROOT:
                return
            directory = self.parent(directory)

    def _check_replaceable(self, record: Record, target: int) -> None:
        if record.kind == Kind.DIRECTORY:
            self._check_empty(target)
        elif self._images.record(target).kind == Kind.DIRECTORY:
            raise IsADirectory("a directory cannot be replaced by an image")

    def set_attr(
        self,
        inode: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """Change permission bits, owner, group or time. Stale.

        The time of a dirty image joins the needle of its flush: the old bytes must not get it. So does all else of
        an image that has no needle yet.
        """

        def change(now_ns: int) -> None:
            attr = self.attr(inode)
            time_ns = None if mtime_ns is None else storable_ns(mtime_ns)
            owner = (
                attr.uid if uid is None else uid,
                attr.gid if gid is None else gid,
                attr.mode if mode is None else attr.mode & ~PERMISSIONS | mode,
            )
            record = self._images.record(inode)
            staged = self._images.staged(inode)
            dirty = staged is not None and (staged.dirty or bool(record.flags & Flag.UNBORN))
            if dirty:
                self._images.set_staged(inode, owner=self._owner_index(*owner), mtime_ns=time_ns)
                if record.flags & Flag.UNBORN or (mode is None and uid is None and gid is None):
                    return
            needle = Needle(
                Kind.ATTRIBUTES,
                inode,
                mode=owner[2],
                uid=owner[0],
                gid=owner[1],
                mtime_ns=record.mtime_ns if dirty or time_ns is None else time_ns,
                ctime_ns=now_ns,
            )
            if record.flags & Flag.DEAD:
                # Nobody finds it after a crash, so no needle is due.
                index = self._owner_index(*owner)
                with self._memory.change():
                    self._table.set_attributes(slot_of(inode), index, needle.mtime_ns, now_ns)
            else:
                self._images.writer().append(needle, [])
            if staged is not None and not dirty:
                self._images.set_staged(inode, owner=self._table.record(slot_of(inode)).owner, mtime_ns=time_ns)

        self._locked(change)

    def _owner_index(self, uid: int, gid: int, mode: int) -> int:
        """Return the number of an owner that a needle will define when one uses it."""
        index = self._table.owner_index(uid, gid, mode)
        if index >= self._memory.words[Word.OWNERS] or self._table.owner(index) != (uid, gid, mode):
            with self._memory.change():
                self._table.define_owner(index, uid, gid, mode, -1)
        return index

    def sync(self) -> None:
        """Make everything durable that returned before the call.

        Raises:
            DiskFailure: the disk lost data that it had taken; the store takes no more changes.
        """
        self._images.writer().sync()

    def sync_for(self, asked: Callable[[], int]) -> int:
        """As `sync`; *asked* counts who wants it, each for what returned before. Return how many of them are served.

        These may be more than had asked when it was called: another process may sync for long.
        """
        return self._images.writer().sync_for(asked)
