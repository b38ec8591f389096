"""Headers of volumes and superblocks that no release writes, and files that belong elsewhere: said, and left out.

Most of these were found by fuzzing.py: a traceback, all memory taken, or no end, where one line and one image was due.
"""

import struct
from dataclasses import replace

import pytest
import xxhash
from hostile import BIG, SUPERBLOCK, VOLUME, few_images, without_index
from snapshots import snapshot
from stores import PATH, TINY, content, disk_of, names, new_store, open_store, put, reopened

from imgfs.errors import Damaged, StoreLimit
from imgfs.format import (
    CHECKSUM,
    INDEX_STATE,
    NEEDLES_START,
    VOLUME_HEADER,
    Tag,
    pack_extras,
    pack_volume_header,
    unpack_volume_header,
)
from imgfs.layout import Word
from imgfs.plausible import NUMBER_MAX, plausible_header
from imgfs.store import ROOT
from imgfs.superblock import Superblock, pack_superblock, unpack_superblock
from imgfs.volumes import volume_id_of

pytestmark = pytest.mark.usefixtures("no_store_stays_open")


def test_what_ends_within_its_header_is_damage() -> None:
    """The last volume was cut within the second copy of its header: a store that can be written, and says so."""
    for size in (4096, 5000, NEEDLES_START - 1):
        disk = few_images()
        disk.set_content(VOLUME, disk.content(VOLUME)[:size])
        for writable in (False, True):
            with open_store(disk, writable=writable) as store:
                assert (1, size) in [(damage.volume, damage.offset) for damage in store.report.damage]
                assert not names(store)
                if writable:
                    put(store, ROOT, b"new", b"new")
        with open_store(disk) as store:
            assert content(store, store.resolve(b"new")) == b"new"


@pytest.mark.parametrize(
    ("name", "volume_id"),
    [
        ("00000012.vol", 12),
        ("00000012.vol.new", 12),
        ("12.idx", 12),
        ("\u00b2.vol", 0),
        ("\u0663.vol", 0),
        ("x.vol", 0),
        (".vol", 0),
        ("-1.vol", 0),
        ("922337203685477580.vol", 922337203685477580),
        ("9223372036854775808.vol", 0),
        ("9" * 200, 0),
    ],
)
def test_names_of_files_among_the_volumes(name: str, volume_id: int) -> None:
    assert volume_id_of(name) == volume_id
    disk = few_images()
    disk.set_content(f"{PATH}/volumes/{name}", b"no volume")
    store = open_store(disk)
    for number in range(20):  # into the next volumes
        put(store, ROOT, b"%d" % number, bytes(9000))
    reader = reopened(store, writable=False)
    assert content(reader, reader.resolve(b"a")) == b"first"
    assert content(reader, reader.resolve(b"19")) == bytes(9000)


def test_a_file_with_the_highest_number_is_an_error_before_anything_is_lost() -> None:
    """No reader would believe the header of a volume with a higher one."""
    store = open_store(few_images())
    disk_of(store).set_content(f"{PATH}/volumes/{NUMBER_MAX}.vol", b"no volume")
    with pytest.raises(StoreLimit, match="highest number"):
        for number in range(20):
            put(store, ROOT, b"%d" % number, bytes(9000))
    written = names(store)
    assert len(written) > 5
    disk_of(store).remove(f"{PATH}/volumes/{NUMBER_MAX}.vol")
    assert names(reopened(store)) == written


def test_the_last_sequence_number_is_an_error_before_anything_is_lost() -> None:
    store = new_store()
    put(store, ROOT, b"a", b"first")
    store._memory.words[Word.NEXT_SEQUENCE] = NUMBER_MAX
    with pytest.raises(StoreLimit, match="sequence numbers"):
        put(store, ROOT, b"new")
    assert names(store) == {b"a"}


def test_volumes_that_belong_elsewhere_are_left_out() -> None:
    disk, other = few_images(), few_images()
    disk.set_content(f"{PATH}/volumes/00000002.vol", other.content(VOLUME))
    disk.set_content(f"{PATH}/volumes/00000003.vol", disk.content(VOLUME))
    for writable in (False, True):
        with open_store(disk, writable=writable) as store:
            assert [(damage.volume, damage.text) for damage in store.report.damage] == [
                (2, "this is a volume of another store"),
                (3, "this is volume 1 under another name; give it back its own"),
            ]
            assert names(store) == {b"a", b"b", b"c", b"d"}
    assert disk.content(f"{PATH}/volumes/00000002.vol") == other.content(VOLUME)


def test_the_superblock_of_another_store_is_an_error() -> None:
    """Else the store would begin anew, empty."""
    disk = few_images()
    disk.set_content(SUPERBLOCK, few_images().content(SUPERBLOCK))
    for writable in (False, True):
        with pytest.raises(Damaged, match="remove it, and it is made again"):
            open_store(disk, writable=writable)
    disk.remove(SUPERBLOCK)
    with open_store(disk) as store:
        assert content(store, store.resolve(b"a")) == b"first"


def test_a_volume_cannot_say_where_itself_ends() -> None:
    disk = few_images()
    data = bytearray(disk.content(VOLUME))
    extras = pack_extras({Tag.PREVIOUS_END: struct.pack("<QQ", 1, 8) + INDEX_STATE.pack(NEEDLES_START, 0, 0, 16, 0)})
    fields = list(VOLUME_HEADER.unpack_from(data))
    fields[2] = VOLUME_HEADER.size + 8 + len(extras)
    fixed = VOLUME_HEADER.pack(*fields)
    copy = fixed + CHECKSUM.pack(xxhash.xxh3_64_intdigest(fixed + extras)) + extras
    data[: len(copy)] = copy
    disk.set_content(VOLUME, bytes(data))
    with open_store(disk) as store:
        assert names(store) == {b"a", b"b", b"c", b"d"}


def test_a_header_with_half_a_field_is_not_whole() -> None:
    header = unpack_volume_header(few_images().content(VOLUME))
    data = bytearray(pack_volume_header(header))
    extras = pack_extras({Tag.PREVIOUS_END: bytes(40)})
    fields = list(VOLUME_HEADER.unpack_from(data))
    fields[2] = VOLUME_HEADER.size + 8 + len(extras)
    fixed = VOLUME_HEADER.pack(*fields)
    copy = fixed + CHECKSUM.pack(xxhash.xxh3_64_intdigest(fixed + extras)) + extras
    data[: len(copy)] = copy
    assert unpack_volume_header(bytes(data)) == header  # the other copy
    data[4096 : 4096 + len(copy)] = copy
    with pytest.raises(Damaged):
        unpack_volume_header(bytes(data))


@pytest.mark.parametrize(
    "changes",
    [{"volume_id": 0}, {"volume_id": BIG}, {"first_sequence": BIG}, {"volume_bytes_max": 0}, {"volume_bytes_max": BIG}],
)
def test_a_header_that_no_release_writes(changes: dict[str, int]) -> None:
    disk = few_images()
    header = unpack_volume_header(disk.content(VOLUME))
    assert plausible_header(header)
    disk.set_content(VOLUME, pack_volume_header(replace(header, **changes)) + disk.content(VOLUME)[NEEDLES_START:])
    with open_store(disk) as store:
        assert "no release" in store.report.damage[0].text
        put(store, ROOT, b"new")


def test_a_store_without_volumes_has_a_root() -> None:
    disk = few_images()
    disk.remove(VOLUME)
    without_index(disk)
    for writable in (False, True):
        with open_store(disk, writable=writable) as store:
            assert snapshot(store).keys() == {b""}
            assert store.name(ROOT) == b""


def test_links_before_what_they_name() -> None:
    """The volume with the first put is gone, without a trace: what is left is counted right."""
    store = new_store()
    inode = put(store, ROOT, b"a", bytes(50_000))
    put(store, ROOT, b"filler", bytes(20_000))
    store.link(inode, ROOT, b"link")
    store.put(ROOT, b"a", b"again", 5, mode=0o600, uid=0, gid=0, mtime_ns=1)
    store.close()
    disk = disk_of(store)
    disk.remove(VOLUME)
    without_index(disk)
    for path in [path for path in disk.paths() if path.endswith((".idx", ".names"))]:
        disk.remove(path)
    with open_store(disk) as writer:
        seen = snapshot(writer)
        assert seen[b"/link"].nlink == 2
        assert seen[b"/a"].data == b"again"


@pytest.mark.parametrize("limit", [-1, 0, NEEDLES_START, 1 << 36, 1 << 80])
def test_a_volume_size_that_cannot_be(limit: int) -> None:
    """It would be found out only when the next volume is begun."""
    disk = few_images()
    store_id = unpack_superblock(disk.content(SUPERBLOCK)).store_id
    disk.set_content(SUPERBLOCK, pack_superblock(Superblock(store_id, limit)))
    with open_store(disk) as store:
        assert store.settings.volume_bytes_max == TINY.volume_bytes_max
        assert store.report.rebuilt == [SUPERBLOCK]
