"""Makes a snapshot: a copy of a store as it is at one moment, while others go on changing that; itself a store.

Owns the order in which files are copied, which is what makes the copy consistent (docs/crash.md), and the name the copy
has until it is whole. Must not know how progress is shown.

*Concurrency:* takes no lock of the store and writes nothing to it. Volumes are append-only, so a prefix of the log in
the order of sequence numbers is a state that the store was in. What else may change in them meanwhile: a failed append
is cut away behind the durable mark, a deletion punches a hole, compaction puts a volume in place of others.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

from imgfs.cloning import Copier, Reflink
from imgfs.disk import Disk
from imgfs.errors import Busy, Damaged, DiskFailure, Exists, InvalidArgument, StoreFull, disk_error
from imgfs.format import NEEDLES_START
from imgfs.index import index_paths
from imgfs.layout import SLOTS_MAX
from imgfs.opening import LOCK, STAGING, SUPERBLOCK, find_store
from imgfs.settings import Settings
from imgfs.store import Store
from imgfs.superblock import pack_superblock
from imgfs.volume import Gap, Volume
from imgfs.volumes import SUFFIX, VOLUMES

# Behind the name of a snapshot that is not whole yet.
UNFINISHED = ".imgfs-snapshot"
# One round more for each change of which volumes there are; each has less to copy than the one before.
_ROUNDS_MAX = 100
# More zeros no needle ends with: before the last few there is a checksum.
_LAST_ZEROS = 64


class Watcher(Protocol):
    """Who watches a snapshot being made."""

    def started(self, volumes: int, volume_bytes: int) -> None:
        """Hear how much there is to copy."""

    def advanced(self, volumes: int, volume_bytes: int) -> None:
        """Hear how far the copy is."""

    def opened(self, store: Store) -> None:
        """Look at the snapshot; it has not got its name yet."""


class Taken(NamedTuple):
    """What became of a snapshot."""

    volumes: int
    volume_bytes: int
    shared: int
    """So many of the volumes share their blocks with the store's."""


class _Source(NamedTuple):
    """A volume of the store, in the order in which volumes are replayed."""

    first_sequence: int
    volume_id: int
    name: str
    salt: bytes  # a number might be given again, this is not


def take_snapshot(
    path: str, target: str, watcher: Watcher, *, reflink: Reflink = Reflink.AUTO, disk: Disk | None = None
) -> Taken:
    """Copy the store at *path*, which may be mounted, to the new directory *target*.

    Wherever it ends early *target* is not there; what a killed process has left is removed by the next one.

    Raises:
        NoStore, NewerFormat: as `Store.open`.
        Exists: something has the name *target*.
        InvalidArgument: *target* lies in the store.
        Busy: another process makes that snapshot, or the store changes faster than it can be copied.
        NotSupported: *reflink* is ALWAYS, and the two places cannot share blocks.
        StoreFull: there is no room.
        DiskFailure: as the disk says.
    """
    disk = disk or Disk()
    path, target = os.path.normpath(path), os.path.abspath(target)
    unfinished = target + UNFINISHED
    try:
        superblock, _ = find_store(path, disk)
        _check_place(path, target, disk)
        with _place(unfinished, disk):
            snapshot = _Snapshot(disk, path, unfinished, watcher, reflink)
            snapshot.take()
            # A directory with a superblock is a store: from here on it can be opened.
            disk.replace_file(f"{unfinished}/{SUPERBLOCK}", pack_superblock(superblock))
            _open_once(unfinished, disk, watcher)
            for each in _files(unfinished, disk):
                disk.copy_owner(path, each)
            disk.sync_directory(f"{unfinished}/{VOLUMES}")
            disk.sync_directory(unfinished)
            disk.rename(unfinished, target)
            disk.sync_directory(os.path.dirname(target))
        return snapshot.taken()
    except OSError as error:
        raise _said(error, target) from error
    except StoreFull:
        raise StoreFull(_no_room(target)) from None


def _no_room(target: str) -> str:
    return f"there is no room for the snapshot {target}; make room, or name another place"


def _said(error: OSError, target: str) -> Exception:
    found = disk_error(error, str(error.filename or target))
    return StoreFull(_no_room(target)) if isinstance(found, StoreFull) else found


def _check_place(path: str, target: str, disk: Disk) -> None:
    if disk.exists(target):
        raise Exists(f"{target} is there already; name a new directory for the snapshot")
    if not disk.exists(os.path.dirname(target)):
        raise DiskFailure(f"{os.path.dirname(target)} does not exist; make it first")
    store, inside = os.path.realpath(path), os.path.realpath(os.path.dirname(target))
    if os.path.commonpath([store, inside]) == store:
        raise InvalidArgument(f"{target} lies in the store {path}; name a directory outside of it")


@contextmanager
def _place(path: str, disk: Disk) -> Iterator[None]:
    """Make the directory at *path* for a snapshot that nobody else works on; what is left of it at the end goes."""
    if not disk.exists(path):
        disk.mkdir(path)
    # Not the lock of a store in it: this one goes along when the directory gets its name.
    lock = disk.lock_directory(path)
    if lock is None:
        raise Busy(f"another process makes this snapshot just now: it works in {path}")
    try:
        _empty(path, disk)
        yield
    except BaseException:
        with suppress(OSError, DiskFailure):
            _empty(path, disk)
            disk.rmdir(path)
        raise
    finally:
        disk.close(lock)


def _files(path: str, disk: Disk) -> list[str]:
    """Return all that a snapshot at *path* consists of, itself too."""
    directories = [each for each in (f"{path}/{VOLUMES}", f"{path}/{STAGING}") if disk.exists(each)]
    below = [f"{each}/{name}" for each in directories for name in disk.names(each)]
    superblocks = (f"{path}/{SUPERBLOCK}", f"{path}/{SUPERBLOCK}.new")
    return [path, *directories, *below, *filter(disk.exists, (*superblocks, f"{path}/{LOCK}"))]


def _empty(path: str, disk: Disk) -> None:
    """Remove what a snapshot that was cut off has left in the directory at *path*; nothing else is touched."""
    found = _files(path, disk)
    directories = {f"{path}/{VOLUMES}", f"{path}/{STAGING}"}
    for each in found[1:]:
        if each not in directories:
            disk.unlink(each)
    for each in directories.intersection(found):
        disk.rmdir(each)
    if disk.names(path):
        raise DiskFailure(f"{path} is in the way, and holds what is not of a snapshot; remove it")


def _open_once(path: str, disk: Disk, watcher: Watcher) -> None:
    """Open the copy as the next daemon would: a torn end is left out, the index is right, and all of it durable."""
    # A kept table would make every backup larger; whoever mounts it once has one.
    with Store.open(path, disk=disk, settings=Settings(saved_slots_min=SLOTS_MAX + 1)) as store:
        watcher.opened(store)


class _Vanished(Exception):
    """A volume that was listed is not there any more: compaction has put another one in its place."""


class _Snapshot:
    """The copying of one store's volumes."""

    def __init__(self, disk: Disk, path: str, target: str, watcher: Watcher, reflink: Reflink) -> None:
        self._disk = disk
        self._from = f"{path}/{VOLUMES}"
        self._to = f"{target}/{VOLUMES}"
        self._watcher = watcher
        self._copier = Copier(disk, reflink, self._advance)
        # What was copied when it was sealed already, and so will not change, and which of all share their blocks.
        self._whole: set[_Source] = set()
        self._shared: set[_Source] = set()
        self._listing: list[_Source] = []
        self._room_checked = False
        self._done_bytes = self._volume_bytes = 0

    def take(self) -> None:
        """Copy the volumes as they are at one moment, durably."""
        self._disk.mkdir(self._to)
        volumes, size, _ = self._measure()
        self._watcher.started(volumes, size)
        for _ in range(_ROUNDS_MAX):
            if self._round():
                break
        else:
            raise Busy("the store changes faster than it can be copied; try again when less is written")
        for name in self._disk.names(self._to):
            with self._opened(f"{self._to}/{name}", writable=True) as file:
                self._disk.sync(file)
                self._volume_bytes += self._disk.size(file) if name.endswith(SUFFIX) else 0
        self._disk.sync_directory(self._to)

    def taken(self) -> Taken:
        return Taken(len(self._listing), self._volume_bytes, len(self._shared))

    def _advance(self, size: int) -> None:
        self._done_bytes += size
        self._watcher.advanced(len(self._whole), self._done_bytes)

    def _measure(self) -> tuple[int, int, int]:
        """Return how many volumes there are, and of all files the size and how much of the disk they take."""
        volumes = size = allocated = 0
        for name in self._disk.names(self._from):
            with suppress(FileNotFoundError), self._opened(f"{self._from}/{name}") as file:
                size += self._disk.size(file)
                allocated += self._disk.allocated_bytes(file)
                volumes += name.endswith(SUFFIX)
        return volumes, size, allocated

    # -- which volumes ----------------------------------------------------------------------------------------

    def _round(self) -> bool:
        """Copy what is not copied yet; return whether what is copied now is a state that the store was in.

        It is if the same volumes were there before and after. All but the last were sealed then, so their copies are
        whole; and a hole that was punched meanwhile, into any of them, is for a deletion that the last one has.
        """
        listing = self._list()
        self._drop_others(listing)
        try:
            for volume in listing[:-1]:
                self._copy_sealed(volume)
            for volume in listing[-1:]:
                self._copy_last(volume)
        except _Vanished:
            return False
        self._listing = listing
        return self._list() == listing

    def _list(self) -> list[_Source]:
        """Return the volumes of the store in their order; the last one may be that which is appended to."""
        found = []
        for name in self._disk.names(self._from):
            if not name.endswith(SUFFIX):
                continue
            try:
                volume = Volume.open(self._disk, f"{self._from}/{name}")
            except FileNotFoundError:
                continue  # the next round knows why
            except Damaged:
                found.append(_Source(0, 0, name, b""))  # nothing in it can be recognised: it is kept as it is
                continue
            header = volume.header
            volume.close()
            found.append(_Source(header.first_sequence, header.volume_id, name, header.salt))
        return sorted(found)

    def _drop_others(self, listing: list[_Source]) -> None:
        """Remove the copies of volumes that are not in *listing*: with others in their place, they would undo these."""
        self._whole.intersection_update(listing)
        self._shared.intersection_update(listing)
        stems = {volume.name.removesuffix(SUFFIX) for volume in listing}
        for name in self._disk.names(self._to):
            if name.partition(".")[0] not in stems:
                self._disk.unlink(f"{self._to}/{name}")

    # -- one volume -------------------------------------------------------------------------------------------

    def _copy_sealed(self, volume: _Source) -> None:
        """Copy a volume that nothing is appended to any more."""
        if volume in self._whole:
            return

        def copy(source: int, target: int, start: int) -> None:
            self._copier.copy(source, target, start, self._disk.size(source))

        self._copy(volume, copy)
        self._whole.add(volume)
        self._advance(0)

    def _copy_last(self, volume: _Source) -> None:
        """Copy the volume that the store may append to meanwhile, up to some moment."""

        def copy(source: int, target: int, start: int) -> None:
            alive_from = start
            while True:
                # Behind the log there may be zeros for what comes next, which may come while this compares. Some of
                # them are its own.
                size = self._disk.size(source)
                end = self._disk.content_end(source, start, size)
                self._copier.copy(source, target, start, min(size, end + _LAST_ZEROS))
                if not self._copier.is_same(source, target, start, end):
                    continue  # a failed append was cut away, and another one has taken its place
                if self._disk.next_hole(source, alive_from) >= end:
                    return
                # Something of it died meanwhile, and the needle that says so may lie behind the end; not behind the
                # next one. What is not durable may be cut away until then.
                alive_from, start = end, self._right_bytes(volume)

        self._copy(volume, copy)

    def _copy(self, volume: _Source, copy: Callable[[int, int, int], None]) -> None:
        """Copy *volume* with its index: as a clone, or by *copy*, from where its copy is not known to be right."""
        path = f"{self._from}/{volume.name}"
        # The index first: what it has not yet is then added when the copy is opened; too much would have to go again.
        for source_path in index_paths(path):
            self._copy_derived(source_path)
        try:
            source = self._disk.open(path)
        except FileNotFoundError:
            raise _Vanished from None
        try:
            with self._opened(f"{self._to}/{volume.name}", writable=True) as target:
                if self._copier.clone(source, target):
                    self._shared.add(volume)
                else:
                    self._check_room()
                    copy(source, target, self._right_bytes(volume))
                self._disk.copy_times(source, target)
        except OSError as error:
            raise disk_error(error, f"copying {path}") from error
        finally:
            self._disk.close(source)
        if self._salt(volume) != volume.salt:
            raise _Vanished

    def _salt(self, volume: _Source) -> bytes:
        """Return that of the copy: whether it is what was listed."""
        try:
            copied = Volume.open(self._disk, f"{self._to}/{volume.name}")
        except Damaged:
            return b""
        copied.close()
        return copied.header.salt

    def _right_bytes(self, volume: _Source) -> int:
        """Return how much of the copy of *volume*, made while that was appended to, is durable in the store."""
        try:
            copied = Volume.open(self._disk, f"{self._to}/{volume.name}")
        except Damaged:
            return 0
        try:
            if copied.header.salt != volume.salt:
                return 0
            needles = (item[1] for item in copied.scan(NEEDLES_START, copied.size()) if not isinstance(item, Gap))
            return min(copied.size(), max((needle.durable for needle in needles), default=0))
        finally:
            copied.close()

    def _copy_derived(self, path: str) -> None:
        """Copy a file of the index, if it is there; what is wrong with the copy is noticed when that is opened."""
        try:
            source = self._disk.open(path)
        except FileNotFoundError:
            return
        try:
            with self._opened(f"{self._to}/{os.path.basename(path)}", writable=True) as target:
                if not self._copier.clone(source, target):
                    self._copier.copy(source, target, 0, self._disk.size(source))
                self._disk.copy_times(source, target)
        except OSError as error:
            raise disk_error(error, f"copying {path}") from error
        finally:
            self._disk.close(source)

    def _check_room(self) -> None:
        """Raise StoreFull if the bytes that have to be copied have no room, before any of them is."""
        if self._room_checked:
            return
        self._room_checked = True
        _, size, allocated = self._measure()
        space = self._disk.space(self._to)
        # XFS allocates ahead of the end of a file.
        if space.f_bavail * space.f_frsize < min(size, allocated):
            raise StoreFull("no room")

    @contextmanager
    def _opened(self, path: str, *, writable: bool = False) -> Iterator[int]:
        file = self._disk.open(path, writable=writable, create=writable)
        try:
            yield file
        finally:
            self._disk.close(file)
