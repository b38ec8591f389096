"""The list of damage that is known of a store, `damage.json`: what a scrub or a check has found and was not mended.

Owns the file. Must not know how damage is found. An entry goes when its place is found whole, or when nobody needs it
any more.

*Concurrency:* written by whoever holds the scrub's lock; the file is replaced in one durable step.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from imgfs.disk import Disk
from imgfs.errors import ImgfsError
from imgfs.lost_image import find_inode, path_of
from imgfs.state_file import read_state_file, write_state_file
from imgfs.store import Store
from imgfs.survey import Damage

DAMAGE = "damage.json"
SCRUB_LOCK = "scrub.lock"
_FORMAT = 1


@dataclass(frozen=True)
class Known:
    """An entry of the list."""

    damage: Damage
    path: str | None  # of its image, from the top of the store, as `os.fsdecode` has it
    first_seen_ns: int
    last_seen_ns: int

    def is_current(self, store: Store) -> bool:
        """Return whether the image is still there, and still has its bytes in that place."""
        damage = self.damage
        if not damage.inode:
            return True
        if damage.readable:
            return store.is_there(damage.inode)
        return store.needs(damage.inode, damage.volume, damage.offset)


class KnownDamage:
    """The list of one store."""

    def __init__(self, store_path: str, disk: Disk) -> None:
        self._path = f"{store_path}/{DAMAGE}"
        self._disk = disk
        self._known = {(item.damage.file, item.damage.offset): item for item in _read(self._path, disk)}
        self._saved = set(self._known.values())

    def __iter__(self) -> Iterator[Known]:
        return iter(self._known.values())

    def see(self, damage: Damage, path: bytes | None) -> None:
        """Enter *damage*, which was found now, of the image at *path*; what nobody needs is not kept."""
        key, now_ns = (damage.file, damage.offset), time.time_ns()
        if not damage.needed:
            self._known.pop(key, None)
            return
        before = self._known.get(key)
        first_ns = before.first_seen_ns if before is not None else now_ns
        self._known[key] = Known(damage, os.fsdecode(path) if path is not None else None, first_ns, now_ns)

    def settle(self, since_ns: int, volume: int | None = None) -> None:
        """Know that all of *volume*, or of the store, was read since then: what was not seen is whole, or is gone."""
        for key, item in list(self._known.items()):
            if item.last_seen_ns < since_ns and volume in (None, item.damage.volume):
                del self._known[key]

    def save(self) -> None:
        """Make the list durable, if it changed. OSError as the disk says."""
        if set(self._known.values()) == self._saved:
            return
        rows = []
        for item in sorted(self._known.values(), key=lambda item: (item.damage.volume, item.damage.offset)):
            row = {"file": item.damage.file} | asdict(item.damage)
            row |= {"path": item.path, "first_seen_ns": item.first_seen_ns, "last_seen_ns": item.last_seen_ns}
            rows.append(row)
        write_state_file(self._disk, self._path, _FORMAT, {"damage": rows})
        self._saved = set(self._known.values())


def _read(path: str, disk: Disk) -> list[Known]:
    """Return what the file at *path* says; a file that says nothing sensible is no list."""
    return read_state_file(disk, path, _FORMAT, _rows, "the next scrub makes it anew") or []


def _rows(content: dict[str, Any]) -> list[Known]:
    return [_known(row) for row in content["damage"]]


def _known(row: dict[str, object]) -> Known:
    fields = {name: row[name] for name in Damage.__dataclass_fields__}
    types = (int, int, int, str, int, str, bool, bool)
    path = row["path"]
    times = row["first_seen_ns"], row["last_seen_ns"]
    if not all(isinstance(value, kind) for value, kind in zip(fields.values(), types, strict=True)):
        raise TypeError("damage")
    if not (path is None or isinstance(path, str)) or not all(isinstance(each, int) for each in times):
        raise TypeError("damage")
    return Known(Damage(**fields), path, *times)  # type: ignore[arg-type]


def path_in(store: Store, inode: int) -> bytes | None:
    """Return the path of *inode* in *store*, None where it has none or a name is lost."""
    if inode:
        with suppress(ImgfsError):
            return store.path_of(inode)
        lost = find_inode(store, inode)
        with suppress(ImgfsError):
            return path_of(store, lost) if lost is not None else None
    return None


def note_check(store: Store, found: Iterable[Damage], since_ns: int, disk: Disk) -> None:
    """Make what a check that began at *since_ns* has *found* the list, unless a scrub is at it just now.

    OSError as the disk says.
    """
    lock = disk.lock(f"{store.path}/{SCRUB_LOCK}")
    if lock is None:
        return
    try:
        known = KnownDamage(store.path, disk)
        for damage in found:
            known.see(damage, path_in(store, damage.inode))
        known.settle(since_ns)
        known.save()
    finally:
        disk.close(lock)
