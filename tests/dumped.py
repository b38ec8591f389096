"""Reads lines of `imgfs dump` again, and makes the volumes that are dumped, for tests.

Owns the rules of a line as dump_line.py states them, written a second time. Must not know what a test expects.
"""

import json
import re
from typing import Any

from powercut import SimulatedDisk

from imgfs.disk import Disk
from imgfs.dump import dump
from imgfs.dump_line import Line
from imgfs.format import (
    NEEDLES_START,
    Needle,
    VolumeHeader,
)
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


def as_text(value: object) -> object:
    if isinstance(value, list):
        parts = [as_text(part) for part in value]
        return parts if len(parts) > 1 else parts[0] if parts else "-"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else repr(value)


def read_again(line: Line) -> tuple[str, Fields]:
    """Return word and fields of *line* as its JSON has them; make sure that its text says the same."""
    fields: Fields = json.loads(line.json())
    word = fields.pop("line")
    assert parse(line.text()) == (word, {name: as_text(value) for name, value in fields.items()})
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
