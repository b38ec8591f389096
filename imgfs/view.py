"""Looking at a store: names, attributes, listings, places; nothing here changes anything.

Owns no state. Must not know FUSE, nor how an image is written.

*Concurrency:* no lock is taken: what is read from the table is read again if a writer was at work meanwhile. A call
that may have to wait for the disk takes `nowait=True` and then raises `WouldBlock` instead.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from imgfs.disk import Buffer, Disk
from imgfs.errors import InvalidArgument, IsADirectory, NameTooLong, NotADirectory, NotFound, Stale
from imgfs.format import ALIGNMENT, NAME_BYTES_MAX, Kind, footer_bytes, inode_of, slot_of
from imgfs.giving import Giving
from imgfs.handles import WRITE, Handles
from imgfs.image_reading import Seen
from imgfs.images import Images
from imgfs.layout import SLOTS_MAX, SUBDIRECTORIES_MANY, Flag, Word
from imgfs.listing import Listing, Page
from imgfs.load import links_of, live_bytes
from imgfs.opening import ROOT, STAGING, Opened
from imgfs.records import Record
from imgfs.requests import NOBODY, Requests
from imgfs.staging import DIRTY, Staging

# Plain numbers and a list: names of an enum take as long as a call, making one of a number five times as long.
_KIND, _DIRECTORY, _SPECIAL = Flag.KIND, int(Kind.DIRECTORY), int(Kind.SPECIAL)
_KINDS = tuple(Kind)
_SECOND_NS = 1_000_000_000  # records keep no more of a ctime
# At lookup the disk is asked for at most so much of an image.
_PREFETCH_BYTES = 2 << 20


class Attr(NamedTuple):
    """What `stat` tells of an inode."""

    inode: int
    kind: Kind
    mode: int  # permission bits; of a special file also those of its type
    uid: int
    gid: int
    nlink: int
    size: int
    mtime_ns: int
    ctime_ns: int
    blocks: int  # of 512 bytes
    device: int  # number of a device, as makedev(3) makes it, 32 bits


class Entry(NamedTuple):
    """A row of a listing; *key* is its position, above 0 and below 2**56, and stays whatever else changes."""

    key: int
    inode: int
    name: bytes


class Location(NamedTuple):
    """Where an image lies, in bytes from the start of the volume."""

    volume: int
    offset: int
    data_offset: int
    size: int
    checksum: int  # CRC-32C of the data


class Spot(NamedTuple):
    """Where the table says that an image lies, whether or not it is whole there."""

    volume: int
    offset: int
    size: int


class Space(NamedTuple):
    """What the file system below has, in blocks."""

    block_size: int
    blocks: int
    free: int
    available: int
    images: int
    images_max: int


class Counts(NamedTuple):
    """What is in the store."""

    images: int
    directories: int
    symlinks: int
    volumes: int
    volume_bytes: int
    """How long the volumes are, holes included."""
    disk_bytes: int
    """What they take of the disk."""
    live_bytes: int
    memory_bytes: int


class View:
    """The names and attributes of an open store."""

    def __init__(self, path: str, disk: Disk, parts: Opened) -> None:
        self.path = path
        self.writable = parts.log is not None
        self.settings = parts.settings
        self.superblock = parts.superblock
        self.report = parts.report
        self._disk = disk
        self._table = parts.table
        self._memory = parts.table.memory
        self._volumes = parts.volumes
        self._handles = Handles(self._memory)
        self.requests = Requests(self._memory, self._handles)
        self._staging = Staging(disk, f"{path}/{STAGING}", self._memory)
        self._giving: Giving | None = None
        self._images = Images(self._table, self._volumes, self._handles, self._staging, parts.log)
        self._listing = Listing(self._table, self._volumes)

    def lookup(self, parent: int, name: bytes, *, nowait: bool = False) -> int:
        """Return the inode of *name* in the directory *parent*.

        Raises:
            NotFound, NotADirectory, NameTooLong, Stale: as the names say.
            WouldBlock: *nowait* is set and the name is not in memory.
        """
        inode = self.find(parent, name, nowait=nowait)
        if not inode:
            raise NotFound(f"no entry {name!r}")
        return inode

    def find(self, parent: int, name: bytes, *, nowait: bool = False) -> int:
        """Return the inode of *name* in the directory *parent*, 0 if there is none; else as `lookup`."""
        return self._memory.consistent(lambda: self._find(parent, name, nowait=nowait)[1])

    def _lookup(self, parent: int, name: bytes, *, nowait: bool = False) -> tuple[int, int]:
        """Return (inode of the entry, inode it names): the same, unless it is a link. As `lookup`."""
        found = self._find(parent, name, nowait=nowait)
        if not found[1]:
            raise NotFound(f"no entry {name!r}")
        return found

    def _find(self, parent: int, name: bytes, *, nowait: bool = False) -> tuple[int, int]:
        """As `_lookup`; zeros if there is no such name."""
        self._directory(parent)
        return self._find_in(slot_of(parent), name, nowait=nowait)

    def _find_in(self, directory: int, name: bytes, *, nowait: bool = False) -> tuple[int, int]:
        """As `_find`, in the slot *directory*, which is known to be one."""
        check_name(name)
        for slot in self._table.buckets.find(directory, self._table.hash(name)):
            record = self._table.record(slot)
            if self._name(slot, record, nowait=nowait) == name:
                entry = inode_of(slot, record.generation)
                return entry, self._table.target(slot, record) if record.kind == Kind.LINK else entry
        return 0, 0

    def _directory(self, inode: int) -> Record:
        record = self._images.record(inode)
        if record.flags & _KIND != _DIRECTORY:
            raise NotADirectory(f"inode {inode:#x} is no directory")
        return record

    def _name(self, slot: int, record: Record, *, nowait: bool = False) -> bytes:
        if record.flags & Flag.UNBORN:
            staged = self._images.staged(inode_of(slot, record.generation))
            return staged.name if staged is not None else b""
        if not record.name_offset:
            return b""
        return self._volumes.get(record.name_volume).names.get(record.name_offset, nowait=nowait)

    def open_directory(self, inode: int) -> int:
        """Return a handle on the directory *inode*, which needs no release."""
        return self._handles.open_directory(inode)

    def check_directory(self, handle: int) -> None:
        """Raise DiskFailure if a sync has failed since `open_directory` gave *handle* out: changes may be lost."""
        self._handles.check_directory(handle)

    def attr(self, inode: int) -> Attr:
        """Return what is known of *inode*; it may be unlinked, and then has no links.

        Raises:
            Stale: it is gone.
        """
        record = self._images.record(inode)
        owner, size, mtime_ns, ctime_ns = record.owner, record.size, record.mtime_ns, record.ctime_s * _SECOND_NS
        flags = record.flags
        kind = _KINDS[flags & _KIND]
        nlink, device = 0 if flags & Flag.DEAD else 1, 0
        if flags & Flag.LINKED and kind != _DIRECTORY:
            nlink = self._memory.consistent(lambda: self._table.names(slot_of(inode), record))
        if flags & Flag.STAGED:
            staged = self._images.staged_state(inode)
            if staged is not None and staged.flags & DIRTY:
                _, owner, size, mtime_ns, ctime_ns = staged
                ctime_ns = ctime_ns // _SECOND_NS * _SECOND_NS
        elif kind == _DIRECTORY:
            size = 0
            if nlink:
                nlink = 1 if record.volume == SUBDIRECTORIES_MANY else 2 + record.volume
        elif kind == _SPECIAL:
            size, device = 0, size
        uid, gid, mode = self._table.owner(owner)
        return Attr(inode, kind, mode, uid, gid, nlink, size, mtime_ns, ctime_ns, -(-size // 512), device)

    def owner(self, inode: int) -> tuple[int, int, int]:
        """Return (uid, gid, mode) of *inode*, as `attr` does. Stale."""
        record = self._images.record(inode)
        staged = self._images.staged_state(inode) if record.flags & Flag.STAGED else None
        return self._table.owner(staged.owner if staged is not None and staged.flags & DIRTY else record.owner)

    def about_to_write(self, handle: int) -> tuple[int, int, int]:
        """Return of a *handle* its inode, the mode of that, and how many bytes the next `write` would copy first.

        Those of an image that is not being written yet. BadHandle, Stale.
        """
        inode, _ = self._handles.get(handle)
        record = self._images.record(inode)
        staged = self._images.staged_state(inode) if record.flags & Flag.STAGED else None
        owner = staged.owner if staged is not None and staged.flags & DIRTY else record.owner
        return inode, self._table.owner(owner)[2], record.size if staged is None else 0

    def any_rare(self) -> bool:
        """Return whether any inode has several names, or extended attributes; if not, nobody need look for them."""
        return self._memory.words[Word.RARE_COUNT] > 0

    def list(self, directory: int, after: int = 0, *, nowait: bool = False) -> Iterator[Entry]:
        """Yield the entries of *directory* whose key is above *after*, in order of their keys.

        What is added or removed meanwhile may or may not come; all else comes once. `.` and `..` do not.

        Raises:
            NotADirectory, Stale: as the names say.
            WouldBlock: *nowait* is set and a name is not in memory.
        """
        while True:
            rows = self._memory.consistent(lambda start=after: self._list(directory, start, nowait=nowait))  # type: ignore[misc]
            if not rows:
                return
            yield from rows
            after = rows[-1].key

    def _list(self, directory: int, after: int, *, nowait: bool) -> Sequence[Entry]:
        record = self._directory(directory)
        if record.flags & Flag.DEAD:
            return []
        rows = []
        for key, slot in self._table.buckets.after(slot_of(directory), after):
            child = self._table.record(slot)
            rows.append(Entry(key, self._table.target(slot, child), self._name(slot, child, nowait=nowait)))
        return rows

    def page(self, directory: int, after: int, count: int, *, nowait: bool = False) -> Page | None:
        """Return some *count* entries as `list` yields them, and what `attr` tells of each; none at the end.

        None where they have to be listed one by one. Errors as `list`.
        """
        if self._directory(directory).flags & Flag.DEAD:
            return None
        page = self._listing.page(slot_of(directory), after, count, nowait=nowait)
        self._directory(directory)  # still: it was not another's slot meanwhile
        return page

    def is_unchanged(self, counter: int) -> bool:
        """Return whether nothing in the table has changed since `Page.counter`."""
        return self._memory.words[Word.COUNTER] == counter

    def forget_listings(self) -> bool:
        """Free what `page` keeps of directories that were not listed since this was called last; if all, say so."""
        return self._listing.forget()

    def parent(self, inode: int) -> int:
        """Return the directory that *inode* lies in, of several one; the root lies in itself."""
        _, record = self._naming(inode)
        return inode_of(record.parent - 1, self._table.whole_record(record.parent - 1).generation)

    def name(self, inode: int) -> bytes:
        """Return the name of *inode* in that directory."""
        return self._memory.consistent(lambda: self._name(*self._naming(inode)))

    def path_of(self, inode: int) -> bytes:
        """Return the path of *inode* from the top of the store, of several one. Stale; Damaged where a name is lost."""
        names: list[bytes] = []
        while inode != ROOT:
            names.append(self.name(inode))
            inode = self.parent(inode)
        return b"/".join(reversed(names))

    def inode_in(self, slot: int) -> int:
        """Return the inode that has *slot*, or had it last."""
        return inode_of(slot, self._table.whole_record(slot).generation)

    def is_there(self, inode: int) -> bool:
        """Return whether *inode*, which may be any number, has a name."""
        if not 0 <= slot_of(inode) < self._memory.words[Word.SLOTS]:
            return False
        try:
            return self._images.record(inode).live
        except Stale:
            return False

    def _naming(self, inode: int) -> tuple[int, Record]:
        """Return slot and record of what names *inode*: its own, or a link's if only links are left."""
        slot, record = slot_of(inode), self._images.record(inode)
        if not record.parent:
            for link in links_of(self._memory, slot):
                return link, self._table.whole_record(link)
        return slot, record

    def readlink(self, inode: int, *, nowait: bool = False) -> bytes:
        """Return the target of a symbolic link.

        Raises:
            InvalidArgument: it is none.
            Damaged, Stale, WouldBlock: as `open_image`.
        """
        record = self._images.record(inode)
        if record.kind != Kind.SYMLINK:
            raise InvalidArgument(f"inode {inode:#x} is no symbolic link")
        return bytes(self._images.whole(inode, record, nowait=nowait).data or b"")

    def resolve(self, path: bytes) -> int:
        """Return the inode at *path*, names between slashes from the root; links are not followed."""
        inode = ROOT
        for name in path.split(b"/"):
            if name not in (b"", b"."):
                inode = self.lookup(inode, name)
        return inode

    def locate(self, inode: int) -> Location:
        """Return where the last flushed bytes of the image *inode* lie.

        Raises:
            IsADirectory, Stale: as the names say.
            NotFound: no needle holds it yet.
            Damaged: its bytes are not those that were written.
        """
        record = self._images.record(inode)
        if record.kind == Kind.DIRECTORY:
            raise IsADirectory("a directory has no bytes of its own")
        if record.flags & Flag.UNBORN:
            raise NotFound("this image is being written for the first time")
        whole = self._images.whole(inode, record)
        volume_id = self._table.volume(record.volume).volume_id
        return Location(volume_id, whole.offset, whole.offset + whole.needle.data_start, record.size, whole.sums.data)

    def spot(self, inode: int) -> Spot:
        """Return where the last flushed bytes of *inode* should lie; nothing is verified.

        Raises:
            IsADirectory, Stale: as the names say.
            InvalidArgument: it is something without bytes.
            NotFound: no needle holds it yet.
        """
        record = self._images.record(inode)
        if record.kind == Kind.DIRECTORY:
            raise IsADirectory("a directory has no bytes of its own")
        if record.kind not in (Kind.FILE, Kind.SYMLINK):
            raise InvalidArgument("this has no bytes: it is neither an image nor a symbolic link")
        if record.flags & Flag.UNBORN:
            raise NotFound("this image is being written for the first time")
        return Spot(self._table.volume(record.volume).volume_id, record.offset8 * ALIGNMENT, record.size)

    def prefetch(self, inode: int) -> None:
        """Let the disk start to read the image *inode*; nothing happens if it has no bytes."""
        record = self._table.whole_record(slot_of(inode))
        if record.kind == Kind.FILE and not record.flags & (Flag.STAGED | Flag.UNBORN):
            size = min(record.size + footer_bytes(record.size), _PREFETCH_BYTES)
            self._volumes.get(record.volume).volume.prefetch(record.offset8 * ALIGNMENT, size)

    def see(self, inode: int) -> Seen | None:
        """Return the image *inode*, verified; None: `open_image` knows more. WouldBlock."""
        return self._images.see(inode)

    def take_handle(self, inode: int, *, write: bool = False, nowait: bool = False, row: int = NOBODY) -> int:
        """Return a handle on *inode*, which was verified; as `Store.open_image`."""
        note = functools.partial(self.requests.opened, row) if row >= 0 else None
        handle = self._handles.open(inode, WRITE if write else 0, note, nowait=nowait)
        try:
            # The slot may have been given away between the two; from here on the handle keeps it.
            if self._images.record(inode).kind == Kind.DIRECTORY:
                raise IsADirectory("a directory has no bytes to read")
            if write or (self._giving is not None and self._giving.is_giving(inode)):
                self._memory.pass_through(nowait=nowait)
        except BaseException:
            self._handles.release(handle)
            raise
        return handle

    def giving(self, shared: memoryview, tell: Callable[[int, Buffer], None]) -> Giving:
        """Return what gives the kernel images that are opened; arguments as Giving."""
        self._giving = Giving(self._memory, self._handles, self._images, shared, tell)
        return self._giving

    def space(self) -> Space:
        """Return the true numbers of the file system the store lies on."""
        below = self._disk.space(self.path)
        words = self._memory.words
        images = words[Word.FILES] + words[Word.DIRECTORIES] + words[Word.SYMLINKS]
        return Space(below.f_frsize, below.f_blocks, below.f_bfree, below.f_bavail, images, SLOTS_MAX)

    @property
    def last_sequence(self) -> int:
        """The sequence number of the last needle."""
        return self._memory.words[Word.NEXT_SEQUENCE] - 1

    def counts(self) -> Counts:
        """Return what is in the store."""
        words = self._memory.words
        rows = self._volumes.rows()
        sizes = [
            words[Word.ACTIVE_END] if self.writable and row == words[Word.ACTIVE] else self._table.volume(row).end
            for row in rows
        ]
        return Counts(
            words[Word.FILES],
            words[Word.DIRECTORIES],
            words[Word.SYMLINKS],
            len(rows),
            sum(sizes),
            sum(self._volumes.get(row).volume.allocated_bytes() for row in rows),
            int(live_bytes(self._memory)[1].sum()),
            self._memory.resident_bytes(),
        )


def check_name(name: bytes) -> None:
    """Make sure that *name* can be that of an entry: NameTooLong, InvalidArgument."""
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLong(f"a name has at most {NAME_BYTES_MAX} bytes")
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise InvalidArgument(f"{name!r} cannot be the name of an entry")
