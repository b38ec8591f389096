"""`imgfs dump` names all that is in a file of a store, in lines that can be read again."""

import errno
import json
import os
import re
import struct
import subprocess
import tracemalloc
from pathlib import Path
from unittest.mock import patch

import pytest
from command_line import COMMAND, Run, flip, volume_file
from crc32c import crc32c
from dumped import HEADER, PATH, as_text, disk_with, dumped, of_word, parse, volume_of
from hypothesis import given
from hypothesis import strategies as st

from imgfs.cli.dumping import _WRITE_BYTES
from imgfs.disk import Disk
from imgfs.dump import dump
from imgfs.dump_volume import HEX_BYTES
from imgfs.errors import EXIT_BROKEN_PIPE, EXIT_FAILURE, EXIT_USAGE, DiskFailure, InvalidArgument
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
    pack_xattrs,
)
from imgfs.index import names_header, pack_name, pack_record
from imgfs.store import ROOT, Store
from imgfs.volume import Volume

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
    # What no release writes is shown, too, and called BAD: here it is about fields.
    with patch("imgfs.volume.plausible_needle", lambda *_: True):
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


def test_what_no_writer_writes_is_shown_and_doubted() -> None:
    needles = [Needle(Kind.FILE, 5, 1, name, mode=0o644, sequence=9) for name in (b"a/b", b"a")]
    found = of_word(dumped(volume_of([(needle, b"data") for needle in needles])[0]), "needle")
    assert [(fields["name"], fields["header"], "doubted" in fields) for fields in found] == [
        ("a/b", "ok", True),
        ("a", "ok", False),
    ]


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
    assert (
        done.err
        == f"imgfs: {photo} is no volume, index, names, table, superblock, lock, list or attributes of a store\n"
    )
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
    assert [(line.pop("line"), {name: as_text(value) for name, value in line.items()}) for line in lines] == [
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
