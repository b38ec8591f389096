"""`imgfs dump` tells what damage did to a file, tells it from holes, and survives whatever it is given."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from dumped import HEADER, PATH, Fields, disk_with, dumped, of_word, volume_of
from hypothesis import given
from hypothesis import strategies as st

from imgfs.disk import Disk
from imgfs.errors import ImgfsError
from imgfs.format import (
    CHUNK_BYTES,
    FLAG_SEAL,
    INDEX_STATE,
    NEEDLES_START,
    VOLUME_HEADER_COPIES,
    Kind,
    Needle,
    Tag,
    pack_volume_header,
    pack_xattrs,
)
from imgfs.index import names_header, pack_name, pack_record


def images(*sizes: int) -> list[tuple[Needle, bytes]]:
    return [
        (Needle(Kind.FILE, number + 2, 1, b"image %d" % number, mode=0o644), bytes([number + 1]) * size)
        for number, size in enumerate(sizes)
    ]


def test_damaged_data_and_a_damaged_footer_are_bad() -> None:
    needles = images(500, 500, 500)
    disk, offsets = volume_of(needles)
    disk.flip(PATH, offsets[0] + needles[0][0].data_start + 7)
    disk.flip(PATH, offsets[2] + needles[2][0].length - 8)
    lines = dumped(disk)
    found = [(fields["footer"], fields["data"]) for fields in of_word(lines, "needle")]
    assert found[:2] == [("ok", "BAD"), ("ok", "ok")]
    assert found[2][0] == "BAD"
    assert lines[-1][1]["bad"] == 2


def test_of_a_large_image_the_damaged_mebibyte_is_named() -> None:
    needles = images(3 * CHUNK_BYTES + 5)
    disk, offsets = volume_of(needles)
    disk.flip(PATH, offsets[0] + needles[0][0].data_start + 2 * CHUNK_BYTES + 9)
    (fields,) = of_word(dumped(disk), "needle")
    assert (fields["data"], fields["bad_chunks"], len(fields["chunk_crcs"])) == ("BAD", [2], 4)


def test_a_damaged_header_is_shown_as_far_as_it_goes_and_costs_no_other() -> None:
    needles = images(300, 300, 300)
    disk, offsets = volume_of(needles)
    disk.flip(PATH, offsets[1] + 30)
    lines = dumped(disk)
    found = of_word(lines, "needle")
    assert [fields["header"] for fields in found] == ["ok", "BAD", "ok"]
    assert (found[1]["offset"], found[1]["name"], found[1]["data_size"]) == (offsets[1], "image 1", 300)
    gap = {"offset": offsets[1], "bytes": offsets[2] - offsets[1], "zeros": 0}
    assert of_word(lines, "gap") == [gap]


@pytest.mark.parametrize("damaged", VOLUME_HEADER_COPIES)
def test_each_copy_of_the_header_is_judged_by_itself(damaged: int) -> None:
    disk, _ = volume_of(images(10))
    disk.flip(PATH, damaged + 90)
    lines = dumped(disk)
    assert {fields["offset"]: fields["header"] for fields in of_word(lines, "header")} == {
        start: "BAD" if start == damaged else "ok" for start in VOLUME_HEADER_COPIES
    }
    assert [fields["data"] for fields in of_word(lines, "needle")] == ["ok"]


def test_needles_are_recognised_by_the_salt_of_a_damaged_header() -> None:
    disk, _ = volume_of(images(10, 20))
    disk.flip(PATH, 30)
    disk.flip(PATH, VOLUME_HEADER_COPIES[0] + 45)  # the salt of the first copy
    disk.flip(PATH, VOLUME_HEADER_COPIES[1] + 68)
    lines = dumped(disk)
    assert [fields["header"] for fields in of_word(lines, "header")] == ["BAD", "BAD"]
    assert [fields["data"] for fields in of_word(lines, "needle")] == ["ok", "ok"]


def test_without_a_salt_nothing_is_recognised_and_all_is_told() -> None:
    disk, offsets = volume_of(images(10, 20))
    size = len(disk.content(PATH))
    for copy in VOLUME_HEADER_COPIES:
        disk.flip(PATH, copy)
        disk.flip(PATH, copy + 45)
    lines = dumped(disk)
    assert lines[0][1]["kind"] == "volume"
    assert [fields["header"] for fields in of_word(lines, "needle")] == ["BAD"]
    assert of_word(lines, "gap") == [{"offset": offsets[0], "bytes": size - offsets[0], "zeros": 0}]


def test_a_needle_that_is_being_appended_is_short(filled: Path) -> None:
    disk, offsets = volume_of(images(100, 200))
    disk.set_content(PATH, disk.content(PATH)[:-40])
    lines = dumped(disk)
    found = of_word(lines, "needle")
    assert [fields.get("data") for fields in found] == ["ok", "short"]
    assert found[1]["offset"] == of_word(lines, "gap")[0]["offset"] == offsets[1]


def test_a_hole_is_told_from_damage(tmp_path: Path) -> None:
    needles = images(100, 40_000, 30_000, 100)
    disk, offsets = volume_of(needles)
    content = bytearray(disk.content(PATH))
    # As punching leaves them: whole pages, behind the header of the first of two dead neighbours.
    start, end = -(-(offsets[1] + 415) // 4096) * 4096, offsets[3] // 4096 * 4096
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.write(content[:start])
        file.seek(end)
        file.write(content[end:])
    lines = dumped(Disk(), str(path))
    assert of_word(lines, "hole") == [{"offset": start, "bytes": end - start}]
    found = of_word(lines, "needle")
    assert [fields["data"] for fields in found] == ["ok", "punched", "ok"]
    assert [fields["name"] for fields in found] == ["image 0", "image 1", "image 3"]
    (gap,) = of_word(lines, "gap")
    assert (gap["offset"], gap["zeros"]) == (offsets[2], end - -(-offsets[2] // 4096) * 4096)
    assert [fields["offset"] for word, fields in lines if word in ("needle", "hole")] == sorted(
        [offsets[0], offsets[1], start, offsets[3]]
    )
    # The same in a copy that has lost its holes: zeros are damage, and it says that they are zeros.
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    lines = dumped(Disk(), str(path))
    assert not of_word(lines, "hole")
    assert of_word(lines, "needle")[1]["data"] == "BAD"
    assert of_word(lines, "needle")[1]["zeros"] > 0


def _good_files() -> Iterator[bytes]:
    needles = [*images(50, 0, 300), (Needle(Kind.XATTR, 2), pack_xattrs({b"user.k": b"v", b"user.l": b"w" * 40}))]
    state = INDEX_STATE.pack(8192, 1, 2, 3, 4)
    needles.append((Needle(Kind.CHECKPOINT, 0, extras={Tag.CHECKPOINT: state}, flags=FLAG_SEAL), b""))
    disk, offsets = volume_of(needles)
    yield disk.content(PATH)
    yield b"".join(pack_record(needle, offset, 16, 5) for (needle, _), offset in zip(needles, offsets, strict=True))
    yield names_header(1) + b"".join(map(pack_name, [b"a", b"b" * 200, b"\xff\n"]))
    yield needles[3][1]
    yield b'{"format": 1, "store": "x", "checksum": "00000000", "damage": [{"volume": 1, "text": "a"}]}'
    yield b"12345\n"


GOOD_FILES = list(_good_files())


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a file of a store, of which bytes were changed, cut out, put in, or moved."""
    content = bytearray(draw(st.sampled_from(GOOD_FILES)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(content)))
        size = draw(st.integers(0, 60))
        # What a header says of itself lies within these; anywhere in a volume, most bytes are padding.
        at = draw(st.sampled_from([at, at % 100, 4096 + at % 100, 8192 + at % 900]))
        how = draw(st.sampled_from(["flip", "set", "cut", "insert", "drop", "copy"]))
        if how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            content[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=60))
        elif how == "drop":
            del content[at : at + size]
        else:
            content[at:at] = content[: size * 20]
    return bytes(content)


@given(mutated(), st.booleans())
def test_whatever_a_file_holds_dump_names_it_or_says_that_it_is_none(content: bytes, data: bool) -> None:
    try:
        lines = dumped(disk_with(content), data=data)
    except ImgfsError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert lines[0][0] == "file"
    if lines[0][1]["kind"] == "volume":
        # Each byte behind the headers is part of a needle or of a gap.
        parts = [fields for word, fields in lines if word == "gap" or (word == "needle" and is_whole(fields))]
        at = NEEDLES_START
        for fields in parts:
            assert fields["offset"] == at
            at += fields["bytes"]
        assert at == max(len(content), NEEDLES_START)


def is_whole(fields: Fields) -> bool:
    return fields["header"] == "ok" and fields.get("data") != "short"


def test_a_lie_whose_checksum_is_right_is_shown_as_it_stands() -> None:
    broken = {Tag.CHECKPOINT: b"short", Tag.TARGET: b"123", Tag.DEVICE: b"", 7777: b"x"}
    needles = [
        (Needle(200, 1 << 40, name=b"n" * 255, extras=broken, flags=255), b""),
        (Needle(Kind.XATTR, 5), b"\x05\0\xff\xff\xff\xff" + b"user."),
        (Needle(Kind.XATTR, 5), b"\0" * 11),
    ]
    disk, _ = volume_of(needles)
    found = of_word(dumped(disk), "needle")
    assert (found[0]["kind"], found[0]["checkpoint"], found[0]["target"]) == (200, "0x73686f7274", "0x313233")
    assert len(of_word(dumped(disk), "gap")) == 2
    with_extras = pack_volume_header(HEADER)
    assert of_word(dumped(disk_with(with_extras)), "header")[0]["readable_by"]
