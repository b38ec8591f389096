"""Extended attributes: those that people set, and those that tell where an image lies.

Owns which names there are and how much an inode may have. All attributes of an inode lie in one needle, which a
change writes anew. Must not know FUSE, nor who may see which names: that is the kernel's.

*Concurrency:* as view.py and tree.py.
"""

from collections.abc import Callable

from imgfs.disk import WouldBlock
from imgfs.errors import Damaged, DiskFailure, InvalidArgument, NameTooLong, NoAttribute, NotSupported, StoreFull
from imgfs.format import NAME_BYTES_MAX, Kind, Needle, pack_xattrs, slot_of, unpack_xattrs
from imgfs.layout import Flag
from imgfs.tree import Tree

# What the kernel hands on: `system.` is access control lists, which nobody here would enforce.
SPACES = (b"user.", b"trusted.", b"security.")
OURS = b"user.imgfs."
VALUE_BYTES_MAX = 64 << 10  # XATTR_SIZE_MAX of the kernel
NAMES_BYTES_MAX = 64 << 10  # XATTR_LIST_MAX
ALL_BYTES_MAX = 1 << 20
CAPABILITY = b"security.capability"
_MIME_BYTES = 4096
_UNKNOWN = "application/octet-stream"


class Xattrs(Tree):
    """A tree whose inodes have extended attributes."""

    def get_xattr(self, inode: int, name: bytes, *, nowait: bool = False) -> bytes:
        """Return the value of attribute *name*; of `user.imgfs.` there are checksum, volume, offset and mime_type.

        Raises:
            NoAttribute: there is none.
            NotSupported: nothing of that kind is kept.
            Stale, Damaged: as the names say; Damaged also where an image's own bytes are asked for.
            WouldBlock: *nowait* is set and the disk is needed.
        """
        _check_space(name)
        if name.startswith(OURS):
            if nowait:
                raise WouldBlock
            return self._told(inode, name).encode()
        try:
            return self._xattrs(inode, nowait=nowait)[name]
        except KeyError:
            raise NoAttribute(f"no attribute {name!r}") from None

    def list_xattrs(self, inode: int, *, nowait: bool = False) -> list[bytes]:
        """Return the names of the attributes that were set: what a copy takes along. Errors as `get_xattr`."""
        return list(self._xattrs(inode, nowait=nowait))

    def set_xattr(self, inode: int, name: bytes, value: bytes) -> None:
        """Set attribute *name* to *value*, at most 64 KiB.

        Raises:
            InvalidArgument: it is one of `user.imgfs.`, or too long.
            NotSupported, NameTooLong, Stale: as the names say.
            StoreFull: no room on the disk, or more than 1 MiB of attributes, or 64 KiB of their names.
        """
        _check_space(name)
        if name.startswith(OURS):
            raise InvalidArgument(f"{name!r} cannot be set")
        if len(name) > NAME_BYTES_MAX:
            raise NameTooLong(f"the name of an attribute has at most {NAME_BYTES_MAX} bytes")
        if len(value) > VALUE_BYTES_MAX:
            raise InvalidArgument(f"an attribute has at most {VALUE_BYTES_MAX} bytes")

        def change(attributes: dict[bytes, bytes]) -> bool:
            if attributes.get(name) == value:
                return False
            attributes[name] = value
            names = sum(len(each) + 1 for each in attributes)
            if names > NAMES_BYTES_MAX or len(pack_xattrs(attributes)) > ALL_BYTES_MAX:
                raise StoreFull("no room for more extended attributes of this image")
            return True

        self._change_xattrs(inode, change)

    def remove_xattr(self, inode: int, name: bytes) -> None:
        """Remove attribute *name*. Errors as `get_xattr` and `set_xattr`."""
        _check_space(name)
        if name.startswith(OURS):
            raise InvalidArgument(f"{name!r} cannot be removed")

        def change(attributes: dict[bytes, bytes]) -> bool:
            if name not in attributes:
                raise NoAttribute(f"no attribute {name!r}")
            del attributes[name]
            return True

        self._change_xattrs(inode, change)

    def drop_capability(self, inode: int) -> None:
        """Take away what makes a program privileged, for its bytes or its owner changed."""
        try:
            privileged = CAPABILITY in self._xattrs(inode)
        except Damaged:
            return  # nobody gets it any more
        if privileged:
            self.remove_xattr(inode, CAPABILITY)

    def has_xattrs(self, inode: int) -> bool:
        """Return whether *inode* may have attributes. Stale."""
        record = self._images.record(inode)
        if record.flags & Flag.UNBORN:
            return True
        entry = self._memory.consistent(lambda: self._table.rare.get(slot_of(inode), record.generation))
        return entry.volume >= 0

    def _change_xattrs(self, inode: int, change: Callable[[dict[bytes, bytes]], bool]) -> None:
        """Let *change* change the attributes of *inode*, and write them down if it returns true."""

        def write(now_ns: int) -> None:
            try:
                attributes = self._xattrs(inode)
            except Damaged:
                attributes = {}  # they are lost; what is set now is not
            if not change(attributes):
                return
            data = pack_xattrs(attributes)
            if self._images.record(inode).flags & Flag.UNBORN:
                number = self._staging.find(inode)
                state = self._staging.write_attributes(number, data)
                with self._memory.change():
                    self._staging.put(number, state)
                    self._applied(inode)
            else:
                needle = Needle(Kind.XATTR, inode, data_size=len(data), ctime_ns=now_ns)
                self._images.writer().append(needle, [data] if data else [], answers=True)
            if self._images.staged(inode) is not None:
                self._images.set_staged(inode)

        self._locked(write)

    def _xattrs(self, inode: int, *, nowait: bool = False) -> dict[bytes, bytes]:
        """Return the attributes of *inode* that were set."""
        record = self._images.record(inode)
        while record.flags & Flag.UNBORN:
            try:
                waiting = self._images.waiting_attributes(inode)
            except DiskFailure:
                if self._images.record(inode).flags & Flag.UNBORN:
                    raise
                waiting = b""
            before, record = record, self._images.record(inode)
            if record == before:
                return unpack_xattrs(waiting)
        entry = self._memory.consistent(lambda: self._table.rare.get(slot_of(inode), record.generation))
        if entry.volume < 0:
            return {}
        place = record._replace(flags=Kind.XATTR, volume=entry.volume, offset8=entry.offset8, size=entry.size)
        whole = self._images.whole(inode, place, nowait=nowait)
        if whole.data is None:
            raise Damaged(f"inode {inode:#x} has more extended attributes than there can be")
        return unpack_xattrs(whole.data)

    def _told(self, inode: int, name: bytes) -> str:
        """Return what attribute *name* of ours tells of the image *inode*."""
        if self.attr(inode).kind == Kind.FILE:
            match name.removeprefix(OURS):
                case b"checksum":
                    return f"crc32c:{self.locate(inode).checksum:08x}"
                case b"volume":
                    return str(self.locate(inode).volume)
                case b"offset":
                    return str(self.locate(inode).data_offset)
                case b"mime_type":
                    return _mime_type(bytes(self._images.read(inode, 0, _MIME_BYTES)))
        raise NoAttribute(f"no attribute {name!r}")


def _mime_type(data: bytes) -> str:
    """Return what kind of image *data*, the beginning of one, is."""
    import puremagic  # reads its tables, which nobody else needs

    try:
        return puremagic.from_string(data, mime=True) or _UNKNOWN
    except (ValueError, puremagic.PureError):
        return _UNKNOWN


def _check_space(name: bytes) -> None:
    if not name.startswith(SPACES):
        raise NotSupported(f"{name!r} is no attribute that is kept: only those of user, trusted and security are")
    if name in SPACES:
        raise InvalidArgument("an attribute needs a name behind the dot")
