"""What is in the trash: images that were deleted, replaced or overwritten, and whose bytes are still there.

Owns what counts as such. Looks for it in the index records, and reads the headers only of what it finds. Must not know
how anything is brought back, nor how long it stays.

*Concurrency:* as history.py; what is found may be gone a moment later.
"""

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imgfs.errors import Damaged
from imgfs.format import FLAG_BARE, FLAG_LAST, Kind, Needle, slot_of
from imgfs.history import Attributes, History, Latest, Mask, Rows
from imgfs.load import PUTS

_KINDS = [Kind.FILE, Kind.SYMLINK, Kind.SPECIAL, Kind.DIRECTORY]
# What has bytes, of which an older version may be worth something.
_VERSIONED = [Kind.FILE, Kind.SYMLINK]


class Cause(enum.Enum):
    """By what something went."""

    DELETED = "deleted"
    REPLACED = "replaced"  # another got its name by a rename
    OVERWRITTEN = "overwritten"  # the image itself is there, with other bytes


_CAUSES = {int(Kind.DELETE): Cause.DELETED, int(Kind.RENAME): Cause.REPLACED}


@dataclass(frozen=True)
class Gone:
    """Something that was in the store."""

    volume: int
    offset: int
    path: bytes  # that it had then, without a slash at its start
    kind: Kind
    inode: int
    size: int
    device: int
    attributes: Attributes
    went_ns: int
    cause: Cause
    put: int  # the row of the history that put it
    moment: int  # the row that took it away
    naming: int  # the row that gave it its last name

    @property
    def id(self) -> str:
        """What it is called on a command line: where its needle lies, which stays so until that is moved."""
        return f"{self.volume}:{self.offset}"


def find(history: History, since_ns: int) -> list[Gone]:
    """Return what went after *since_ns* and is whole, directories too, in the order in which it went."""
    first = history.row_at(since_ns)
    puts, moments = _ended(history, first)
    if not len(puts):
        return []
    order = np.argsort(moments, kind="stable")
    puts, moments = puts[order], moments[order]
    naming = _naming(history, puts, moments)
    found = []
    columns = puts.tolist(), moments.tolist(), naming.tolist()
    told = history.paths(naming, moments), history.all_attributes(puts, moments)
    causes = [_CAUSES.get(kind, Cause.OVERWRITTEN) for kind in history.kind[moments].tolist()]
    for put, moment, named, path, attributes, cause in zip(*columns, *told, causes, strict=True):
        needle = _kept(history, put)
        if needle is None:
            continue
        went_ns = history.appended_ns(moment)
        if went_ns <= since_ns:
            continue  # its volume tells of times that go back and forth
        kind = Kind(needle.kind)
        found.append(
            Gone(
                history.volume(put).volume.header.volume_id,
                history.offset(put),
                path,
                kind,
                needle.inode,
                needle.data_size,
                needle.record_size if kind == Kind.SPECIAL else 0,
                attributes,
                went_ns,
                cause,
                put,
                moment,
                named,
            )
        )
    return found


def _ended(history: History, first: int) -> tuple[Rows, Rows]:
    """Return the rows of puts that no longer hold, and for each the row, from *first* on, from which they do not."""
    kind, slot, rows = history.kind, history.slot, history.rows
    put = np.isin(kind, PUTS)
    events = [(np.flatnonzero(put), slot[put]), *_ends(history)]
    row = np.concatenate([each for each, _ in events])
    of = np.concatenate([each for _, each in events])
    order = np.lexsort((row, of))
    row, of = row[order], of[order]
    before, after = row[:-1], row[1:]
    # An end that names its inode only by slot may follow the put of another; only damage makes it so.
    same = history.generation[before] == history.generation[after]
    over = put[after] & same & np.isin(kind[before], _VERSIONED) & (rows["size"][before] > 0)
    own = (kind[after] == Kind.DELETE) & (slot[after] == slot[before])
    ended = ~put[after] & (same | ~own)
    chosen = (of[:-1] == of[1:]) & put[before] & np.isin(kind[before], _KINDS) & (over | ended) & (after >= first)
    return before[chosen], after[chosen]


def _ends(history: History) -> list[tuple[Rows, Rows]]:
    """Return (row, slot) of each inode, or link, that ends: by a delete, in a rename, or with its last link."""
    rename, delete = history.kind == Kind.RENAME, history.kind == Kind.DELETE
    flags = np.where(rename | delete, history.rows["owner"], 0)
    replaced = history.rows["size"].astype(np.int64) - 1
    target = history.rows["mtime"] - 1
    bare, last = flags & FLAG_BARE > 0, flags & FLAG_LAST > 0
    return [
        _chosen(delete & ~bare, history.slot),
        _chosen(rename & ~bare & (replaced >= 0), replaced),
        _chosen(last & (target >= 0), target),
    ]


def _chosen(mask: Mask, slots: npt.NDArray[np.int64]) -> tuple[Rows, Rows]:
    rows = np.flatnonzero(mask)
    return rows, slots[rows]


def _naming(history: History, puts: Rows, moments: Rows) -> Rows:
    """Return the row that gave each of *puts* the name it had just before *moments*; -1 where that is lost."""
    # What another replaces has its name; and so has what is put again, if it has one of its own.
    named = history.rows["name_offset"][moments] > 0
    naming = np.where(named, moments, history.names.before(history.slot[moments], moments))
    nameless = (history.kind[moments] == Kind.FILE) & ~named
    if nameless.any():
        links = np.flatnonzero(history.kind == Kind.LINK)
        ends = [np.concatenate(part) for part in zip(*_ends(history), strict=True)]
        ended = Latest(ends[1], ends[0], len(history))
        for at in np.flatnonzero(nameless):
            naming[at] = _link_to(history, links, ended, int(history.slot[puts[at]]), int(moments[at]))
    return naming


def _link_to(history: History, links: Rows, ended: Latest, slot: int, moment: int) -> int:
    """Return the row that gave a link to *slot* the name it had at *moment*, of several the latest; -1 for none."""
    to = links[(history.rows["size"][links].astype(np.int64) - 1 == slot) & (links < moment)]
    for link in to[::-1].tolist():
        if ended.one_before(int(history.slot[link]), moment) < link:
            return history.names.one_before(int(history.slot[link]), moment)
    return -1


def _kept(history: History, put: int) -> Needle | None:
    """Return the needle of row *put* if all of it is still there."""
    volume, offset = history.volume(put).volume, history.offset(put)
    try:
        needle = volume.header_at(offset)
    except Damaged:
        return None
    same = needle.kind == history.kind[put] and slot_of(needle.inode) == history.slot[put]
    return needle if same and volume.is_kept(needle, offset) else None
