"""Many new images in one write: their needles, their names and their index records in one call each, one change of all.

Owns how they are packed and put into the table. Must not know when a volume is full, nor who has so many.

Order of a write (docs/crash.md): needles, names, index records, table, as for one. For a start each needle counts
by itself; whoever takes the lock after a writer was killed here cuts all of them away: nobody was told of any.

*Concurrency:* everything under `Memory.lock`.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from crc32c import crc32c

from imgfs.disk import Buffer
from imgfs.errors import StoreLimit
from imgfs.failed_sync import FailedSync
from imgfs.format import (
    INDEX_RECORD_BYTES,
    NEEDLE_HEADER_BYTES,
    IndexState,
    Kind,
    Needle,
    aligned,
    footer_bytes,
    inode_of,
    slot_of,
)
from imgfs.index import pack_name, pack_record
from imgfs.layout import BATCH, Word
from imgfs.plausible import NUMBER_MAX

# One change has room for so many images, in so many runs of one directory: the journal takes of each image the head of
# a bucket and its share of the buckets that are split, of each run the times and, at worst, a split of its own.
IMAGES_AT_ONCE = 256
DIRECTORIES_AT_ONCE = 32


class NewImage(NamedTuple):
    """An image of at most a MiB that is not in the store yet."""

    parent: int
    name: bytes
    data: Buffer
    uid: int
    gid: int
    mode: int
    mtime_ns: int  # as `storable_ns` gives it

    @property
    def length(self) -> int:
        """How many bytes of a volume it takes."""
        size = len(self.data)
        return aligned(NEEDLE_HEADER_BYTES + len(self.name) + size + footer_bytes(size))


class Batches(FailedSync):
    """The end of a store that takes many images at once."""

    def _write_images(self, images: Sequence[NewImage], owners: Mapping[tuple[int, int, int], int], first: int) -> None:
        """Append *images*, which get the slots from *first* on, never used so far; *owners* has the number of each.

        All of them are in the store then, or an exception says why none is.
        """
        before = self.state()
        volume, words = self.volume, self._words
        sequence, now_ns = words[Word.NEXT_SEQUENCE], self.now_ns()
        if sequence + len(images) > NUMBER_MAX:
            # No reader would believe them.
            raise StoreLimit("all sequence numbers are used up; copy what is here into a new store")
        end, names_end = before.end, before.names_bytes
        needle = Needle(Kind.FILE, 0, ctime_ns=now_ns, commit_ns=now_ns, durable=words[Word.DURABLE])
        needles: list[Buffer] = []
        names, records, hashes = [], [], []
        for slot, image in enumerate(images, first):
            needle.parent, needle.name, data, needle.uid, needle.gid, needle.mode, needle.mtime_ns = image
            needle.owner = owners[needle.uid, needle.gid, needle.mode]
            needle.inode, needle.sequence, needle.data_size = inode_of(slot, 0), sequence, len(data)
            header, footer = volume.around(end, needle, data)
            needles += header, data, footer
            name, value = pack_name(needle.name), self._table.hash(needle.name)
            records.append(pack_record(needle, end, names_end, value))
            names.append(name)
            hashes.append(value)
            end += len(header) + len(data) + len(footer)
            names_end += len(name)
            sequence += 1
        all_names, all_records = b"".join(names), b"".join(records)
        after = IndexState(
            end,
            before.records + len(images),
            crc32c(all_records, before.records_crc),
            names_end,
            crc32c(all_names, before.names_crc),
        )
        words[Word.APPENDING] = BATCH
        try:
            volume.write(before.end, needles)
            self._disk.write(self._names_file, before.names_bytes, [all_names])
            self._disk.write(self._records_file, before.records * INDEX_RECORD_BYTES, [all_records])
            self._apply_images(images, first, records, hashes, now_ns, after)
        except (Exception, KeyboardInterrupt):
            self._undo(before)
            self._table.forget_new(len(images))
            raise

    def _apply_images(
        self,
        images: Sequence[NewImage],
        first: int,
        records: Sequence[bytes],
        hashes: Sequence[int],
        now_ns: int,
        state: IndexState,
    ) -> None:
        """Do to the table what was written of *images*, in one step; *state* is how far the files reach then."""
        memory, table, words = self._memory, self._table, self._words
        with memory.change():
            table.put_new(first, words[Word.ACTIVE], records)
            slot = first
            for parent, group in groupby(images, lambda image: image.parent):
                count = len(list(group))
                table.buckets.extend(slot_of(parent), slot, hashes[slot - first : slot - first + count])
                table.touch(slot_of(parent), now_ns)
                slot += count
            memory.put_word(Word.NEXT_SEQUENCE, words[Word.NEXT_SEQUENCE] + len(images))
            self._progress(state)

    def carry_on(self) -> None:
        """As `Active.carry_on`; of many images that were being written none is kept."""
        if self._words[Word.APPENDING] & BATCH:
            with self._disk_errors(self._directory):
                self._undo(self.state())
            self._table.forget_new(IMAGES_AT_ONCE)
            return
        super().carry_on()
