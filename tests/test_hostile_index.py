"""An index whose checksums are right and which nobody has written is made anew, or said to be damaged.

Most of these were found by fuzzing.py: a traceback, all memory taken, or no end, where one line and one image was due.
"""

from collections.abc import Callable

import pytest
from crc32c import crc32c
from hostile import INDEX, NAMES, few_images, needles, rewrite, without_index
from powercut import SimulatedDisk
from snapshots import snapshot
from stores import content, names, open_store

from imgfs.errors import Damaged
from imgfs.format import INDEX_RECORD, INDEX_RECORD_BYTES, INDEX_STATE, IndexState, Kind, Tag
from imgfs.plausible import SLOTS_AHEAD_MAX
from imgfs.store import ROOT

pytestmark = pytest.mark.usefixtures("no_store_stays_open")


def lie_in_index(disk: SimulatedDisk, change: Callable[[bytearray, bytearray], None]) -> None:
    """Change records and names of the index, and what the last checkpoint says of them."""
    offset, needle = needles(disk)[-1]
    state = IndexState(*INDEX_STATE.unpack(needle.extras[Tag.CHECKPOINT]))
    records, index_names = bytearray(disk.content(INDEX)), bytearray(disk.content(NAMES))
    change(records, index_names)
    disk.set_content(INDEX, bytes(records))
    disk.set_content(NAMES, bytes(index_names))
    state = state._replace(
        records_crc=crc32c(bytes(records[: state.records * INDEX_RECORD_BYTES])),
        names_crc=crc32c(bytes(index_names[: state.names_bytes])),
    )
    extras = {Tag.CHECKPOINT: INDEX_STATE.pack(*state)}
    assert rewrite(disk, lambda each: each.sequence == needle.sequence, extras=extras) == offset


RECORD_FIELDS = (
    "kind",
    "slot",
    "parent",
    "name_offset",
    "offset8",
    "size",
    "mtime",
    "ctime",
    "owner",
    "hash_generation",
)
LIES = {
    "no kind": ("kind", 0),
    "slot 0": ("slot", 0),
    "slot without end": ("slot", 0xFFFF_FFFF),
    "slot far ahead": ("slot", SLOTS_AHEAD_MAX + 1000),
    "the root as an image": ("slot", 1),
    "parent without end": ("parent", 0xFFFF_FFFF),
    "no parent": ("parent", 0),
    "name beyond the end": ("name_offset", 0xFFFF_FFF0),
    "no name": ("name_offset", 0),
    "before the first needle": ("offset8", 0),
    "beyond the end": ("offset8", 0xFFFF_FFFF),
}


@pytest.mark.parametrize(("field", "value"), LIES.values(), ids=LIES)
def test_an_index_that_lies_is_made_anew(field: str, value: int) -> None:
    disk = few_images()
    with open_store(disk.after_kill()) as store:
        wanted = snapshot(store)

    def change(records: bytearray, _: bytearray) -> None:
        for row in range(0, len(records), INDEX_RECORD_BYTES):
            fields = list(INDEX_RECORD.unpack_from(records, row))
            if fields[0] == Kind.FILE:
                fields[RECORD_FIELDS.index(field)] = value
                INDEX_RECORD.pack_into(records, row, *fields)
                return

    lie_in_index(disk, change)
    for writable in (False, True):
        with open_store(disk.after_kill(), writable=writable) as store:
            assert store.report.rebuilt == [INDEX]
            assert snapshot(store).keys() == wanted.keys()
            assert store._memory.resident_bytes() < 32 << 20


@pytest.mark.parametrize("byte", [b"/", b"\0"])
def test_names_that_are_none(byte: bytes) -> None:
    """The kernel would refuse the whole listing; to look at one is EIO, and rebuild-index helps."""
    disk = few_images()

    def change(_: bytearray, index_names: bytearray) -> None:
        at = index_names.index(b"\1c")
        index_names[at + 1 : at + 2] = byte

    lie_in_index(disk, change)
    with open_store(disk.after_kill(), writable=False) as store:
        with pytest.raises(Damaged, match="rebuild-index"):
            list(store.list(ROOT))
        assert content(store, store.resolve(b"a")) == b"first"
    with open_store(without_index(disk), writable=False) as store:
        assert names(store) == {b"a", b"b", b"c", b"d"}
