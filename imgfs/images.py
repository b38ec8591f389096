"""Reading and writing the bytes of images: verified when opened, staged while written, one needle when flushed.

Owns what of them is verified when. Must not know names or directories; those are the store's.

*Concurrency:* reading takes no lock: a record is read, then the disk, then the record again, and if it moved
meanwhile the read starts over. Writing and flushing hold the table's lock.
"""

from collections.abc import Iterator
from typing import NamedTuple

from imgfs.disk import Buffer
from imgfs.errors import BadHandle, Damaged, DiskFailure, IsADirectory, ReadOnly, Stale, StoreFull, TooLarge, disk_error
from imgfs.format import (
    ALIGNMENT,
    CHUNK_BYTES,
    IMAGE_BYTES_MAX,
    NEEDLE_HEADER_BYTES_MAX,
    Checksums,
    Kind,
    Needle,
    checksums,
    footer_bytes,
    inode_of,
    slot_of,
    unpack_footer,
)
from imgfs.handles import WRITE, Handles
from imgfs.layout import VOLUME_SEALED, Flag
from imgfs.log import SMALL_BYTES, Log, Part
from imgfs.records import Record
from imgfs.settings import MIB
from imgfs.staging import ATTRIBUTED, DIRTY, SPOILED, Staged, Staging, State
from imgfs.table import Table
from imgfs.verified import Verified
from imgfs.volumes import Volumes

_KIND, _DIRECTORY, _WRITTEN = Flag.KIND, int(Kind.DIRECTORY), Flag.STAGED | Flag.UNBORN
# An image up to this size is verified as a whole when it is opened; of a larger one each MiB when it is read.
VERIFIED_AT_OPEN = 4 * MIB
# An image that one read takes whole, and that is in memory, is verified again then: that costs less than to keep it.
_NOT_KEPT_BYTES = 128 << 10
# So much is staged anew where a writer goes on behind a flush.
_STAGED_ANEW_BYTES = 256 << 10


class Whole(NamedTuple):
    """A needle whose header is known to be whole, and what of its data was verified with it."""

    needle: Needle
    offset: int
    sums: Checksums
    data: memoryview | None


class Seen(NamedTuple):
    """The bytes of an image, verified, and the record that it had."""

    record: Record
    data: memoryview


class Images:
    """The bytes of all images of one store."""

    def __init__(self, table: Table, volumes: Volumes, handles: Handles, staging: Staging, log: Log | None) -> None:
        self._table = table
        self._volumes = volumes
        self._handles = handles
        self._staging = staging
        self._log = log
        if log is not None:
            log.unstage = self._unstage
        self._kept: Verified[Whole | bytes] = Verified()

    def after_fork(self) -> None:
        """Be a process of its own."""
        self._kept.after_fork()

    def record(self, inode: int) -> Record:
        """Return the record of *inode*, also while it rests after its image was unlinked.

        Raises:
            Stale: the slot belongs to another image by now, or to none.
        """
        record = self._table.whole_record((inode & 0xFFFF_FFFF) - 1)
        if not record.flags & _KIND or record.hash_generation >> 24 != inode >> 32:
            raise Stale(f"inode {inode:#x} is gone")
        return record

    def check_kept(self, inode: int) -> None:
        """Raise DiskFailure if what was flushed of *inode* lies behind the end of its volume: a sync failed. Stale."""
        if self._lies_behind(inode):
            self._table.memory.pass_through(nowait=False)  # what was stored again may just be moving there
        if self._lies_behind(inode):
            raise DiskFailure(f"the disk lost what was written to inode {inode:#x}")

    def _lies_behind(self, inode: int) -> bool:
        record = self.record(inode)
        row, has_data = self._table.volume(record.volume), not record.flags & Flag.UNBORN and record.kind != _DIRECTORY
        return has_data and row.flags & VOLUME_SEALED != 0 and record.offset8 * ALIGNMENT >= row.end

    # -- reading ----------------------------------------------------------------------------------------------

    def see(self, inode: int) -> Seen | None:
        """Return a small image, verified; None if *inode* is none, or not whole: `open` says what it is.

        Raises:
            Stale: it is gone.
            WouldBlock: the disk is needed.
        """
        record = self.record(inode)
        flags = record.flags
        if record.size > _NOT_KEPT_BYTES or flags & _WRITTEN or flags & _KIND == _DIRECTORY:
            return None
        volume = self._volumes.get(record.volume).volume
        data = volume.data_of(inode, flags & _KIND, record.offset8 * ALIGNMENT, record.size)
        return None if data is None else Seen(record, data)

    def open(self, inode: int, *, nowait: bool = False) -> None:
        """Verify the image *inode* as far as that is done before anything of it is served.

        Raises:
            Stale: it is gone.
            IsADirectory: it is no image.
            Damaged: its bytes are not those that were written.
            WouldBlock: *nowait* is set and the disk is needed.
        """
        while True:
            record = self.record(inode)
            if record.kind == Kind.DIRECTORY:
                raise IsADirectory("a directory has no bytes to read")
            if record.flags & _WRITTEN:
                return
            try:
                self.whole(inode, record, nowait=nowait, fresh=True)
                return
            except Damaged:
                if self.record(inode)[:7] == record[:7]:
                    if not record.live and not self._handles.in_use(slot_of(inode)):
                        raise Stale(f"inode {inode:#x} is gone, and so are its bytes") from None
                    raise

    def whole(self, inode: int, record: Record, *, nowait: bool = False, fresh: bool = False) -> Whole:
        """Return the needle of *inode*, its header verified, and its data too if that is at most 4 MiB.

        *fresh*: read it from the volume even if an earlier read is still in memory.
        """
        key = self._key(record, -1)
        if not fresh:
            cached = self._kept.get(key)
            if isinstance(cached, Whole):
                return cached
        volume = self._volumes.get(record.volume).volume
        offset = record.offset8 * ALIGNMENT
        small = record.size <= VERIFIED_AT_OPEN
        wanted = NEEDLE_HEADER_BYTES_MAX + (record.size + footer_bytes(record.size) if small else 0)
        data = volume.read_resident(offset, wanted) if nowait else volume.read(offset, wanted)
        needle = volume.unpack(data, offset)
        where = f"volume {volume.header.volume_id}, offset {offset}, inode {inode:#x}"
        if needle is None or needle.inode != inode or needle.data_size != record.size or needle.kind != record.kind:
            raise Damaged(f"{where}: the header of this image is damaged")
        content = None
        if small:
            end = needle.data_start + needle.data_size
            view = memoryview(data)
            content = view[needle.data_start : end]
            sums = unpack_footer(view[end:], needle.data_size, needle.checksum)
            if sums is None or checksums(content) != sums:
                raise Damaged(f"{where}: the data of this image is damaged")
        else:
            sums = volume.footer_of(needle, offset, nowait=nowait)
        whole = Whole(needle, offset, sums, content)
        if not nowait or record.size > _NOT_KEPT_BYTES:
            self._kept.keep(key, whole, len(content or b"") + 1024)
        return whole

    def read(self, inode: int, offset: int, size: int, *, nowait: bool = False) -> bytes | memoryview:
        """Return up to *size* bytes at *offset* of the image *inode*.

        Raises:
            Stale: it is gone.
            Damaged: the MiB that holds them is not what was written.
            WouldBlock: *nowait* is set and the disk is needed.
        """
        while True:
            record = self.record(inode)
            if record.flags & _WRITTEN:
                number = self._staging.find(inode)
                if number >= 0:
                    entry = self._staging.look(number)
                    staged = self._staging.read(number, offset, min(size, entry.size - offset), nowait=nowait)
                    # Else it was written to meanwhile, or ended, and perhaps begun anew.
                    if self._staging.look(number) == entry and entry.inode == inode:
                        return staged
                elif self.record(inode) == record:
                    raise Stale(f"inode {inode:#x} was never closed, and is gone")
                continue
            try:
                data = self._read_needle(inode, record, offset, min(size, max(0, record.size - offset)), nowait=nowait)
            except Damaged:
                if self.record(inode)[:7] == record[:7]:
                    raise
                continue
            if self.record(inode)[:7] == record[:7]:
                return data

    def _read_needle(self, inode: int, record: Record, offset: int, size: int, *, nowait: bool) -> bytes | memoryview:
        if not size:
            return b""
        whole = self.whole(inode, record, nowait=nowait)
        if whole.data is not None:
            return whole.data[offset : offset + size]
        parts = []
        for index in range(offset // CHUNK_BYTES, (offset + size - 1) // CHUNK_BYTES + 1):
            chunk = self._chunk(record, whole, index, nowait=nowait)
            start = max(0, offset - index * CHUNK_BYTES)
            parts.append(chunk[start : offset + size - index * CHUNK_BYTES])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk(self, record: Record, whole: Whole, index: int, *, nowait: bool) -> bytes:
        """Return the MiB number *index* of a large image, verified."""
        key = self._key(record, index)
        cached = self._kept.get(key)
        if isinstance(cached, bytes):
            return cached
        volume = self._volumes.get(record.volume).volume
        at = index * CHUNK_BYTES
        size = min(CHUNK_BYTES, record.size - at)
        data = volume.read(whole.offset + whole.needle.data_start + at, size, nowait=nowait)
        if checksums(data).data != whole.sums.chunks[index]:
            volume_id = volume.header.volume_id
            raise Damaged(f"volume {volume_id}, offset {whole.offset}: bytes {at} to {at + size} are damaged")
        self._kept.keep(key, data, len(data))
        return data

    def _key(self, record: Record, index: int) -> tuple[int, int, int]:
        # The row of a volume that was removed is given to another.
        return record.volume | self._volumes.gone << 16, record.offset8, index

    # -- writing ----------------------------------------------------------------------------------------------

    def writer(self) -> Log:
        """Return the log.

        Raises:
            ReadOnly: the store was opened for reading.
        """
        if self._log is None:
            raise ReadOnly("this store was opened read-only")
        return self._log

    def writing_inode(self, handle: int) -> int:
        """Return the inode of a handle that may write; BadHandle for any other."""
        inode, flags = self._handles.get(handle)
        if not flags & WRITE:
            raise BadHandle("this handle was not opened for writing")
        return inode

    def stage(self, inode: int, *, empty: bool = False) -> int:
        """Within the lock: return the staging entry of *inode*; a new one starts with the image's bytes, or *empty*."""
        number = self._staging.find(inode)
        if number >= 0:
            return number
        record = self.record(inode)
        now = self.writer().now_ns()
        size = 0 if empty else record.size
        self.writer().check_room(size)
        entry = Staged(inode, DIRTY if empty else 0, record.owner, size, record.mtime_ns, now)
        number = self._staging.begin(entry, self._pieces(inode, record) if size else ())
        with self._table.memory.change():
            self._staging.publish(number, inode)
            self._table.set_flags(slot_of(inode), record.flags | Flag.STAGED)
        return number

    def _pieces(self, inode: int, record: Record) -> Iterator[bytes]:
        whole = self.whole(inode, record)
        return self._volumes.get(record.volume).volume.pieces(whole.needle, whole.offset)

    def staged(self, inode: int) -> Staged | None:
        """Return what is staged of *inode*, None if it is not being written."""
        number = self._staging.find(inode)
        entry = self._staging.look(number) if number >= 0 else None
        return entry if entry is not None and entry.inode == inode else None

    def staged_state(self, inode: int) -> State | None:
        """Return the state of what is staged of *inode*, None if it is not being written."""
        if not self._table.record(slot_of(inode)).flags & Flag.STAGED:
            return None
        number = self._staging.find(inode)
        return self._staging.look_state(number, inode) if number >= 0 else None

    def write(self, handle: int, offset: int, data: Buffer, *, last_try: bool = True) -> int:
        """Stage *data* at *offset* of an image open for writing; return its length.

        With *last_try* an image that found the disk full is not flushed any more.

        Raises:
            BadHandle: the handle cannot write.
            TooLarge: past 4 GiB - 1.
            StoreFull: no room; what was staged before stays.
        """
        inode = self.writing_inode(handle)
        end = offset + len(data)
        if end > IMAGE_BYTES_MAX:
            raise TooLarge("an image has at most 4 GiB - 1 bytes")
        log = self.writer()
        with log.lock():
            try:
                log.check_room(len(data))
                number = self.stage(inode)
                size = self._staging.state(number).size
                if offset > size:
                    self._staging.truncate(number, size)  # a killed writer may have left bytes behind the end
                self._staging.write(number, offset, data)
            except OSError as error:
                self._spoil(inode)
                raise disk_error(error, "staging") from error
            except StoreFull:
                if last_try:
                    self._spoil(inode)
                raise
            self._dirty(number, max(size, end))
        return len(data)

    def truncate(self, inode: int, size: int) -> None:
        """Within the lock: cut or extend what is staged of *inode* to *size* bytes. TooLarge, StoreFull as `write`."""
        if size > IMAGE_BYTES_MAX:
            raise TooLarge("an image has at most 4 GiB - 1 bytes")
        number = self.stage(inode, empty=size == 0)
        old = self._staging.state(number).size
        if size > old:
            self.writer().check_room(size - old)
            self._staging.truncate(number, old)  # as in `write`
            self._staging.truncate(number, size)
            self._dirty(number, size)
        else:
            # The entry first: a file that is longer than its entry says is harmless, a shorter one lacks bytes.
            self._dirty(number, size)
            self._staging.truncate(number, size)

    def _spoil(self, inode: int) -> None:
        """Keep what lacks a write from becoming the image: whoever ignores the error must not lose the old one."""
        number = self._staging.find(inode)
        if number >= 0:
            state = self._staging.state(number)
            self._staging.update(number, state._replace(flags=state.flags | SPOILED))

    def _dirty(self, number: int, size: int) -> None:
        now = self.writer().now_ns()
        flags, owner, _, _, _ = self._staging.state(number)
        flags = flags | DIRTY if size else (flags | DIRTY) & ~SPOILED
        self._staging.update(number, (flags, owner, size, now, now))

    def set_staged(self, inode: int, *, owner: int | None = None, mtime_ns: int | None = None) -> None:
        """Within the lock: change what the needle of a dirty image will say."""
        number = self._staging.find(inode)
        state = self._staging.state(number)
        self._staging.update(
            number,
            state._replace(
                owner=state.owner if owner is None else owner,
                mtime_ns=state.mtime_ns if mtime_ns is None else mtime_ns,
                ctime_ns=self.writer().now_ns(),
            ),
        )

    def dirty_bytes(self, inode: int) -> int:
        """Return how many bytes a flush of *inode* would copy, 0 if it has nothing to do."""
        state = self.staged_state(inode)
        return state.size + 1 if state is not None and state.flags & DIRTY else 0

    def commit(self, inode: int) -> None:
        """Within the lock: if *inode* is dirty, make what is staged the image, in one needle.

        What is staged is ended in the same step, at half the cost, if its only writer would find little to stage anew:
        behind a flush, that of an fsync too, mostly nothing comes but a close.

        An image that was unlinked meanwhile is left as it is: nobody can find it after a crash.

        Raises:
            StoreFull, DiskFailure: as `Log.append`, StoreFull also if a write had found the disk full; the old image is
                whole, and what is staged stays.
        """
        if not self._table.record(slot_of(inode)).flags & Flag.STAGED:
            return
        number = self._staging.find(inode)
        if number < 0:
            return
        flags, owner, size, mtime_ns, ctime_ns = self._staging.state(number)
        if not flags & DIRTY:
            return
        record = self.record(inode)
        if not record.live:
            return
        if flags & SPOILED:
            raise StoreFull("the disk was full when this image was written; the old one stays")
        uid, gid, mode = self._table.owner(owner)
        parent, name = self.own_name(inode, record)
        needle = Needle(record.kind, inode, parent, name, size, mode, uid, gid, 0, mtime_ns, ctime_ns)
        second = None
        if flags & ATTRIBUTED:
            attributes = self.waiting_attributes(inode)
            second = Part(Needle(Kind.XATTR, inode, data_size=len(attributes)), [attributes], None)
        if size <= SMALL_BYTES:
            ended = size <= _STAGED_ANEW_BYTES and self._handles.writers(inode) == 1
            data = self._staging.read(number, 0, size)
            if len(data) < size:  # the file is sparse at its end
                data += bytes(size - len(data))
            self.writer().append(needle, [data] if data else [], second=second, staged=number, ended=ended)
            if ended:
                self._staging.free(number)
        else:
            pieces = self._staged_pieces(number, size)
            self.writer().append(needle, [], large=pieces, second=second, staged=number)

    def _unstage(self, number: int, ended: bool) -> None:
        """Within `Memory.change`: needles hold what is in entry *number*; if it is *ended* nobody finds it any more."""
        if not ended:
            self._staging.clean(number)
            return
        inode = self._staging.withdraw(number)
        slot = slot_of(inode)
        self._table.set_flags(slot, self._table.record(slot).flags & ~Flag.STAGED)

    def waiting_attributes(self, inode: int) -> bytes:
        """Return the packed extended attributes that wait for the first needle of *inode*.

        Raises:
            DiskFailure: they cannot be read, perhaps because that needle came meanwhile.
        """
        number = self._staging.find(inode)
        if number < 0 or not self._staging.state(number).flags & ATTRIBUTED:
            return b""
        try:
            return self._staging.attributes(number)
        except OSError as error:
            raise disk_error(error, "staging") from error

    def own_name(self, inode: int, record: Record) -> tuple[int, bytes]:
        """Return directory and name of *inode*, which has *record*; 0 and nothing if only links name it."""
        directory = record.parent - 1
        parent = inode_of(directory, self._table.record(directory).generation)
        number = self._staging.find(inode) if record.flags & Flag.UNBORN else -1
        if number >= 0:
            return parent, self._staging.name(number)
        if not record.name_offset:
            return parent, b""
        return parent, self._volumes.get(record.name_volume).names.get(record.name_offset)

    def _staged_pieces(self, number: int, size: int) -> Iterator[bytes]:
        for at in range(0, size, CHUNK_BYTES):
            wanted = min(CHUNK_BYTES, size - at)
            piece = self._staging.read(number, at, wanted)
            yield piece + bytes(wanted - len(piece))

    def drop_staged(self, inode: int) -> None:
        """Within the lock: forget what is staged of *inode*, which was put anew; its writers go on from there."""
        number = self._staging.find(inode)
        if number >= 0:
            self._end(number, inode, self._table.record(slot_of(inode)))

    def _end(self, number: int, inode: int, record: Record) -> None:
        """Forget entry *number*, which is that of *inode*, and in the same step that it was staged.

        *record* is what stands in its slot, which may have been given away.
        """
        with self._table.memory.change():
            self._staging.withdraw(number)
            if record.generation == inode >> 32:
                self._table.set_flags(slot_of(inode), record.flags & ~Flag.STAGED)
        self._staging.free(number)

    def is_staged(self, inode: int) -> bool:
        """Return whether *inode* is being written, or the slot it had belongs to another."""
        record = self._table.whole_record(slot_of(inode))
        return record.flags & Flag.STAGED != 0 or record.generation != inode >> 32

    def is_left_over(self, inode: int) -> bool:
        """Return whether *inode* is unlinked and something is staged of it still, for those who have it open."""
        record = self._table.whole_record(slot_of(inode))
        return not record.live and bool(record.flags & Flag.STAGED) and record.generation == inode >> 32

    def end_staging(self, inode: int) -> None:
        """Within the lock: forget what is staged of *inode*, once nobody can write to it or, unlinked, read it."""
        slot = slot_of(inode)
        record = self._table.record(slot)
        if record.generation == inode >> 32:
            if not record.flags & Flag.STAGED:
                return
            if self._handles.writers(inode) if record.live else self._handles.in_use(slot):
                return
        number = self._staging.find(inode)
        if number >= 0:
            self._end(number, inode, record)
