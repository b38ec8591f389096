"""Repairs a store that nobody uses, as far as that can be done, and says what it did.

Owns the order in which that happens, what goes to `lost+found` under which name, and what is asked before bytes are
lost. Opening mends the tree (mend.py); this makes it look for contradictions too, and brings the lost into one place.
Volumes are only appended to, but for a damaged copy of a header, and what lies behind the end of one, which is cut
away last, when all that was whole in it is durable elsewhere. So a repair that was killed is finished by the next.
Must not know how its steps are shown, nor who agrees to them.

*Concurrency:* holds the store's lock; who only looks makes sure that nobody does.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from imgfs.disk import Disk
from imgfs.doubles import Doubles
from imgfs.errors import Busy, Damaged, NotFound, disk_error
from imgfs.format import (
    FLAG_SEAL,
    NAME_BYTES_MAX,
    NEEDLES_START,
    VOLUME_HEADER,
    VOLUME_HEADER_COPIES,
    Kind,
    Needle,
    Tag,
    unpack_volume_header,
)
from imgfs.layout import Word
from imgfs.log import SMALL_BYTES
from imgfs.mend import Mended, ends, lost_name
from imgfs.opening import ROOT, SUPERBLOCK, open_parts, owner
from imgfs.settings import Settings
from imgfs.store import Store
from imgfs.volume import Gap, Volume
from imgfs.volumes import SUFFIX, VOLUMES

LOST_AND_FOUND = b"lost+found"
_HEADER_BYTES = VOLUME_HEADER_COPIES[1]
_PUT_BYTES = [Kind.FILE, Kind.SYMLINK, Kind.SPECIAL]

Agree = Callable[[str], bool]
Tell = Callable[[str], None]


class Tail(NamedTuple):
    """What lies behind the end of the volume with that *entry*, and which whole needles of it nothing took away."""

    entry: int
    start: int
    end: int
    needles: dict[int, tuple[int, Needle]]  # by sequence number: offset, needle


class _Patient(Store):
    """A store on the table of who repairs it."""

    def volume(self, entry: int) -> Volume:
        return self._volumes.get(entry).volume

    def entries(self) -> range:
        """Return the entries of all volumes, in the order of their sequence numbers."""
        return range(self._memory.words[Word.VOLUMES])

    def log_end(self, entry: int) -> int:
        """Return where the log ends in the volume with that *entry*, in bytes from its start."""
        words = self._memory.words
        if self._log is not None and entry == words[Word.ACTIVE]:
            return words[Word.ACTIVE_END]
        if self._log is None and entry == words[Word.VOLUMES] - 1:
            return self.report.log_end
        return self._table.volume(entry).end

    def size(self, entry: int) -> int:
        """Return how long the volume with that *entry* is, or will be once the store was opened for writing."""
        size, end = self.volume(entry).size(), self.log_end(entry)
        opens = self._log is None and entry == self._memory.words[Word.VOLUMES] - 1
        return end if opens and self.volume(entry).content_end(end, size) == end else size

    def end_at(self, entry: int, end: int) -> None:
        """Let the volume with that *entry* end at *end*."""
        with self._memory.lock(), self._memory.change():
            self._table.set_volume(entry, self._table.volume(entry)._replace(end=end))

    def is_active(self, entry: int) -> bool:
        return self._log is not None and entry == self._memory.words[Word.ACTIVE]

    def entry_at(self, name: bytes) -> int:
        """Return the inode of the entry *name* of the root: of a link its own."""
        return self._lookup(ROOT, name)[0]

    def copy(self, volume: Volume, needle: Needle, offset: int, parent: int, name: bytes) -> None:
        """Put what *needle*, which lies at *offset* of *volume*, has put once more: as *name* in *parent*.

        Raises:
            StoreFull, DiskFailure: as the names say; nothing is changed.
        """

        def change(_: int) -> None:
            self._free_name(parent, name)
            extras: dict[int, bytes] = {Tag.RESCUED: needle.sequence.to_bytes(8, "little")}
            if Tag.DEVICE in needle.extras:
                extras[Tag.DEVICE] = needle.extras[Tag.DEVICE]
            owned = needle.data_size, needle.mode, needle.uid, needle.gid
            new = Needle(needle.kind, self._new_inode(), parent, name, *owned, mtime_ns=needle.mtime_ns, extras=extras)
            pieces = volume.pieces(needle, offset)
            if needle.data_size <= SMALL_BYTES:
                self._images.writer().append(new, list(pieces))
            else:
                self._images.writer().append(new, [], large=pieces)

        self._locked(change)


class _LostAndFound:
    """The directory `lost+found`, and which names in it are free."""

    def __init__(self, store: _Patient) -> None:
        self._store = store
        self._taken: set[bytes] = set()
        self._inode = 0
        for number in range(1 << 20):
            self.name = LOST_AND_FOUND if not number else LOST_AND_FOUND + b".%d" % number
            try:
                inode = store.lookup(ROOT, self.name)
            except NotFound:
                return
            if store.attr(inode).kind == Kind.DIRECTORY:
                self._inode = inode
                self._taken.update(entry.name for entry in store.list(inode))
                return

    def directory(self) -> int:
        """Return its inode; it is made if there is none yet."""
        if not self._inode:
            root = self._store.attr(ROOT)
            self._inode = self._store.mkdir(ROOT, self.name, 0o700, root.uid, root.gid)
        return self._inode

    def take(self, name: bytes, number: int) -> bytes:
        """Return a name that nobody has: *name* if there is one and it is free, else one made of *number*."""
        wanted = name if name and len(name) <= NAME_BYTES_MAX else b"#%d" % number
        turn = 0
        while wanted in self._taken:
            wanted = b"#%d" % number if not turn else b"#%d.%d" % (number, turn)
            turn += 1
        self._taken.add(wanted)
        return wanted

    def path(self, name: bytes) -> str:
        return os.fsdecode(self.name + b"/" + name)


class Repair:
    """One repair of the store at a path.

    Attributes:
        done: what was done, or with *dry_run* is to be done, a line each.
        left: what was not agreed to.
    """

    def __init__(
        self,
        path: str,
        disk: Disk | None = None,
        settings: Settings | None = None,
        *,
        dry_run: bool = False,
        agree: Agree = lambda _: False,
        tell: Tell = lambda _: None,
    ) -> None:
        """*agree* is asked before bytes are lost; *tell* gets each line of `done` as soon as it is so."""
        self._path = path
        self._disk = disk or Disk()
        self._settings = settings
        self._dry_run = dry_run
        self._agree = agree
        self._tell = tell
        self.done: list[str] = []
        self.left: list[str] = []

    def run(self) -> Store:
        """Repair the store and return it, open for writing, or with *dry_run* for reading as it would be.

        Raises:
            NoStore, NewerFormat, DiskFailure, StoreFull: as `opening.open_parts`.
            Busy: somebody has it open for writing, such as a mount.
        """
        disk, path = self._disk, self._path
        if self._dry_run and owner(path, disk) is not None:
            raise Busy(f"{path} is in use by process {owner(path, disk) or '?'}; unmount it first")
        try:
            leftovers = self._leftovers()
            had_superblock = disk.exists(f"{path}/{SUPERBLOCK}")
            parts = open_parts(path, disk, self._settings, writable=not self._dry_run, thorough=True)
            store = _Patient(path, disk, parts)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            self._say_what_opening_did(store, leftovers, had_superblock=had_superblock)
            self._repair(store)
        except OSError as error:
            store.leave()
            raise disk_error(error, path) from error
        except BaseException:
            store.leave()
            raise
        return store

    def _did(self, text: str) -> None:
        self.done.append(text)
        self._tell(text)

    def _may(self, text: str) -> bool:
        """Return whether what *text* says, which loses bytes, may be done; nothing is done in a dry run."""
        if self._dry_run or self._agree(text):
            return True
        self.left.append(text)
        return False

    # -- what opening does ------------------------------------------------------------------------------------

    def _leftovers(self) -> list[str]:
        """Return the names of files without a volume, which opening removes."""
        directory = f"{self._path}/{VOLUMES}"
        names = self._disk.names(directory) if self._disk.exists(directory) else []
        stems = {name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)}
        kinds = ("vol.new", "idx", "names")
        return [name for name in names if name.partition(".")[0] not in stems and name.partition(".")[2] in kinds]

    def _say_what_opening_did(self, store: _Patient, leftovers: list[str], *, had_superblock: bool) -> None:
        for path in store.report.rebuilt:
            file = os.path.basename(path)
            if file == SUPERBLOCK:
                why = "damaged" if had_superblock else "missing"
                self._did(f"{file} was {why}: written again from the header of a volume")
            else:
                self._did(f"{file} was missing or wrong: made anew from its volume")
        for file in leftovers:
            what = "a volume that was never finished" if file.endswith(".new") else "an index without a volume"
            self._did(f"{file}, {what}: removed")
        for row in store.report.mended:
            if row.inode == ROOT:
                self._did("the top directory was lost: made again")
            elif row.gone:
                self._did(f"{_named(row.inode, row.name)}, {row.text}: removed")

    # -- the rest ---------------------------------------------------------------------------------------------

    def _repair(self, store: _Patient) -> None:
        found = _LostAndFound(store)
        doubles = Doubles()
        tails = self._read(store, doubles)
        self._gather(store, found)
        self._part_doubles(store, found, doubles)
        for tail in tails:
            volume = store.volume(tail.entry)
            for offset, needle in tail.needles.values():
                self._keep(store, found, volume, needle, offset, "it lies behind the end of its volume")
        if not self._dry_run:
            # What is cut away must be durable elsewhere before.
            store.sync()
        for tail in tails:
            self._cut(store, tail)
        for entry in store.entries():
            self._write_header(store, entry)

    def _read(self, store: _Patient, doubles: Doubles) -> list[Tail]:
        """Read the headers of all needles, note those of the log in *doubles*, and return what lies behind its end."""
        tails: list[Tail] = []
        headers = [store.volume(entry).header for entry in store.entries()]
        compacted = {each.previous.volume_id for each in headers if each.previous and each.replaces}
        for entry in store.entries():
            volume, end = store.volume(entry), store.log_end(entry)
            sealed_at = 0
            for item in volume.scan(NEEDLES_START, end):
                if isinstance(item, Gap):
                    if item.start == sealed_at and item.end == end:
                        end = sealed_at
                    continue
                offset, needle = item
                doubles.add(entry, offset, needle)
                sealed_at = offset + needle.length if needle.kind == Kind.CHECKPOINT and needle.flags & FLAG_SEAL else 0
            if not store.is_active(entry) and store.size(entry) > end:
                # What was appended again elsewhere may have been deleted there, and compacted away.
                known = volume.header.volume_id not in compacted
                tails.append(Tail(entry, end, volume.size(), _torn_puts(volume, end) if known else {}))
        for tail in tails:
            for sequence, (_, needle) in list(tail.needles.items()):
                if sequence in doubles.rescued or doubles.has(needle):
                    del tail.needles[sequence]  # appended again after a sync failed, or kept by an earlier repair
        return tails

    def _gather(self, store: _Patient, found: _LostAndFound) -> None:
        """Bring what opening gave a name in the root for want of another to `lost+found`, now or at an earlier time."""
        mended = {row.inode: row for row in store.report.mended}
        for entry in list(store.list(ROOT)):
            if not entry.name.startswith(LOST_AND_FOUND):
                continue
            inode = store.entry_at(entry.name)
            if entry.name != lost_name(inode):
                continue
            row = mended.get(inode, Mended(inode, "its place was lost"))
            new = found.take(row.name, inode)
            if not self._dry_run:
                store.rename(ROOT, entry.name, found.directory(), new, replace=False)
            self._did(f"{_named(inode, row.name)}: {row.text}; it is {found.path(new)} now")

    def _part_doubles(self, store: _Patient, found: _LostAndFound, doubles: Doubles) -> None:
        """Keep what lost its slot to another needle: the later one has it."""
        for entry, offset, winner_entry, winner_offset in doubles.find():
            volume = store.volume(entry)
            try:
                winner = store.volume(winner_entry).header_at(winner_offset)
                needle = volume.header_at(offset)
            except Damaged:
                continue
            why = f"number {winner.sequence} is in its slot, as {_named(winner.inode, winner.name)}"
            self._keep(store, found, volume, needle, offset, why)

    def _keep(
        self, store: _Patient, found: _LostAndFound, volume: Volume, needle: Needle, offset: int, why: str
    ) -> None:
        """Copy what *needle* put, if it is whole, to `lost+found`; *why* it is nowhere else."""
        if not volume.whole(needle, offset):
            return
        new = found.take(needle.name, needle.inode)
        if not self._dry_run:
            store.copy(volume, needle, offset, found.directory(), new)
        place = f"number {needle.sequence}, volume {volume.header.volume_id}, offset {offset}"
        self._did(f"{_named(needle.inode, needle.name)} ({place}): {why}; copied to {found.path(new)}")

    def _cut(self, store: _Patient, tail: Tail) -> None:
        """Cut away what lies behind the end of a volume."""
        volume = store.volume(tail.entry)
        volume_id, size = volume.header.volume_id, tail.end - tail.start
        number = f"{size:,} bytes behind the end of volume {volume_id}, at {tail.start:,}"
        if volume.content_end(tail.start, tail.end) > tail.start and not self._may(f"cut away {number}"):
            return
        if not self._dry_run:
            file = self._disk.open(volume.path, writable=True)
            try:
                self._disk.truncate(file, tail.start)
                self._disk.sync(file)
            finally:
                self._disk.close(file)
            store.end_at(tail.entry, tail.start)
            damage = store.report.damage
            damage[:] = [each for each in damage if (each.volume, each.offset) != (volume_id, tail.start)]
        self._did(f"{number}: cut away")

    def _write_header(self, store: _Patient, entry: int) -> None:
        """Write the copy of a volume's header again that is not what it should be, from the one that is."""
        volume = store.volume(entry)
        data = volume.read(0, NEEDLES_START)
        copies = [data[start : start + _HEADER_BYTES] for start in VOLUME_HEADER_COPIES]
        good = next(header for copy in copies if (header := _header(copy)))
        for which, start, copy in zip(("first", "second"), VOLUME_HEADER_COPIES, copies, strict=True):
            if copy == _header(copy):
                continue
            if not self._dry_run:
                file = self._disk.open(volume.path, writable=True)
                try:
                    self._disk.write(file, start, [good])
                    self._disk.sync(file)
                finally:
                    self._disk.close(file)
            self._did(f"volume {volume.header.volume_id}: the {which} copy of its header was damaged: written again")


def _named(inode: int, name: bytes) -> str:
    return f"inode {inode}, {os.fsdecode(name)}" if name else f"inode {inode}"


def _header(copy: bytes) -> bytes:
    """Return what the page *copy* should be, if the copy of a volume's header in it is whole, else nothing."""
    try:
        unpack_volume_header(copy + bytes(NEEDLES_START - len(copy)))
    except Damaged:
        return b""
    length = VOLUME_HEADER.unpack_from(copy)[2]
    return copy[:length] + bytes(_HEADER_BYTES - length)


def _torn_puts(volume: Volume, start: int) -> dict[int, tuple[int, Needle]]:
    """Return the needles behind *start* that put bytes which nothing behind them takes away, by sequence number."""
    puts: dict[int, tuple[int, Needle]] = {}  # by inode
    for item in volume.scan(start, volume.size()):
        if isinstance(item, Gap):
            continue
        offset, needle = item
        for inode in ends(needle):
            puts.pop(inode, None)
        # What an earlier repair copied is still where it was: that is cut away only when the copy is durable.
        copied = Tag.RESCUED in needle.extras
        if needle.kind in _PUT_BYTES and not copied and volume.whole(needle, offset):
            puts[needle.inode] = offset, needle
    return {needle.sequence: (offset, needle) for offset, needle in puts.values()}
