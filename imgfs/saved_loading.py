"""Loads the table that the last clean stop has kept, if the volumes and their index are still what it was made from.

Owns the rule when `saved.table` is believed (docs/crash.md): every byte of it has its checksum, and of every volume
header, size and last needle are those it names. The index files are verified as at any other start. Must not know what
records mean.

*Concurrency:* runs before the store is shared, with a thread of its own that only takes the pieces into the memory.
Both wait for the disk, and let go of the interpreter while they sum up.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from crc32c import crc32c

from imgfs.disk import Disk
from imgfs.errors import Damaged
from imgfs.format import INDEX_RECORD_BYTES, NEEDLE_HEADER_BYTES_MAX, NEEDLES_START
from imgfs.index import Names, index_paths
from imgfs.layout import ARENA_AT, LINKS_AT, PAGE, VOLUME, VOLUME_GONE, VOLUME_SEALED, VOLUMES_AT, Word
from imgfs.recover import Tail
from imgfs.saved_format import PIECE_BYTES, SAVED_TABLE, Front, SavedVolume, front_bytes, piece_seed, pieces
from imgfs.saved_table import ARENA_FREE, SAVED_WORDS, Ending, endings, read_front, read_piece
from imgfs.table import Table
from imgfs.volume import Volume
from imgfs.volumes import VOLUMES, OpenVolume, Volumes, volume_path

log = logging.getLogger(__name__)

# So much is asked of the disk before it is read. Index files are small, and each begins with a wait for its inode.
_AHEAD_BYTES = 16 << 20


class _IndexFile(NamedTuple):
    """An open index file, and what it must be: *size* bytes with that checksum, and *last* behind them."""

    file: int
    path: str
    size: int
    crc: int
    last: bytes


class Loaded(NamedTuple):
    """What a saved table made it unnecessary to find out."""

    volumes: Volumes
    tail: Tail


def load_table(disk: Disk, root: str, table: Table, store_id: bytes, *, writable: bool) -> Loaded | None:
    """Fill the empty *table* of the store at *root* from the file that its last stop left, if that is still right.

    None: it is not, or there is none; the table is empty then, and the volumes have to be read.

    Raises:
        NewerFormat: a newer release wrote one of the volumes.
        OSError: as the disk says.
    """
    path = f"{root}/{SAVED_TABLE}"
    if not disk.exists(path):
        return None
    volumes = Volumes(disk, f"{root}/{VOLUMES}", table)
    file = disk.open(path)
    try:
        return _Loading(disk, root, table, file, volumes).run(store_id, writable=writable)
    except BaseException as error:
        volumes.close()
        table.memory.clear()
        if not isinstance(error, Damaged):
            raise
        log.info("%s is not used, the table is made again: %s", path, error)
        return None
    finally:
        disk.close(file)


class _Loading:
    """The loading of one saved table."""

    def __init__(self, disk: Disk, root: str, table: Table, file: int, volumes: Volumes) -> None:
        self._disk = disk
        self._directory = f"{root}/{VOLUMES}"
        self._memory = table.memory
        self._file = file
        self._volumes = volumes
        self._in_vain = threading.Event()

    def run(self, store_id: bytes, *, writable: bool) -> Loaded:
        """Load it. Damaged, if it is not right; then the memory holds parts of it."""
        front = read_front(self._disk, self._file)
        header = front.header
        if header.store_id != store_id:
            raise Damaged("it is that of another store")
        if not (writable or _is_in_order(front.volumes)):
            raise Damaged("its volumes are in another order than a reader has them")
        with ThreadPoolExecutor(1) as beside:
            read = beside.submit(self._read, front)
            try:
                found = self._open(front)
                self._verify_indexes(found)
            except BaseException:
                self._in_vain.set()
                raise
            read.result()
        self._set(front)
        row, ending = front.volumes[header.active], found[header.active]
        assert ending.final is not None
        before, record = ending.state, ending.last_record()
        state = before._replace(end=row.end, records=before.records + 1, records_crc=crc32c(record, before.records_crc))
        path = volume_path(self._directory, row.volume_id)
        tail = Tail(path, header.active, state, [], ending.final.durable, 0, sealed=False, checkpointed=True)
        return Loaded(self._volumes, tail)

    def _open(self, front: Front) -> dict[int, Ending]:
        """Open the volumes, if they are those of *front* and no others; return how each ends, by row. Damaged."""
        rows = {number: row for number, row in enumerate(front.volumes) if not row.flags & VOLUME_GONE}
        paths = {number: volume_path(self._directory, row.volume_id) for number, row in rows.items()}
        expected = [each for path in paths.values() for each in (path, *index_paths(path))]
        if sorted(expected) != [f"{self._directory}/{name}" for name in self._disk.names(self._directory)]:
            raise Damaged("there are other volumes")
        opened: dict[int, Volume] = {}
        for number, row in rows.items():
            self._prefetch_ends(paths[number], row.size)
        for number, row in rows.items():
            volume = Volume.open(self._disk, paths[number])
            try:
                names = Names(self._disk, self._disk.open(index_paths(paths[number]).names))
            except BaseException:
                volume.close()
                raise
            self._volumes.add(number, OpenVolume(volume, names))
            opened[number] = volume
            header = volume.header
            if (header.store_id, header.volume_id, header.first_sequence, header.salt, volume.size()) != (
                front.header.store_id,
                row.volume_id,
                row.first_sequence,
                row.salt,
                row.size,
            ):
                raise Damaged(f"volume {row.volume_id} is another one, or has changed")
        found = endings(opened)
        for number, row in rows.items():
            last, sealed = number == front.header.active, bool(row.flags & VOLUME_SEALED)
            if (found[number].end, found[number].mark, sealed) != (row.end, row.mark, not last):
                raise Damaged(f"volume {row.volume_id} has changed")
        if front.header.active not in rows or found[front.header.active].final is None:
            raise Damaged("the volume that comes last is not there")
        return found

    def _prefetch_ends(self, path: str, size: int) -> None:
        """Let the disk begin to read the header and the last needle of a volume, while others are asked for theirs."""
        file = self._disk.open(path)
        try:
            self._disk.prefetch(file, 0, NEEDLES_START)
            self._disk.prefetch(file, max(0, size - NEEDLE_HEADER_BYTES_MAX), NEEDLE_HEADER_BYTES_MAX)
        finally:
            self._disk.close(file)

    def _read(self, front: Front) -> None:
        """Take the pieces into the memory. Damaged."""
        seed, at = piece_seed(front.header), front_bytes(front.header)
        with memoryview(bytearray(PIECE_BYTES)) as buffer:
            self._disk.prefetch(self._file, at, _AHEAD_BYTES)
            for number, (start, size) in enumerate(pieces(front.header)):
                if self._in_vain.is_set():
                    return
                self._disk.prefetch(self._file, at + _AHEAD_BYTES, size)
                with buffer[:size] as piece:
                    read_piece(self._disk, self._file, at, piece, front.sums[number], seed, number)
                    self._store(start, piece)
                at += size

    def _store(self, start: int, piece: memoryview) -> None:
        """Store *piece* in the memory; of buckets only pages that hold any, for many regions are half empty."""
        if not ARENA_AT <= start < LINKS_AT:
            self._memory.load(start, piece)
            return
        for at in range(0, len(piece), PAGE):
            with piece[at : at + PAGE] as page:
                if any(page.cast("Q")):
                    self._memory.load(start + at, page)

    def _set(self, front: Front) -> None:
        """Let the memory say what the front does: from here on it is a table."""
        words, header = self._memory.words, front.header
        for number, row in enumerate(front.volumes):
            place = VOLUMES_AT + VOLUME.size * number
            VOLUME.pack_into(self._memory.map, place, row.volume_id, row.end, row.first_sequence, row.flags)
        words[Word.VOLUMES] = header.volumes
        for word, value in zip(SAVED_WORDS, header.numbers, strict=True):
            words[word] = value
        for number, value in enumerate(ARENA_FREE.unpack(header.arena_free)):
            words[Word.ARENA_FREE + number] = value

    # -- the index ------------------------------------------------------------------------------------------------

    def _verify_indexes(self, found: dict[int, Ending]) -> None:
        """Read the index files of all volumes. Damaged, unless each of them is what its volume says."""
        opened: deque[_IndexFile] = deque()
        ahead_bytes = 0
        try:
            for index_file in self._index_files(found):
                opened.append(index_file)
                ahead_bytes += index_file.size
                while ahead_bytes > _AHEAD_BYTES:
                    ahead_bytes -= opened[0].size
                    self._verify(opened[0])
                    self._disk.close(opened.popleft().file)
            for index_file in opened:
                self._verify(index_file)
        finally:
            for index_file in opened:
                self._disk.close(index_file.file)

    def _index_files(self, found: dict[int, Ending]) -> Iterator[_IndexFile]:
        """Open the index files one after the other, and let the disk begin to read them."""
        for number, ending in found.items():
            paths, state, last = index_paths(self._volumes.get(number).volume.path), ending.state, ending.last_record()
            records_bytes = state.records * INDEX_RECORD_BYTES
            for path, size, crc, behind in (
                (paths.records, records_bytes, state.records_crc, last),
                (paths.names, state.names_bytes, state.names_crc, b""),
            ):
                file = self._disk.open(path)
                self._disk.prefetch(file, 0, size)
                yield _IndexFile(file, path, size, crc, behind)

    def _verify(self, index_file: _IndexFile) -> None:
        """Make sure that *index_file* is what its volume says. Damaged."""
        file, path, size, crc, last = index_file
        right = self._disk.size(file) == size + len(last) and self._crc(file, size) == crc
        if not right or self._disk.read(file, size, len(last)) != last:
            raise Damaged(f"{path} is not what its volume says")

    def _crc(self, file: int, size: int) -> int:
        """Return the checksum of the first *size* bytes of *file*."""
        crc = 0
        with memoryview(bytearray(PIECE_BYTES)) as buffer:
            for at in range(0, size, PIECE_BYTES):
                with buffer[: min(PIECE_BYTES, size - at)] as piece:
                    self._disk.read_into(file, at, piece)
                    crc = crc32c(piece, crc)
        return crc


def _is_in_order(rows: tuple[SavedVolume, ...]) -> bool:
    """Return whether *rows* are as a recovery would have made them."""
    order = [(row.first_sequence, row.volume_id) for row in rows]
    return not any(row.flags & VOLUME_GONE for row in rows) and order == sorted(order)
