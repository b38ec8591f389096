"""The bytes of answers that are given past pyfuse3: entries, attributes, open images, data.

Owns their structs (include/uapi/linux/fuse.h). Must not know which request they answer.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.acts import BLOCK_BYTES, Listed, mode_of, modes_of
from imgfs.atimes import AccessTimes
from imgfs.disk import Buffer
from imgfs.format import Kind
from imgfs.listing import LINE_STEP, Numbers, Page
from imgfs.view import Attr
from imgfs.wire import OUT_HEADER

# What an answer consists of, written as one.
Reply = tuple[Buffer, ...]

KEEP_CACHE = 1 << 1
# The kernel keeps a listing until the directory changes.
CACHE_DIRECTORY = 1 << 3
# No FLUSH when a descriptor is closed (Linux 5.16; older kernels do not know it, and go on asking).
NO_FLUSH = 1 << 5

_SECOND_NS = 1_000_000_000

# inode, size, blocks, atime, mtime, ctime, their nanoseconds, mode, links, uid, gid, device, block size, flags
_ATTR = "QQQqqqIIIIIIIIII"
# node, generation, seconds the name and the attributes may be remembered, nanoseconds of both
_NODE = "QQQQII" + _ATTR
_ENTRY = struct.Struct("<IiQ" + _NODE)  # behind the header
_LISTED = struct.Struct("<" + _NODE + "QQII")  # inode, position, length of the name, type; the name follows
_NODE_BYTES = struct.calcsize("<" + _NODE)
# after the header: seconds, nanoseconds, padding
_ATTRIBUTES = struct.Struct("<IiQ" + "QII" + _ATTR)
_OPEN = struct.Struct("<QII")  # handle, flags, padding
_OPENED = struct.Struct("<IiQ" + "QII")
_WRITTEN = struct.Struct("<IiQ" + "II")
_ALIGNMENT = 8
# As _LISTED.
_LISTED_ROW = np.dtype(
    [(name, "<u8") for name in ("node", "generation", "name_s", "attr_s")]
    + [(name, "<u4") for name in ("name_rest_ns", "attr_rest_ns")]
    + [(name, "<u8") for name in ("inode", "size", "blocks", "atime_s", "mtime_s", "ctime_s")]
    + [(name, "<u4") for name in ("atime_ns", "mtime_ns", "ctime_ns", "mode", "links", "uid", "gid", "device")]
    + [(name, "<u4") for name in ("block_size", "flags")]
    + [(name, "<u8") for name in ("number", "position")]
    + [(name, "<u4") for name in ("name_length", "type")]
)
assert (_LISTED_ROW.itemsize, LINE_STEP) == (_LISTED.size, _ALIGNMENT)
LISTED_BYTES_MIN = _LISTED.size + _ALIGNMENT
_SELF_AND_ABOVE = (b".", b"..")
_NO_NODE = (0,) * len(_NODE)
_DIRECTORY = int(Kind.DIRECTORY)
assert (_ENTRY.size, _ATTRIBUTES.size) == (16 + 128, 16 + 104)


def done(unique: int) -> Reply:
    """Answer that what was asked for is done."""
    return (OUT_HEADER.pack(OUT_HEADER.size, 0, unique),)


def data(unique: int, content: Buffer) -> tuple[bytes, Buffer]:
    """Answer with *content*."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(content), 0, unique), content


def written(unique: int, size: int) -> Reply:
    """Answer that *size* bytes were taken."""
    return (_WRITTEN.pack(_WRITTEN.size, 0, unique, size, 0),)


def opened(unique: int, handle: int, flags: int) -> Reply:
    """Answer with an open *handle*."""
    return (_OPENED.pack(_OPENED.size, 0, unique, handle, flags, 0),)


def _attr(attr: Attr, atime_ns: int) -> tuple[int, ...]:
    inode, _, _, uid, gid, nlink, size, mtime_ns, ctime_ns, blocks, device = attr
    atime_s, atime_rest = divmod(atime_ns, _SECOND_NS)
    mtime_s, mtime_rest = divmod(mtime_ns, _SECOND_NS)
    ctime_s, ctime_rest = divmod(ctime_ns, _SECOND_NS)
    times = (atime_s, mtime_s, ctime_s, atime_rest, mtime_rest, ctime_rest)
    return (inode, size, blocks, *times, mode_of(attr), nlink, uid, gid, device, BLOCK_BYTES, 0)


def attributes(unique: int, attr: Attr, atime_ns: int, timeout_s: float) -> Reply:
    """Answer with attributes."""
    seconds, rest_ns = _timeout(timeout_s)
    return (_ATTRIBUTES.pack(_ATTRIBUTES.size, 0, unique, seconds, rest_ns, 0, *_attr(attr, atime_ns)),)


def entry(unique: int, attr: Attr, atime_ns: int, name_timeout_s: float, timeout_s: float) -> Reply:
    """Answer with an entry."""
    seconds, rest_ns = _timeout(timeout_s)
    name_s, name_rest_ns = _timeout(name_timeout_s)
    head = (_ENTRY.size, 0, unique, attr.inode, attr.inode >> 32, name_s, seconds, name_rest_ns, rest_ns)
    return (_ENTRY.pack(*head, *_attr(attr, atime_ns)),)


def listing(
    unique: int, entries: Iterable[Listed], times: AccessTimes, timeout_s: float, size: int, *, bare: bool = False
) -> tuple[bytes, Buffer]:
    """Answer with as many *entries*, and all that is known of them, as fit into *size* bytes.

    *bare*: the kernel shall keep nothing of those that are no directories, but their names in this listing.
    """
    parts: list[bytes] = []
    left = size
    seconds, rest_ns = _timeout(timeout_s)
    for position, name, attr in entries:
        padding = -len(name) % _ALIGNMENT
        left -= _LISTED.size + len(name) + padding
        if left < 0:
            break
        inode = attr.inode
        # Without a node the kernel looks at nothing but the name, the number and the type.
        fields = _NO_NODE
        if not bare or attr.kind == _DIRECTORY:
            node = 0 if name in _SELF_AND_ABOVE else inode
            head = (node, inode >> 32, seconds, seconds, rest_ns, rest_ns)
            fields = (*head, *_attr(attr, times.get(inode, attr.mtime_ns)))
        last = (inode, position, len(name), mode_of(attr) >> 12)
        parts += (_LISTED.pack(*fields, *last), name, bytes(padding))
    return data(unique, b"".join(parts))


class Entries(NamedTuple):
    """Many entries as `listing` has them, for several answers."""

    ends: Numbers
    """Where each ends in what follows."""
    content: memoryview

    def bytes_from(self, begin: int) -> int:
        """Return how many bytes those take from number *begin* on."""
        return len(self.content) - (int(self.ends[begin - 1]) if begin else 0)

    def answer(self, unique: int, first: Buffer, begin: int, size: int) -> Reply:
        """Answer with *first* and as many from number *begin* on as fit into *size* bytes."""
        at = len(self.content) - self.bytes_from(begin)
        end = int(np.searchsorted(self.ends, at + size - len(first), "right"))
        content = self.content[at : int(self.ends[end - 1]) if end > begin else at]
        return OUT_HEADER.pack(OUT_HEADER.size + len(first) + len(content), 0, unique), first, content


def entries(page: Page, atimes_ns: Numbers, timeout_s: float, *, bare: bool = False) -> Entries:
    """Return what `listing` says of each entry of *page*, which have these access times."""
    lengths = page.name_lengths
    widths = _LISTED.size + lengths + -lengths % _ALIGNMENT
    ends = np.cumsum(widths)
    content = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    rows = _rows(page, atimes_ns, timeout_s, bare=bare).view(np.uint8).reshape(len(ends), _LISTED.size)
    for width in map(int, np.flatnonzero(np.bincount(widths))):
        of = np.flatnonzero(widths == width)
        lines = np.empty((len(of), width), np.uint8)
        lines[:, : _LISTED.size] = rows[of]
        lines[:, _LISTED.size :] = page.names[of, : width - _LISTED.size]
        dtype = f"V{width}"
        anywhere = np.ndarray(len(content) - width + 1, dtype, content, strides=(1,))
        anywhere[ends[of] - width] = lines.view(dtype).reshape(-1)
    return Entries(ends, content.data)


def _rows(entries: Page, atimes_ns: Numbers, timeout_s: float, *, bare: bool) -> npt.NDArray[np.void]:
    """Return the part of fixed length of each of *entries*, as `listing` has it."""
    rows = np.zeros(len(entries.keys), _LISTED_ROW)
    modes = modes_of(entries)
    rows["number"], rows["type"] = entries.inodes, modes >> 12
    rows["position"], rows["name_length"] = entries.keys, entries.name_lengths
    is_directory = entries.kinds == _DIRECTORY
    if bare and not is_directory.any():
        return rows
    seconds, rest_ns = _timeout(timeout_s)
    rows["node"] = rows["inode"] = entries.inodes
    rows["generation"] = entries.inodes >> 32
    rows["name_s"] = rows["attr_s"] = seconds
    rows["name_rest_ns"] = rows["attr_rest_ns"] = rest_ns
    rows["size"], rows["blocks"] = entries.sizes, -(-entries.sizes // 512)
    for letter, times_ns in (("a", atimes_ns), ("m", entries.mtimes_ns), ("c", entries.ctimes_ns)):
        rows[letter + "time_s"], rows[letter + "time_ns"] = np.divmod(times_ns, _SECOND_NS)
    rows["mode"] = modes
    rows["links"], rows["uid"], rows["gid"] = entries.links, entries.uids, entries.gids
    rows["device"], rows["block_size"] = entries.devices, BLOCK_BYTES
    if bare:
        rows.view(np.uint8).reshape(len(rows), -1)[~is_directory, :_NODE_BYTES] = 0
    return rows


def absent(unique: int, name_timeout_s: float) -> Reply:
    """Answer that there is no such name."""
    seconds, rest_ns = _timeout(name_timeout_s)
    return (_ENTRY.pack(_ENTRY.size, 0, unique, 0, 0, seconds, 0, rest_ns, 0, *(0,) * 16),)


def created(entry_reply: Reply, handle: int, flags: int) -> Reply:
    """Answer with an entry, its answer being *entry_reply*, and an open *handle* on it."""
    (content,) = entry_reply
    _, error, unique = OUT_HEADER.unpack_from(content)
    head = OUT_HEADER.pack(len(content) + _OPEN.size, error, unique)
    return head, memoryview(content)[OUT_HEADER.size :], _OPEN.pack(handle, flags, 0)


def _timeout(timeout_s: float) -> tuple[int, int]:
    seconds = int(timeout_s)
    return seconds, int((timeout_s - seconds) * _SECOND_NS)
