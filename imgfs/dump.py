"""Prints any file of a store, line by line; what kind it is of is told by its content, not by its name.

Owns how kinds are told apart, and how all but volumes are shown. Must not trust what it reads, nor hold a large file in
memory; changes nothing.

*Concurrency:* reads files that others may append to, up to where they ended when the dump began.
"""

import json
import os
import re
from collections.abc import Iterator

import numpy as np
from crc32c import crc32c

from imgfs.disk import Disk
from imgfs.dump_line import Line, Scalar, Value
from imgfs.dump_volume import BAD, OK, VolumeDump, attribute_lines, data_lines, kind_name
from imgfs.errors import Damaged, InvalidArgument, disk_error
from imgfs.format import (
    ALIGNMENT,
    INDEX_RECORD,
    INDEX_RECORD_BYTES,
    INDEX_RECORD_FIELDS,
    NAMES_HEADER,
    NAMES_HEADER_FIELDS,
    NAMES_MAGIC,
    NEEDLE_MAGIC,
    NEEDLES_START,
    VOLUME_HEADER_COPIES,
    VOLUME_MAGIC,
    Kind,
)
from imgfs.layout import SLOTS_MAX
from imgfs.load import INDEX_RECORDS
from imgfs.saved_format import (
    SAVED_HEADER,
    SAVED_HEADER_FIELDS,
    SAVED_MAGIC,
    front_bytes,
    piece_seed,
    piece_sum,
    pieces,
    unpack_front,
    unpack_header,
)
from imgfs.superblock import superblock_checksum

_HEAD_BYTES = 64 << 10  # what a file is judged by
_BLOCK_BYTES = INDEX_RECORD_BYTES << 12
# JSON and extended attributes are read as a whole; imgfs writes none as large.
_WHOLE_BYTES_MAX = 64 << 20
_LOCK = re.compile(rb"\d{1,10}\n?")
_ATTRIBUTE = re.compile(rb"(?s:.{6})(?:user|trusted|security)\.")
_SUPERBLOCK_KEYS = frozenset({"format", "store", "checksum"})


def dump(disk: Disk, path: str, *, data: bool = False) -> Iterator[Line]:
    """Yield what the file at *path* holds; with *data* also the bytes of images and values of attributes.

    Raises:
        InvalidArgument: it is none of a store.
        DiskFailure: the disk refused it.
    """
    try:
        file = disk.open(path)
        try:
            yield from _Dump(disk, path, file, data=data).lines()
        finally:
            disk.close(file)
    except OSError as error:
        raise disk_error(error, path) from error


class _Dump:
    """The dump of one open file."""

    def __init__(self, disk: Disk, path: str, file: int, *, data: bool) -> None:
        self._disk = disk
        self._path = path
        self._file = file
        self._data = data
        self._size = disk.size(file)

    def lines(self) -> Iterator[Line]:
        kind, lines = self._told()
        yield Line("file", {"path": os.fsencode(self._path), "kind": kind, "bytes": self._size})
        yield from lines

    def _told(self) -> tuple[str, Iterator[Line]]:
        """Return of what kind the file is, and its lines."""
        head = self._disk.read(self._file, 0, _HEAD_BYTES)
        if not head:
            return "empty", iter(())
        starts = [head[at : at + len(VOLUME_MAGIC)] for at in VOLUME_HEADER_COPIES]
        first_needle = head[NEEDLES_START : NEEDLES_START + 4]
        if VOLUME_MAGIC in starts or first_needle == NEEDLE_MAGIC.to_bytes(4, "little"):
            dump = VolumeDump(self._disk, self._path, self._file, self._size, data=self._data)
            return "volume", dump.lines()
        if head.startswith(SAVED_MAGIC):
            return "table", self._table()
        if head.startswith(NAMES_MAGIC):
            return "names", self._names()
        if self._size <= len(head) and _LOCK.fullmatch(head):
            return "lock", iter([Line("lock", {"pid": int(head)})])
        if _ATTRIBUTE.match(head) and self._size <= _WHOLE_BYTES_MAX:
            return "attributes", self._attributes()
        if _is_index(head):
            return "index", self._index()
        if head.lstrip()[:1] in (b"{", b"["):
            return self._json()
        text = f"{self._path} is no volume, index, names, table, superblock, lock, list or attributes of a store"
        raise InvalidArgument(text)

    # -- index files ------------------------------------------------------------------------------------------

    def _index(self) -> Iterator[Line]:
        whole = self._size - self._size % INDEX_RECORD_BYTES
        records_crc = number = 0
        for at in range(0, whole, _BLOCK_BYTES):
            block = self._disk.read(self._file, at, min(_BLOCK_BYTES, whole - at))
            records_crc = crc32c(block, records_crc)
            for row in INDEX_RECORD.iter_unpack(block[: len(block) - len(block) % INDEX_RECORD_BYTES]):
                named = dict(zip(INDEX_RECORD_FIELDS, row, strict=True))
                fields: dict[str, Value] = {"number": number, "offset": number * INDEX_RECORD_BYTES}
                fields |= named | {"kind": kind_name(named["kind"]), "needle": named["offset8"] * ALIGNMENT}
                yield Line("record", fields)
                number += 1
        if whole < self._size:
            yield Line("gap", {"offset": whole, "bytes": self._size - whole})
        yield Line("end", {"offset": self._size, "records": number, "records_crc": f"{records_crc:08x}"})

    def _names(self) -> Iterator[Line]:
        header = self._disk.read(self._file, 0, NAMES_HEADER.size)
        if len(header) < NAMES_HEADER.size:
            yield Line("gap", {"offset": 0, "bytes": len(header)})
            return
        yield Line("header", dict(zip(NAMES_HEADER_FIELDS, NAMES_HEADER.unpack(header), strict=True)))
        names, names_crc = 0, crc32c(header)
        offset = gap = NAMES_HEADER.size  # *gap*: where bytes begin that are no name, up to *offset*
        window = b""
        at = 0
        while True:
            if len(window) - at < 256:
                piece = self._disk.read(self._file, offset + len(window) - at, max(0, self._room(offset, window, at)))
                names_crc = crc32c(piece, names_crc)
                window, at = window[at:] + piece, 0
            if at == len(window):
                break
            length = window[at]
            name = window[at + 1 : at + 1 + length]
            if not length:
                # No name is empty: zeros are what a power loss has left.
                offset, at = offset + 1, at + 1
                continue
            if gap < offset:
                yield Line("gap", {"offset": gap, "bytes": offset - gap})
            if len(name) < length:
                gap, offset = offset, offset + len(window) - at
                break
            names += 1
            yield Line("name", {"offset": offset, "bytes": 1 + length, "name": name})
            offset, at = offset + 1 + length, at + 1 + length
            gap = offset
        if gap < offset:
            yield Line("gap", {"offset": gap, "bytes": offset - gap})
        yield Line("end", {"offset": offset, "names": names, "names_crc": f"{names_crc:08x}"})

    def _room(self, offset: int, window: bytes, at: int) -> int:
        """Return how many bytes to read behind *window*, whose byte *at* stands at *offset* of the file."""
        return min(_HEAD_BYTES, self._size - (offset + len(window) - at))

    # -- a kept table -----------------------------------------------------------------------------------------

    def _table(self) -> Iterator[Line]:
        """Yield the front of a kept table, and of each piece what part of the memory it is, with its checksum."""
        head = self._disk.read(self._file, 0, SAVED_HEADER.size)
        if len(head) < SAVED_HEADER.size:
            yield Line("gap", {"offset": 0, "bytes": self._size})
            return
        fields = zip(SAVED_HEADER_FIELDS, SAVED_HEADER.unpack(head), strict=True)
        named = {name: value.hex() if isinstance(value, bytes) and name != "magic" else value for name, value in fields}
        try:
            header = unpack_header(head, self._size)
            front = unpack_front(self._disk.read(self._file, 0, front_bytes(header)), header)
        except Damaged as error:
            yield Line("header", {"offset": 0, **named, "front": BAD, "why": str(error)})
            return
        yield Line("header", {"offset": 0, **named, "front": OK})
        for number, row in enumerate(front.volumes):
            yield Line("volume", {"number": number, **row._asdict(), "salt": row.salt.hex()})
        at, seed = front_bytes(header), piece_seed(header)
        for number, (start, size) in enumerate(pieces(header)):
            data = self._disk.read(self._file, at, size)
            state = OK if piece_sum(data, seed, number) == front.sums[number] else BAD
            yield Line("piece", {"number": number, "offset": at, "bytes": size, "memory": start, "data": state})
            at += size
        yield Line("end", {"offset": at})

    # -- small files ------------------------------------------------------------------------------------------

    def _attributes(self) -> Iterator[Line]:
        yield from attribute_lines(self._disk.read(self._file, 0, self._size), 0)
        if self._data:
            yield from data_lines(self._disk, self._file, 0, self._size)

    def _json(self) -> tuple[str, Iterator[Line]]:
        if self._size > _WHOLE_BYTES_MAX:
            raise InvalidArgument(f"{self._path} is larger than any JSON file of a store")
        text = self._disk.read(self._file, 0, self._size)
        try:
            content = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            # A JSON error has the place in it; that of a wrong UTF-8 byte, too.
            raise InvalidArgument(f"{self._path} begins like JSON, but is none: {error}") from None
        if isinstance(content, dict) and content.keys() >= _SUPERBLOCK_KEYS:
            others = {name: value for name, value in content.items() if name != "checksum"}
            state = OK if content["checksum"] == superblock_checksum(others) else BAD
            return "superblock", _flat("superblock", content, {"$superblock": state})
        return "json", _flat("object", content, {})


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no number of JSON")


def _flat(word: str, content: object, more: dict[str, Value]) -> Iterator[Line]:
    """Yield a line for each object in *content*, with its values; objects and lists in it follow, with their path.

    The path is under the name `$`. A name that `Line` or this needs itself gets a `$` before it.
    """
    pending: list[tuple[str, object]] = [("", content)]
    while pending:
        path, value = pending.pop()
        below: list[tuple[str, object]] = []
        fields: dict[str, Value] = {}
        if isinstance(value, dict):
            for name, part in value.items():
                simple = _simple(part)
                if simple is None and part is not None:
                    below.append((f"{path}.{name}" if path else name, part))
                else:
                    fields[f"${name}" if name == "line" or name.startswith("$") else name] = simple
            yield Line(word, {"$": path, **fields, **more})
        elif isinstance(value, list) and _simple(value) is None:
            below = [(f"{path}[{number}]", part) for number, part in enumerate(value)]
        else:
            yield Line("value", {"$": path, "value": _simple(value)})
        pending.extend(reversed(below))
        word, more = "object", {}


def _simple(value: object) -> Value:
    """Return *value* if it fits into a line: a scalar, or a list of such; None otherwise."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        scalars: list[Scalar] = [part for part in value if part is None or isinstance(part, bool | int | float | str)]
        return scalars if len(scalars) == len(value) else None
    return None


def _is_index(head: bytes) -> bool:
    """Return whether *head* looks like index records: of known kinds, one needle behind the other."""
    count = len(head) // INDEX_RECORD_BYTES
    if not count:
        return False
    records = np.frombuffer(head, INDEX_RECORDS, count)
    offsets = records["offset8"].astype(np.int64)
    likely = np.isin(records["kind"], [kind for kind in Kind if kind != Kind.FREE])
    likely &= (offsets >= NEEDLES_START // ALIGNMENT) & (records["slot"] <= SLOTS_MAX)
    likely &= (records["parent"] <= SLOTS_MAX) | (records["kind"] == Kind.OWNER)
    likely[1:] &= offsets[1:] > offsets[:-1]
    return bool(2 * likely.sum() > count)
