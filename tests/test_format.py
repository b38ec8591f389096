"""The bytes on disk: what is packed comes back, what was changed by a byte does not, and sizes are as documented."""

import json
import struct
from dataclasses import replace
from typing import Any

import pytest
import xxhash
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from imgfs import __version__, format
from imgfs.errors import Damaged, NewerFormat
from imgfs.format import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    IMAGE_BYTES_MAX,
    INDEX_RECORD,
    NAME_BYTES_MAX,
    NEEDLE_HEADER_BYTES,
    NEEDLE_HEADER_BYTES_MAX,
    NEEDLES_START,
    VOLUME_BYTES_LIMIT,
    VOLUME_HEADER,
    VOLUME_HEADER_BYTES,
    ChecksumBuilder,
    IndexState,
    Kind,
    Needle,
    PreviousEnd,
    Tag,
    VolumeHeader,
    aligned,
    checksums,
    footer_bytes,
    inode_of,
    name_hash,
    pack_extras,
    pack_footer,
    pack_needle_header,
    pack_volume_header,
    seconds,
    slot_of,
    unpack_extras,
    unpack_footer,
    unpack_needle_header,
    unpack_volume_header,
)
from imgfs.superblock import Superblock, pack_superblock, unpack_superblock


def unsigned(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


TIMES = st.integers(-(1 << 63), (1 << 63) - 1)
EXTRAS = st.dictionaries(unsigned(16), st.binary(max_size=40), max_size=4)
NEEDLES = st.builds(
    Needle,
    kind=st.sampled_from(Kind),
    inode=unsigned(64),
    parent=unsigned(64),
    name=st.binary(max_size=NAME_BYTES_MAX),
    data_size=unsigned(32),
    mode=unsigned(16),
    uid=unsigned(32),
    gid=unsigned(32),
    owner=unsigned(16),
    mtime_ns=TIMES,
    ctime_ns=TIMES,
    commit_ns=TIMES,
    sequence=unsigned(64),
    durable=unsigned(64),
    flags=unsigned(8),
    extras=EXTRAS,
)
SEEDS = unsigned(64)
OFFSETS = st.integers(0, (1 << 32) - 1).map(lambda number: number * 8)
INDEX_STATES = st.builds(IndexState, unsigned(64), unsigned(64), unsigned(32), unsigned(64), unsigned(32))
HEADERS = st.builds(
    VolumeHeader,
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
    unsigned(64),
    unsigned(64),
    TIMES,
    unsigned(64),
    st.none() | st.builds(PreviousEnd, unsigned(64), unsigned(64), INDEX_STATES),
)


def changed(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]


# -- sizes --------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_format() -> None:
    assert (INDEX_RECORD.size, NEEDLE_HEADER_BYTES, VOLUME_HEADER_BYTES) == (39, 96, 96)
    assert NEEDLE_HEADER_BYTES % 8 == VOLUME_HEADER_BYTES % 8 == NEEDLES_START % 8 == 0
    assert VOLUME_BYTES_LIMIT == 32 << 30
    assert IMAGE_BYTES_MAX == (4 << 30) - 1


def test_numbers_on_disk_do_not_change() -> None:
    kinds = "FREE FILE DIRECTORY SYMLINK SPECIAL DELETE RENAME EXCHANGE LINK ATTRIBUTES XATTR OWNER CHECKPOINT"
    assert [kind.name for kind in sorted(Kind)] == kinds.split()
    assert list(map(int, sorted(Kind))) == list(range(13))
    assert {tag.name: int(tag) for tag in Tag} == {
        "PREVIOUS_END": 1,
        "READABLE_BY": 2,
        "OLD_PARENT": 3,
        "REPLACED": 4,
        "CHECKPOINT": 5,
        "TARGET": 6,
        "DEVICE": 7,
        "REPLACES": 8,
        "RESCUED": 9,
    }


def test_every_extra_that_is_written_fits_what_a_scan_reads() -> None:
    number = bytes(8)
    for extras in ({Tag.OLD_PARENT: number, Tag.REPLACED: number}, {Tag.CHECKPOINT: bytes(format.INDEX_STATE.size)}):
        needle = Needle(Kind.RENAME, 1, name=b"n" * NAME_BYTES_MAX, extras=dict(extras))
        assert len(pack_needle_header(needle, 0, 0)) <= NEEDLE_HEADER_BYTES_MAX


@given(st.integers(0, IMAGE_BYTES_MAX))
def test_a_needle_takes_whole_units_of_eight_bytes(size: int) -> None:
    needle = Needle(Kind.FILE, 1, name=b"abc", data_size=size)
    assert needle.length % 8 == 0
    assert 0 <= needle.length - (96 + 3 + size + footer_bytes(size)) < 8
    assert aligned(needle.length) == needle.length


@pytest.mark.parametrize(
    ("size", "footer"),
    [(0, 0), (1, 8), (CHUNK_BYTES, 8), (CHUNK_BYTES + 1, 16), (2 * CHUNK_BYTES, 16), (IMAGE_BYTES_MAX, 8 + 4 * 4096)],
)
def test_above_a_mib_the_footer_has_a_checksum_for_each(size: int, footer: int) -> None:
    assert footer_bytes(size) == footer


# -- needles ------------------------------------------------------------------------------------------------------


@given(NEEDLES, SEEDS, OFFSETS, st.binary(max_size=20))
def test_a_needle_header_comes_back(needle: Needle, seed: int, offset: int, behind: bytes) -> None:
    packed = pack_needle_header(needle, seed, offset)
    assert len(packed) == needle.data_start
    assert len(packed) == NEEDLE_HEADER_BYTES + len(pack_extras(needle.extras)) + len(needle.name)
    found = unpack_needle_header(packed + behind, seed, offset)
    assert found == needle
    assert found.length == needle.length
    assert unpack_needle_header(memoryview(packed), seed, offset) == needle


@given(NEEDLES, SEEDS, OFFSETS, st.data())
def test_a_needle_header_with_any_byte_changed_is_none(
    needle: Needle, seed: int, offset: int, data: st.DataObject
) -> None:
    packed = pack_needle_header(needle, seed, offset)
    at = data.draw(st.integers(0, len(packed) - 1))
    assert unpack_needle_header(changed(packed, at), seed, offset) is None
    assert unpack_needle_header(packed[:at], seed, offset) is None


@given(NEEDLES, SEEDS, OFFSETS)
def test_a_needle_header_counts_only_where_it_was_written(needle: Needle, seed: int, offset: int) -> None:
    packed = pack_needle_header(needle, seed, offset)
    assert unpack_needle_header(packed, seed, offset + 8) is None
    assert unpack_needle_header(packed, seed ^ 1 << 40, offset) is None


@given(EXTRAS)
def test_extra_fields_come_back_also_unknown_ones(extras: dict[int, bytes]) -> None:
    packed = pack_extras(extras)
    assert len(packed) % 8 == 0
    assert unpack_extras(packed) == extras


def test_an_extra_field_that_runs_past_the_end_is_dropped() -> None:
    assert unpack_extras(pack_extras({9: b"x" * 12}) + struct.pack("<HH", 7, 5) + b"1234") == {9: b"x" * 12}
    assert unpack_extras(b"\1") == {}


def test_a_number_in_an_extra_field() -> None:
    needle = Needle(Kind.RENAME, 1, extras={Tag.REPLACED: (1 << 63).to_bytes(8, "little")})
    assert needle.extra_u64(Tag.REPLACED) == 1 << 63
    assert needle.extra_u64(Tag.OLD_PARENT) == 0


# -- data ---------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=100), SEEDS, st.data())
def test_a_footer_comes_back_and_belongs_to_one_header(data: bytes, header: int, draw: st.DataObject) -> None:
    sums = checksums(data)
    footer = pack_footer(sums, len(data), header)
    assert len(footer) == footer_bytes(len(data))
    assert unpack_footer(footer, len(data), header) == sums
    if data:
        at = draw.draw(st.integers(0, len(footer) - 1))
        assert unpack_footer(changed(footer, at), len(data), header) is None
        assert unpack_footer(footer[:at], len(data), header) is None
        assert unpack_footer(footer, len(data), header ^ 1) is None


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
@pytest.mark.parametrize("piece", [1000, CHUNK_BYTES // 2 + 1, CHUNK_BYTES, 4 * CHUNK_BYTES])
def test_checksums_do_not_depend_on_the_pieces(size: int, piece: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    builder = ChecksumBuilder()
    for at in range(0, size, piece):
        builder.add(data[at : at + piece])
    sums = builder.finish()
    assert sums == checksums(data)
    assert sums.data == crc32c(data)
    chunks = [crc32c(data[at : at + CHUNK_BYTES]) for at in range(0, size, CHUNK_BYTES)]
    assert sums.chunks == (tuple(chunks) if size > CHUNK_BYTES else ())
    footer = pack_footer(sums, size, 77)
    assert len(footer) == footer_bytes(size)
    assert unpack_footer(footer, size, 77) == sums


# -- volume headers -----------------------------------------------------------------------------------------------


@given(HEADERS)
def test_a_volume_header_comes_back_from_either_copy(header: VolumeHeader) -> None:
    packed = pack_volume_header(header)
    assert len(packed) == NEEDLES_START
    assert unpack_volume_header(packed) == header
    assert unpack_volume_header(bytes(4096) + packed[4096:]) == header
    assert unpack_volume_header(packed[:4096]) == header
    with pytest.raises(Damaged, match="neither copy"):
        unpack_volume_header(changed(changed(packed, 40), 4096 + 50))


@given(HEADERS, st.data())
def test_a_volume_header_with_any_byte_changed_comes_from_the_other_copy(
    header: VolumeHeader, data: st.DataObject
) -> None:
    packed = pack_volume_header(header)
    (length,) = struct.unpack_from("<H", packed, 10)
    at = data.draw(st.integers(0, length - 1))
    assert unpack_volume_header(changed(packed, at)) == header
    with pytest.raises(Damaged):
        unpack_volume_header(changed(packed[:4096], at))


@pytest.mark.parametrize("size", [0, 1, 95, 96, 100])
def test_a_short_volume_is_damaged(size: int) -> None:
    header = VolumeHeader(bytes(16), bytes(16), 1, 1, 0, 1 << 20)
    with pytest.raises(Damaged):
        unpack_volume_header(pack_volume_header(header)[:size])


def test_volumes_have_seeds_of_their_own() -> None:
    header = VolumeHeader(bytes(16), bytes(16), 1, 1, 0, 1 << 20)
    others = replace(header, volume_id=2), replace(header, salt=b"\1" + bytes(15))
    assert len({each.seed() for each in (header, *others)}) == 3


def volume_header_of(version: int, incompatible: int, compatible: int, release: bytes | None) -> bytes:
    """Return a volume header as another release might write it."""
    extras = pack_extras({999: b"?"} | ({Tag.READABLE_BY: release} if release else {}))
    fixed = VOLUME_HEADER.pack(
        b"imgfsvol", version, 96 + len(extras), incompatible, compatible, 0, bytes(16), bytes(16), 7, 1, 0, 1 << 20
    )
    return fixed + struct.pack("<Q", xxhash.xxh3_64_intdigest(fixed + extras)) + extras


@pytest.mark.parametrize(("version", "incompatible"), [(FORMAT_VERSION + 1, 0), (FORMAT_VERSION, 1 << 31)])
def test_a_newer_volume_is_refused_and_names_the_release(version: int, incompatible: int) -> None:
    with pytest.raises(NewerFormat, match=rf"volume 7 has format {version}; install imgfs 9\.8\.7 or newer"):
        unpack_volume_header(volume_header_of(version, incompatible, 0, b"9.8.7"))
    with pytest.raises(NewerFormat, match="a newer one"):
        unpack_volume_header(volume_header_of(version, incompatible, 0, None))


def test_compatible_features_and_unknown_tags_are_passed_over() -> None:
    assert unpack_volume_header(volume_header_of(FORMAT_VERSION, 0, 1 << 31, b"9.8.7")).volume_id == 7


# -- superblock ---------------------------------------------------------------------------------------------------

SUPERBLOCK = Superblock(bytes(range(16)), 1 << 30)


def superblock_with(**changes: Any) -> bytes:
    """Return a superblock as another release might write it."""
    fields = json.loads(pack_superblock(SUPERBLOCK)) | changes
    del fields["checksum"]
    checksum = f"{crc32c(json.dumps(fields, sort_keys=True).encode()):08x}"
    return json.dumps(fields | {"checksum": checksum}).encode()


@given(st.binary(min_size=16, max_size=16), st.integers(NEEDLES_START + 1, VOLUME_BYTES_LIMIT))
def test_a_superblock_comes_back(store_id: bytes, limit: int) -> None:
    superblock = Superblock(store_id, limit)
    assert unpack_superblock(pack_superblock(superblock)) == superblock


def test_a_superblock_says_which_release_reads_it() -> None:
    fields = json.loads(pack_superblock(SUPERBLOCK))
    assert (fields["format"], fields["readable_by"]) == (FORMAT_VERSION, __version__)


@pytest.mark.parametrize("changes", [{"format": FORMAT_VERSION + 1}, {"incompatible": 4}])
def test_a_newer_store_is_refused_and_names_the_release(changes: dict[str, int]) -> None:
    with pytest.raises(NewerFormat, match=r"install imgfs 12\.3 or newer"):
        unpack_superblock(superblock_with(readable_by="12.3", **changes))


def test_what_a_newer_release_added_compatibly_is_passed_over() -> None:
    assert unpack_superblock(superblock_with(compatible=8, colour="green")) == SUPERBLOCK


@given(st.data())
def test_a_damaged_superblock_is_noticed(data: st.DataObject) -> None:
    packed = pack_superblock(SUPERBLOCK)
    at = data.draw(st.integers(0, len(packed) - 1))
    damaged = data.draw(st.sampled_from([packed[:at], changed(packed, at)]))
    try:
        found = unpack_superblock(damaged)
    except Damaged:
        return
    assert found == SUPERBLOCK  # white space, or the last line's end


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"7", b'"x"', b"{}", b"\xff", b'{"checksum": "00000000"}', b"[" * 100_000]
)
def test_what_is_no_superblock_is_damaged(data: bytes) -> None:
    with pytest.raises(Damaged, match="made again from the volumes"):
        unpack_superblock(data)


# -- numbers ------------------------------------------------------------------------------------------------------


@given(unsigned(28), unsigned(8))
def test_an_inode_is_slot_and_generation(slot: int, generation: int) -> None:
    inode = inode_of(slot, generation)
    assert inode > 0
    assert (slot_of(inode), inode >> 32) == (slot, generation)


def test_times_in_records_are_seconds_that_fit() -> None:
    assert [seconds(value) for value in (-1, 0, 1_999_999_999, 1 << 62)] == [0, 0, 1, (1 << 32) - 1]
    assert slot_of(0) == -1


@given(st.binary(max_size=255), unsigned(64))
def test_a_name_has_24_bits_of_hash(name: bytes, seed: int) -> None:
    assert 0 <= name_hash(name, seed) < 1 << 24
    assert name_hash(name, seed) == xxhash.xxh3_64_intdigest(name, seed) & 0xFF_FFFF
