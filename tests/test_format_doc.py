"""docs/format.md says what the code does: its tables are parsed and compared with the structs and numbers."""

import dataclasses
import json
import re
import struct
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

from imgfs import format as disk_format
from imgfs import layout, load, saved_format
from imgfs.disk import Disk
from imgfs.format import (
    IndexState,
    Kind,
    Needle,
    PreviousEnd,
    Tag,
    VolumeHeader,
)
from imgfs.known_damage import KnownDamage
from imgfs.records import Record
from imgfs.staging import Staged
from imgfs.superblock import new_superblock, pack_superblock
from imgfs.survey import Damage

LINES = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8").splitlines()
TITLE = re.compile(r"Struct: (`\w+`(?: \+ `\w+`)*), (\d+) bytes")
CODES = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64", "q": "i64", "s": "bytes", "x": "zeros"}
FIXED = frozenset({"magic", "version", "length", "incompatible", "compatible", "padding", "checksum", "reserved"})


class Row(NamedTuple):
    """Where a field lies and what it holds."""

    offset: int
    size: int
    type: str


def cells(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def rows_after(start: int) -> list[list[str]]:
    """Return the cells of the first table behind line *start*, without its head."""
    first = next(number for number in range(start, len(LINES)) if LINES[number].startswith("|"))
    return [cells(line) for line in takewhile(lambda line: line.startswith("|"), LINES[first + 2 :])]


def table_headed(*columns: str) -> list[list[str]]:
    """Return the rows of the table whose head begins with *columns*."""
    (start,) = [
        n for n, line in enumerate(LINES) if line.startswith("|") and cells(line)[: len(columns)] == list(columns)
    ]
    return rows_after(start)


def documented() -> dict[str, tuple[int, list[list[str]]]]:
    """Return for each struct, by its name in the title, the total and the rows of its table."""
    found = {}
    for number, line in enumerate(LINES):
        if match := TITLE.fullmatch(line):
            found[match[1].replace("`", "")] = int(match[2]), rows_after(number)
    return found


DOCUMENTED = documented()


def declared(name: str) -> struct.Struct:
    (value,) = {found for module in (disk_format, saved_format, layout) if (found := vars(module).get(name))}
    assert isinstance(value, struct.Struct)
    return value


def fields_of(title: str) -> Iterator[Row]:
    """Yield the fields of the structs that *title* names, one behind the other."""
    offset = 0
    for name in title.split(" + "):
        form = declared(name).format
        assert form[0] == "<", f"{name} is not little-endian"
        for count, code in re.findall(r"(\d*)([a-zA-Z?])", form):
            repeated = code not in "sx"
            size = struct.calcsize("<" + code) if repeated else int(count or 1)
            for _ in range(int(count or 1) if repeated else 1):
                yield Row(offset, size, CODES[code])
                offset += size


@pytest.mark.parametrize("title", DOCUMENTED)
def test_offsets_sizes_types_and_total_are_those_of_the_struct(title: str) -> None:
    total, rows = DOCUMENTED[title]
    assert [Row(int(row[0]), int(row[1]), row[2]) for row in rows] == list(fields_of(title))
    assert total == sum(declared(name).size for name in title.split(" + "))


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("RECORD", list(Record._fields)),
        ("STAGED", list(Staged._fields)),
        ("INDEX_STATE", list(IndexState._fields)),
        ("PREVIOUS_END + INDEX_STATE", [*PreviousEnd._fields[:2], *IndexState._fields]),
        ("INDEX_RECORD", list(disk_format.INDEX_RECORD_FIELDS)),
        ("VOLUME_HEADER + CHECKSUM", [*disk_format.VOLUME_HEADER_FIELDS, "checksum"]),
        ("NEEDLE_HEADER + CHECKSUM", [*disk_format.NEEDLE_HEADER_FIELDS, "reserved", "checksum"]),
        ("FOOTER", list(disk_format.FOOTER_FIELDS)),
        ("NAMES_HEADER", list(disk_format.NAMES_HEADER_FIELDS)),
        ("SAVED_HEADER + SAVED_SUM", [*saved_format.SAVED_HEADER_FIELDS, "checksum"]),
        ("SAVED_VOLUME", list(saved_format.SAVED_VOLUME_FIELDS)),
    ],
)
def test_fields_have_the_names_of_the_code(title: str, names: list[str]) -> None:
    assert [row[3] for row in DOCUMENTED[title][1]] == names


@pytest.mark.parametrize(
    ("title", "owner", "others"),
    [
        ("VOLUME_HEADER + CHECKSUM", VolumeHeader, FIXED),
        ("NEEDLE_HEADER + CHECKSUM", Needle, FIXED | {"name_bytes"}),
    ],
)
def test_header_fields_are_attributes_of_what_is_unpacked(title: str, owner: type, others: frozenset[str]) -> None:
    named = {row[3] for row in DOCUMENTED[title][1]}
    attributes = {field.name for field in dataclasses.fields(owner)}
    assert named - others <= attributes
    assert attributes - named <= {"name", "extras", "previous", "replaces"}


def test_numpy_loads_the_same_records() -> None:
    assert load.INDEX_RECORDS.names == disk_format.INDEX_RECORD_FIELDS
    for title, loaded in (("INDEX_RECORD", load.INDEX_RECORDS), ("RECORD", load.RECORDS)):
        fields = [loaded.fields[name] for name in loaded.names or ()] if loaded.fields else []
        assert [(field[1], field[0].itemsize) for field in fields] == [row[:2] for row in fields_of(title)]


def test_every_struct_on_disk_has_a_table() -> None:
    ours = vars(disk_format) | {n: value for n, value in vars(saved_format).items() if n.startswith("SAVED_")}
    public = {n for n, value in ours.items() if isinstance(value, struct.Struct) and n[0] != "_"}
    assert public <= {name for title in DOCUMENTED for name in title.split(" + ")}


def test_limits_are_those_of_the_code() -> None:
    rows = table_headed("constant", "value")
    assert {row[0]: int(row[1]) for row in rows} == {row[0]: getattr(disk_format, row[0]) for row in rows}


def test_kinds_and_tags_are_those_of_the_code() -> None:
    assert [(int(row[0]), row[1]) for row in table_headed("number", "kind")] == [(k.value, k.name) for k in Kind]
    assert [(int(row[0]), row[1]) for row in table_headed("number", "tag")] == [(t.value, t.name) for t in Tag]


def test_magic_numbers_and_places_are_those_of_the_code() -> None:
    text = "\n".join(LINES)
    numbered = struct.pack("<I", disk_format.NEEDLE_MAGIC)
    for magic in (disk_format.VOLUME_MAGIC, disk_format.NAMES_MAGIC, saved_format.SAVED_MAGIC, numbered):
        assert f"`{magic.decode()}`" in text
    assert f"0x{disk_format.NEEDLE_MAGIC:08X}" in text
    first, second = disk_format.VOLUME_HEADER_COPIES
    assert f"Stands twice, at {first} and at {second}" in text
    for flag in ("DEAD", "STAGED", "UNBORN", "STALE_MTIME"):
        assert f"0x{getattr(layout.Flag, flag):02x} {flag.lower().replace('_', ' ')}" in text


def test_keys_of_the_superblock_are_those_that_are_written() -> None:
    assert [row[0] for row in table_headed("key")] == list(json.loads(pack_superblock(new_superblock(1 << 30))))


def test_keys_of_the_list_of_damage_are_those_that_are_written(tmp_path: Path) -> None:
    known = KnownDamage(str(tmp_path), Disk())
    known.see(Damage(1, 2, 3, "text", 4), b"path")
    known.save()
    (written,) = json.loads((tmp_path / "damage.json").read_text())["damage"]
    documented = [key for row in table_headed("key of an entry") for key in re.findall(r"\w+", row[0])]
    assert sorted(documented) == sorted(written)
