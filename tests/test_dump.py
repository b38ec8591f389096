"""`imgfs dump` names what is in a file, tells what damage did to it, and survives whatever it is given."""

import errno
import json
import os
import re
import struct
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import COMMAND, Run, flip, volume_file
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from powercut import SimulatedDisk

from imgfs.cli.dumping import _WRITE_BYTES
from imgfs.disk import Disk
from imgfs.dump import dump
from imgfs.dump_line import Line
from imgfs.dump_volume import HEX_BYTES
from imgfs.errors import EXIT_BROKEN_PIPE, EXIT_FAILURE, EXIT_USAGE, DiskFailure, ImgfsError, InvalidArgument
from imgfs.format import (
    CHUNK_BYTES,
    FLAG_LAST,
    FLAG_SEAL,
    INDEX_RECORD,
    INDEX_RECORD_BYTES,
    INDEX_RECORD_FIELDS,
    INDEX_STATE,
    NAME_BYTES_MAX,
    NEEDLE_HEADER_FIELDS,
    NEEDLES_START,
    VOLUME_HEADER_COPIES,
    VOLUME_HEADER_FIELDS,
    IndexState,
    Kind,
    Needle,
    PreviousEnd,
    Tag,
    VolumeHeader,
    pack_volume_header,
    pack_xattrs,
)
from imgfs.index import names_header, pack_name, pack_record
from imgfs.store import ROOT, Store
from imgfs.volume import Volume

PATH = "/file"
HEADER = VolumeHeader(bytes(range(16)), b"salt" * 4, 7, 30, 1_700_000_000_000_000_001, 1 << 30)
Fields = dict[str, Any]

# -- reading lines again ----------------------------------------------------------------------------------------------

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PART = rf"(?:{_QUOTED}|[A-Za-z0-9_.:+-]+)"
_FIELD = re.compile(rf" ({_QUOTED}|[A-Za-z0-9_.$-]+)=({_PART}(?:,{_PART})*)")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))")
_SINGLE = {"\\": "\\", '"': '"', "n": "\n", "r": "\r", "t": "\t"}


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text

    def character(match: re.Match[str]) -> str:
        if match[1]:
            return chr(0xDC00 + int(match[1], 16))
        return chr(int(match[2] or match[3], 16)) if match[2] or match[3] else _SINGLE[match[4]]

    return _ESCAPE.sub(character, text[1:-1])


def parse(text: str) -> tuple[str, Fields]:
    """Return word and fields of a line of text, by the rules that dump_line.py states; several values are a list."""
    assert text.isprintable()
    word, _, _ = text.partition(" ")
    at, fields = len(word), {}
    while at < len(text):
        match = _FIELD.match(text, at)
        assert match is not None, text[at:]
        parts = [_unquoted(part) for part in re.findall(_PART, match[2])]
        name = _unquoted(match[1])
        assert name not in fields
        fields[name] = parts if len(parts) > 1 else parts[0]
        at = match.end()
    return word, fields


def _as_text(value: object) -> object:
    if isinstance(value, list):
        parts = [_as_text(part) for part in value]
        return parts if len(parts) > 1 else parts[0] if parts else "-"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else repr(value)


def read_again(line: Line) -> tuple[str, Fields]:
    """Return word and fields of *line* as its JSON has them; make sure that its text says the same."""
    fields: Fields = json.loads(line.json())
    word = fields.pop("line")
    assert parse(line.text()) == (word, {name: _as_text(value) for name, value in fields.items()})
    return word, fields


def dumped(disk: Disk, path: str = PATH, *, data: bool = False) -> list[tuple[str, Fields]]:
    return [read_again(line) for line in dump(disk, path, data=data)]


def of_word(lines: list[tuple[str, Fields]], word: str) -> list[Fields]:
    return [fields for each, fields in lines if each == word]


def disk_with(content: bytes, path: str = PATH) -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.set_content(path, content)
    return disk


def volume_of(needles: list[tuple[Needle, bytes]], header: VolumeHeader = HEADER) -> tuple[SimulatedDisk, list[int]]:
    """Return a disk with a volume that holds *needles* with their data, and the offsets of these."""
    disk = SimulatedDisk()
    volume = Volume.create(disk, PATH, header, 0)
    offset, offsets = NEEDLES_START, []
    for needle, data in needles:
        needle.data_size = len(data)
        volume.write_needle(offset, needle, [data], None)
        offsets.append(offset)
        offset += needle.length
    volume.close()
    return disk, offsets


# -- what was written is named ----------------------------------------------------------------------------------------


def unsigned(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


TIMES = st.integers(-(1 << 63), (1 << 63) - 1)
STATES = st.builds(IndexState, unsigned(64), unsigned(64), unsigned(32), unsigned(64), unsigned(32))
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        Tag.OLD_PARENT: unsigned(64).map(lambda number: number.to_bytes(8, "little")),
        Tag.DEVICE: unsigned(32).map(lambda number: number.to_bytes(4, "little")),
        Tag.CHECKPOINT: STATES.map(lambda state: INDEX_STATE.pack(*state)),
        999: st.binary(max_size=20),
    },
)
NEEDLES = st.builds(
    Needle,
    kind=st.sampled_from(Kind),
    inode=unsigned(64),
    parent=unsigned(64),
    name=st.binary(max_size=NAME_BYTES_MAX),
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
HEADERS = st.builds(
    VolumeHeader,
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
    unsigned(64),
    unsigned(64),
    TIMES,
    unsigned(64),
    st.none() | st.builds(PreviousEnd, unsigned(64), unsigned(64), STATES),
)


@given(HEADERS, st.lists(st.tuples(NEEDLES, st.binary(max_size=100)), max_size=4))
def test_a_volume_is_named_field_by_field(header: VolumeHeader, needles: list[tuple[Needle, bytes]]) -> None:
    disk, offsets = volume_of(needles, header)
    lines = dumped(disk)
    assert lines[0] == ("file", {"path": PATH, "kind": "volume", "bytes": len(disk.content(PATH))})
    copies = of_word(lines, "header")
    assert [copy["offset"] for copy in copies] == list(VOLUME_HEADER_COPIES)
    for copy in copies:
        assert copy["header"] == "ok"
        assert set(copy) >= set(VOLUME_HEADER_FIELDS)
        assert (copy["volume_id"], copy["first_sequence"]) == (header.volume_id, header.first_sequence)
        assert (copy["created_ns"], copy["volume_bytes_max"]) == (header.created_ns, header.volume_bytes_max)
        assert (copy["store_id"].replace("-", ""), copy["salt"]) == (header.store_id.hex(), header.salt.hex())
        if header.previous is not None:
            assert copy["previous_end.torn_bytes"] == header.previous.torn_bytes
            assert copy["previous_end.names_crc"] == f"{header.previous.index_state.names_crc:08x}"
        assert any(name.startswith("previous_end") for name in copy) == (header.previous is not None)
    found = of_word(lines, "needle")
    assert [fields["offset"] for fields in found] == offsets
    for fields, (needle, data) in zip(found, needles, strict=True):
        shown = {name: getattr(needle, name) for name in NEEDLE_HEADER_FIELDS if hasattr(needle, name)}
        shown |= {"kind": Kind(needle.kind).name, "mode": f"{needle.mode:04o}", "flags": fields["flags"]}
        shown |= {"name": os.fsdecode(needle.name), "name_bytes": len(needle.name), "header": "ok"}
        if data:
            shown |= {"data_crc": f"{crc32c(data):08x}", "footer": "ok", "data": "ok"}
        assert fields.items() >= shown.items()
        assert len(fields["flags"]) == needle.flags.bit_count()
        for tag in (Tag.OLD_PARENT, Tag.DEVICE):
            assert fields.get(tag.name.lower(), 0) == needle.extra_u64(tag)
        if Tag.CHECKPOINT in needle.extras:
            state = IndexState(*INDEX_STATE.unpack(needle.extras[Tag.CHECKPOINT]))
            assert (fields["checkpoint.end"], fields["checkpoint.records"]) == (state.end, state.records)
            assert fields["checkpoint.records_crc"] == f"{state.records_crc:08x}"
        assert fields.get("tag_999", "0x") == f"0x{needle.extras.get(999, b'').hex()}"
    counts = {"needles": len(needles), "gaps": 0, "holes": 0, "bad": 0}
    assert lines[-1] == ("end", {"offset": len(disk.content(PATH)), **counts})


def test_flags_have_the_names_of_the_format() -> None:
    disk, _ = volume_of([(Needle(Kind.DELETE, 5, flags=FLAG_LAST | FLAG_SEAL | 0x80), b"")])
    assert of_word(dumped(disk), "needle")[0]["flags"] == ["SEAL", "LAST", "0x80"]


@given(st.lists(st.tuples(NEEDLES, unsigned(31)), min_size=1, max_size=6))
def test_an_index_is_named_record_by_record(needles: list[tuple[Needle, int]]) -> None:
    offset8, records = NEEDLES_START // 8, b""
    for needle, gap in needles:
        needle.kind = needle.kind or Kind.FILE
        needle.inode, needle.parent = needle.inode & 0xFF_00FF_FFFF, needle.parent & 0xFF_00FF_FFFF
        if offset8 < 1 << 31:
            records += pack_record(needle, offset8 * 8, 3, 4)
            offset8 += 1 + gap
    lines = dumped(disk_with(records))
    assert lines[0][1]["kind"] == "index"
    found = of_word(lines, "record")
    expected = [dict(zip(INDEX_RECORD_FIELDS, row, strict=True)) for row in INDEX_RECORD.iter_unpack(records)]
    for number, (fields, named) in enumerate(zip(found, expected, strict=True)):
        named |= {"kind": Kind(named["kind"]).name, "needle": named["offset8"] * 8}
        assert fields == {"number": number, "offset": number * INDEX_RECORD_BYTES, **named}
    end = {"offset": len(records), "records": len(expected), "records_crc": f"{crc32c(records):08x}"}
    assert lines[-1] == ("end", end)


@given(st.lists(st.binary(min_size=1, max_size=NAME_BYTES_MAX), max_size=20), unsigned(64))
def test_names_are_named(names: list[bytes], volume_id: int) -> None:
    content = names_header(volume_id) + b"".join(map(pack_name, names))
    lines = dumped(disk_with(content))
    assert of_word(lines, "header") == [{"magic": "imgfsnam", "volume_id": volume_id}]
    assert [os.fsencode(fields["name"]) for fields in of_word(lines, "name")] == names
    for fields, name in zip(of_word(lines, "name"), names, strict=True):
        assert content[fields["offset"] + 1 : fields["offset"] + fields["bytes"]] == name
    assert lines[-1][1] == {"offset": len(content), "names": len(names), "names_crc": f"{crc32c(content):08x}"}


def test_many_names_are_read_window_by_window() -> None:
    names = [b"%d" % number * 40 for number in range(2000)]
    lines = dumped(disk_with(names_header(1) + b"".join(pack_name(name[:255]) for name in names)))
    assert [fields["name"].encode() for fields in of_word(lines, "name")] == [name[:255] for name in names]


def test_zeros_among_names_are_a_gap() -> None:
    content = names_header(1) + pack_name(b"a") + bytes(300) + pack_name(b"b") + b"\5abc"
    lines = dumped(disk_with(content))
    assert [fields["name"] for fields in of_word(lines, "name")] == ["a", "b"]
    assert of_word(lines, "gap") == [{"offset": 18, "bytes": 300}, {"offset": 320, "bytes": 4}]


@given(st.dictionaries(st.binary(min_size=1, max_size=20).map(lambda name: b"user." + name), st.binary(max_size=50)))
def test_attributes_are_named_in_a_needle_and_in_a_file_of_staging(attributes: dict[bytes, bytes]) -> None:
    packed = pack_xattrs(attributes)
    expected = [(os.fsdecode(name), len(value), f"{crc32c(value):08x}") for name, value in attributes.items()]
    disk, _ = volume_of([(Needle(Kind.XATTR, 5), packed)])
    for lines in (dumped(disk), dumped(disk_with(packed))):
        found = of_word(lines, "attribute")
        assert [(fields["name"], fields["bytes"], fields["crc"]) for fields in found] == expected
    assert lines[0][1]["kind"] == ("attributes" if attributes else "empty")


# -- any file of a store, whatever its name ---------------------------------------------------------------------------


def test_every_file_of_a_store_is_told_by_its_content(filled: Path, run: Run) -> None:
    (filled / "staging" / "0000.xattrs0").write_bytes(pack_xattrs({b"user.a": b"b"}))
    kinds = {".vol": "volume", ".idx": "index", ".names": "names", ".xattrs0": "attributes"}
    kinds |= {"imgfs.json": "superblock", "lock": "lock"}
    misnamed = filled.parent / "misnamed.jpg"
    for path in sorted(filled.rglob("*")):
        if path.is_file():
            misnamed.write_bytes(path.read_bytes())
            done = run("dump", misnamed)
            assert (done.code, done.err) == (0, "")
            word, fields = parse(done.out.splitlines()[0])
            assert (word, fields["kind"]) == ("file", kinds[path.suffix if path.suffix in kinds else path.name])
            for line in done.out.splitlines():
                parse(line)
            assert " BAD" not in done.out
            assert "\ngap " not in done.out


def test_several_files_come_in_order_also_when_one_is_none(filled: Path, photos: Path, run: Run) -> None:
    photo = next(photos.glob("*/*.jpg"))
    done = run("dump", filled / "lock", photo, filled / "imgfs.json")
    assert done.code == EXIT_FAILURE
    assert done.err == f"imgfs: {photo} is no volume, index, names, superblock, lock, list or attributes of a store\n"
    kinds = [fields["kind"] for word, fields in map(parse, done.out.splitlines()) if word == "file"]
    assert kinds == ["lock", "superblock"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8\xff\xe0" + bytes(200),
        b"GIF89a" * 20,
        b"plain text\n" * 50,
        bytes(10_000),
        b"{",
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a": "\xff"}',
        b'{"a": 1' + b"0" * 10_000 + b"}",
        b"\0",
    ],
)
def test_what_is_no_file_of_a_store_is_one_line(content: bytes) -> None:
    with pytest.raises(InvalidArgument) as raised:
        list(dump(disk_with(content), PATH))
    assert str(raised.value).startswith(PATH)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_and_a_directory_say_so(filled: Path, run: Run) -> None:
    done = run("dump", filled / "nothing")
    assert done.code == EXIT_FAILURE
    assert done.err == f"imgfs: {filled / 'nothing'}: {os.strerror(errno.ENOENT)}\n"
    done = run("dump", filled)
    assert done.code == EXIT_USAGE
    assert "is not a file; name one in a store" in done.err


def test_a_disk_that_fails_is_one_line() -> None:
    disk, _ = volume_of([(Needle(Kind.FILE, 5, 1, b"a"), b"data")])
    disk.fail_next("read", errno.EIO, after=3)
    with pytest.raises(DiskFailure):
        list(dump(disk, PATH))


def test_the_superblock_and_its_checksum(store: Path, run: Run) -> None:
    path = store / "imgfs.json"
    word, fields = parse(run("dump", path).out.splitlines()[1])
    assert word == "superblock"
    written = json.loads(path.read_text())
    assert fields == {"$": "", "$superblock": "ok", **{name: str(value) for name, value in written.items()}}
    path.write_text(path.read_text().replace("65536", "65537"))
    assert parse(run("dump", path).out.splitlines()[1])[1]["$superblock"] == "BAD"


def test_lists_in_json_are_a_line_for_each_object() -> None:
    content = {
        "line": 1,
        "$": "x",
        "a b": None,
        "damage": [{"volume": 3, "name": "a\nb", "blocks": [1, 2]}, {"volume": 4, "more": {"deep": [[True]]}}],
        "empty": [],
        "ratio": 0.5,
        "odd": ["a,b", 'c"d', "-"],
        "lone": "\ud800",
    }
    lines = dumped(disk_with(json.dumps(content).encode()))
    top = {"$": "", "$line": 1, "$$": "x", "a b": None, "empty": [], "ratio": 0.5, "odd": content["odd"]}
    assert lines[1:] == [
        ("object", top | {"lone": "\ud800"}),
        ("object", {"$": "damage[0]", "volume": 3, "name": "a\nb", "blocks": [1, 2]}),
        ("object", {"$": "damage[1]", "volume": 4}),
        ("object", {"$": "damage[1].more"}),
        ("value", {"$": "damage[1].more.deep[0]", "value": [True]}),
    ]


# -- damage -----------------------------------------------------------------------------------------------------------


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
    lines = dumped(disk_with(bytes(content)))
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


# -- data, JSON, pipes, live stores -----------------------------------------------------------------------------------


def test_data_comes_in_hex_where_it_stands(filled: Path, photos: Path, run: Run) -> None:
    volume = volume_file(filled, 1)
    plain = run("dump", volume).out
    assert "\ndata " not in plain
    lines = [parse(line) for line in run("dump", "--data", volume).out.splitlines()]
    needle = next(fields for word, fields in lines if word == "needle" and fields["kind"] == "FILE")
    start = int(needle["offset"]) + int(needle["header_bytes"]) + int(needle["name_bytes"])
    end = start + int(needle["data_size"])
    rows = [fields for word, fields in lines if word == "data" and start <= int(fields["offset"]) < end]
    assert [int(row["offset"]) for row in rows] == list(range(start, end, HEX_BYTES))
    data = b"".join(bytes.fromhex(row["hex"]) for row in rows)
    assert data == next(path.read_bytes() for path in photos.glob("*/*.jpg") if path.name == needle["name"])


def test_json_is_an_object_per_line_that_says_the_same(filled: Path, run: Run) -> None:
    files = sorted(path for path in filled.rglob("*") if path.is_file())
    lines = [json.loads(line) for line in run("dump", "--json", *files).out.splitlines()]
    assert [(line.pop("line"), {name: _as_text(value) for name, value in line.items()}) for line in lines] == [
        parse(line) for line in run("dump", *files).out.splitlines()
    ]


def test_grep_finds_the_damage(filled: Path, run: Run) -> None:
    flip(volume_file(filled, 1), NEEDLES_START + 3000)
    done = run("dump", volume_file(filled, 1))
    assert done.code == 0
    assert len([line for line in done.out.splitlines() if re.search(r"\bBAD\b", line)]) == 1


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path) -> None:
    path = tmp_path / "records"
    record = pack_record(Needle(Kind.FILE, 5), NEEDLES_START, 0, 0)
    count = 40 * _WRITE_BYTES // len(record)
    path.write_bytes(b"".join(_at(record, NEEDLES_START // 8 + number) for number in range(count)))
    process = subprocess.Popen([*COMMAND, "dump", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout:
        assert process.stdout.readline().startswith(b"file ")
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=30) == EXIT_BROKEN_PIPE


def _at(record: bytes, offset8: int) -> bytes:
    return record[:13] + struct.pack("<I", offset8) + record[17:]


def test_it_reads_a_store_that_is_being_written(filled: Path, run: Run) -> None:
    with Store.open(str(filled)) as store:
        store.put(ROOT, b"new.jpg", b"new", 3, mode=0o644, uid=0, gid=0, mtime_ns=1)
        newest = max((filled / "volumes").glob("*.vol"))
        done = run("dump", newest, filled / "lock")
    assert done.code == 0
    assert 'name="new.jpg"' in done.out
    assert f"\nlock pid={os.getpid()}\n" in done.out
    assert "BAD" not in done.out


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    volume_path, index_path = str(tmp_path / "volume"), tmp_path / "index"
    volume = Volume.create(Disk(), volume_path, HEADER, 0)
    size = 16 * CHUNK_BYTES
    pieces = (bytes(CHUNK_BYTES) for _ in range(16))
    volume.write_large_needle(NEEDLES_START, Needle(Kind.FILE, 5, 1, b"a", data_size=size), pieces)
    volume.close()
    record = pack_record(Needle(Kind.FILE, 5), NEEDLES_START, 0, 0)
    index_path.write_bytes(b"".join(_at(record, NEEDLES_START // 8 + number) for number in range(30_000)))
    tracemalloc.start()
    try:
        for path in (volume_path, str(index_path)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            for _ in dump(Disk(), path):
                pass
            assert tracemalloc.get_traced_memory()[1] - before < 5 << 19
    finally:
        tracemalloc.stop()
