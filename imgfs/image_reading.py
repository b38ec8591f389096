"""Reading the bytes of images: verified when opened, a MiB at a time where they are large.

Owns what of them is verified when, and what verified bytes are kept. Must not know names or directories, nor how an
image is written; of one that is being written it reads what is staged.

*Concurrency:* reading takes no lock: a record is read, then the disk, then the record again, and if it moved
meanwhile the read starts over.
"""

from typing import NamedTuple

from imgfs.errors import Damaged, IsADirectory, Stale
from imgfs.format import (
    ALIGNMENT,
    CHUNK_BYTES,
    NEEDLE_HEADER_BYTES_MAX,
    Checksums,
    Kind,
    Needle,
    checksums,
    footer_bytes,
    slot_of,
    unpack_footer,
)
from imgfs.handles import Handles
from imgfs.layout import Flag
from imgfs.records import Record
from imgfs.settings import MIB
from imgfs.staging import Staging, is_refused
from imgfs.table import Table
from imgfs.verified import Verified
from imgfs.volumes import Volumes

_KIND, _DIRECTORY, _WRITTEN = Flag.KIND, int(Kind.DIRECTORY), Flag.STAGED | Flag.UNBORN
# An image up to this size is verified as a whole when it is opened; of a larger one each MiB when it is read.
VERIFIED_AT_OPEN = 4 * MIB
# An image that one read takes whole, and that is in memory, is verified again then: that costs less than to keep it.
_NOT_KEPT_BYTES = 128 << 10


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


class ImageReading:
    """The bytes of all images of one store, to be read."""

    def __init__(self, table: Table, volumes: Volumes, handles: Handles, staging: Staging) -> None:
        self._table = table
        self._volumes = volumes
        self._handles = handles
        self._staging = staging
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
                if number < 0:
                    if self.record(inode) == record:
                        raise Stale(f"inode {inode:#x} was never closed, and is gone")
                    continue
                entry = self._staging.look(number)
                if entry.inode != inode:
                    continue  # it ended meanwhile, and is perhaps begun anew
                if not is_refused(entry.flags):
                    staged = self._staging.read(number, offset, min(size, entry.size - offset), nowait=nowait)
                    if self._staging.look(number) == entry:
                        return staged
                    continue  # it was written to meanwhile, or ended
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
