r"""A line of `imgfs dump`: a word and named values, as text that grep and diff take, or as one JSON object.

Owns how a value is written in either. Must not know any file of a store.

Text is `WORD NAME=VALUE NAME=VALUE ...`, one space between. A value is a number, a word, or in double quotes; several
values are separated by commas, and `-` is none of them. In quotes, `\\`, `\"`, `\n`, `\r` and `\t` are as in C, `\xNN`
is a byte that is no part of UTF-8 text, `\uNNNN` and `\UNNNNNNNN` a character that cannot be shown.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

Scalar = int | float | str | bytes | bool | None
Value = Scalar | Sequence[int] | Sequence[str] | Sequence[Scalar]

# What needs no quotes: numbers, names of kinds, checksums, offsets. Names of files always get them.
_BARE = re.compile(r"[A-Za-z0-9_.:+-]+")
_BARE_NAME = re.compile(r"[A-Za-z0-9_.$-]+")
# Words that stand for something else when they are bare.
_TAKEN = frozenset({"-", "null", "true", "false"})
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Line(NamedTuple):
    """What one line says; values of type bytes are names or paths as the system has them."""

    word: str
    fields: Mapping[str, Value]

    def text(self) -> str:
        """Return the line as text, without its end."""
        parts = [self.word]
        for name, value in self.fields.items():
            # Most are numbers; a volume has tens of millions.
            parts.append(f"{_name(name)}={value if type(value) is int else _text(value)}")
        return " ".join(parts)

    def json(self) -> str:
        """Return the line as a JSON object, in ASCII; its word is `line`."""
        return json.dumps({"line": self.word} | {name: _json(value) for name, value in self.fields.items()})


def quoted(text: str) -> str:
    """Return *text*, which may hold what `os.fsdecode` made of any bytes, in quotes and on one line."""
    if text.isprintable() and "\\" not in text and '"' not in text:
        return f'"{text}"'
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@lru_cache(maxsize=1024)
def _name(name: str) -> str:
    return name if _BARE_NAME.fullmatch(name) else quoted(name)


def _text(value: Value) -> str:
    if isinstance(value, bytes):
        return quoted(os.fsdecode(value))
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and value not in _TAKEN else quoted(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    return ",".join(map(_text, value)) or "-"


def _json(value: Value) -> object:
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return [_json(part) for part in value]
