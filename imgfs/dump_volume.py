"""What a volume holds, line by line: both copies of its header, every needle, what lies between, and holes.

Owns how a volume is shown, damaged or not. Must not trust what it reads, nor keep more of it than one needle. Names of
fields are those that format.py declares.

*Concurrency:* reads a file that others may append to, up to where it ended when the dump began.
"""

import struct
import uuid
from collections.abc import Iterator, Mapping

from crc32c import crc32c

from imgfs import format as disk_format
from imgfs.disk import Disk
from imgfs.dump_line import Line, Value
from imgfs.errors import Damaged, NewerFormat
from imgfs.format import (
    CHECKSUM,
    CHUNK_BYTES,
    FOOTER,
    FOOTER_FIELDS,
    INDEX_STATE,
    NEEDLE_HEADER,
    NEEDLE_HEADER_BYTES,
    NEEDLE_HEADER_BYTES_MAX,
    NEEDLE_HEADER_FIELDS,
    NEEDLE_MAGIC,
    NEEDLES_START,
    PREVIOUS_END,
    VOLUME_HEADER,
    VOLUME_HEADER_BYTES,
    VOLUME_HEADER_COPIES,
    VOLUME_HEADER_FIELDS,
    IndexState,
    Kind,
    Needle,
    PreviousEnd,
    Tag,
    VolumeHeader,
    footer_bytes,
    unpack_extras,
    unpack_footer,
    unpack_volume_header,
)
from imgfs.plausible import plausible_needle
from imgfs.volume import Gap, Volume

OK, BAD = "ok", "BAD"
HEX_BYTES = 32  # of data, in one line
_PAGE_BYTES = 4096
_WINDOW_BYTES = 1 << 20
# Larger ones are no extended attributes that imgfs wrote.
_XATTRS_BYTES_MAX = 8 << 20
_KINDS = {kind.value: kind.name for kind in Kind}
_TAGS = {tag.value: tag.name.lower() for tag in Tag}
_FLAGS = {
    value: name.removeprefix("FLAG_")
    for name, value in vars(disk_format).items()
    if name.startswith("FLAG_") and isinstance(value, int)
}
_XATTR = struct.Struct("<HI")
# What a tagged field holds if it is neither a number nor several.
_TAG_STRUCTS: dict[int, tuple[tuple[struct.Struct, tuple[str, ...]], ...]] = {
    Tag.PREVIOUS_END: ((PREVIOUS_END, PreviousEnd._fields[:2]), (INDEX_STATE, IndexState._fields)),
    Tag.CHECKPOINT: ((INDEX_STATE, IndexState._fields),),
}


def kind_name(kind: int) -> str | int:
    """Return the name of a kind of needles, the number itself if it has none."""
    return _KINDS.get(kind, kind)


def flag_names(flags: int) -> list[str]:
    """Return the names of the bits in *flags*, in hex for those that have none."""
    bits = [1 << bit for bit in range(flags.bit_length()) if flags >> bit & 1]
    return [_FLAGS.get(bit, f"0x{bit:x}") for bit in bits]


def tagged_fields(extras: Mapping[int, bytes]) -> dict[str, Value]:
    """Return what the tagged fields *extras* say, by name; unknown ones and those of a wrong length in hex."""
    fields: dict[str, Value] = {}
    for tag, value in extras.items():
        name, known = _TAGS.get(tag, f"tag_{tag}"), tag in _TAGS
        structs = _TAG_STRUCTS.get(tag, ())
        if structs and len(value) == sum(form.size for form, _ in structs):
            at = 0
            for form, names in structs:
                for part, number in zip(names, form.unpack_from(value, at), strict=True):
                    fields[f"{name}.{part}"] = f"{number:08x}" if part.endswith("_crc") else number
                at += form.size
        elif tag == Tag.READABLE_BY:
            fields[name] = value
        elif known and not structs and len(value) in (4, 8):
            fields[name] = int.from_bytes(value, "little")
        elif known and not structs and value and len(value) % 8 == 0:
            fields[name] = struct.unpack(f"<{len(value) // 8}Q", value)
        else:
            fields[name] = f"0x{value.hex()}"
    return fields


def attribute_lines(data: bytes, start: int) -> Iterator[Line]:
    """Yield the extended attributes in *data*, which stands at *start* of its file, and what is none at its end."""
    at = 0
    while at < len(data):
        name_length, value_length = _XATTR.unpack_from(data, at) if len(data) - at >= _XATTR.size else (0, 0)
        value_at = at + _XATTR.size + name_length
        if not name_length or value_at + value_length > len(data):
            yield Line("gap", {"offset": start + at, "bytes": len(data) - at})
            return
        name, value = data[at + _XATTR.size : value_at], data[value_at : value_at + value_length]
        fields: dict[str, Value] = {"offset": start + at, "name": name, "bytes": value_length}
        yield Line("attribute", fields | {"crc": f"{crc32c(value):08x}"})
        at = value_at + value_length


def data_lines(disk: Disk, file: int, start: int, end: int) -> Iterator[Line]:
    """Yield the bytes of *file* between *start* and *end* in hex."""
    for window_start in range(start, end, _WINDOW_BYTES):
        window = disk.read(file, window_start, min(_WINDOW_BYTES, end - window_start))
        for at in range(0, len(window), HEX_BYTES):
            yield Line("data", {"offset": window_start + at, "hex": window[at : at + HEX_BYTES].hex()})


class VolumeDump:
    """One pass over the volume in *file*, an open descriptor."""

    def __init__(self, disk: Disk, path: str, file: int, size: int, *, data: bool) -> None:
        """*data*: the bytes of images, too."""
        self._disk = disk
        self._path = path
        self._file = file
        self._size = size
        self._data = data
        self._count = {"needles": 0, "gaps": 0, "holes": 0, "bad": 0}

    def lines(self) -> Iterator[Line]:
        """Yield all lines."""
        headers: list[tuple[bool, VolumeHeader]] = []
        for copy, offset in enumerate(VOLUME_HEADER_COPIES):
            yield self._header_copy(copy, offset, headers)
        volume = self._volume(headers)
        first_sequence = volume.header.first_sequence if volume is not None else 0
        items: Iterator[tuple[int, Needle] | Gap] = iter(())
        if volume is not None:
            items = volume.scan(NEEDLES_START, self._size)
        elif self._size > NEEDLES_START:
            # Without a salt nothing can be recognised.
            items = iter([Gap(NEEDLES_START, self._size)])
        holes = self._disk.holes(self._file, 0, self._size)
        hole = next(holes, None)
        for item in items:
            start = item.start if isinstance(item, Gap) else item[0]
            while hole is not None and hole[0] < start:
                yield self._hole(*hole)
                hole = next(holes, None)
            yield from self._gap(item, volume) if isinstance(item, Gap) else self._needle(*item, first_sequence)
        while hole is not None:
            yield self._hole(*hole)
            hole = next(holes, None)
        yield Line("end", {"offset": self._size, **self._count})

    # -- headers ----------------------------------------------------------------------------------------------

    def _header_copy(self, copy: int, offset: int, headers: list[tuple[bool, VolumeHeader]]) -> Line:
        """Return what one copy of the header says; add what can be made of it to *headers*: whether it is whole, it."""
        fields: dict[str, Value] = {"copy": copy, "offset": offset}
        raw = self._disk.read(self._file, offset, _PAGE_BYTES)
        if len(raw) < VOLUME_HEADER_BYTES:
            self._count["bad"] += 1
            return Line("header", fields | {"header": "missing"})
        named = dict(zip(VOLUME_HEADER_FIELDS, VOLUME_HEADER.unpack_from(raw), strict=True))
        whole = _is_whole(raw)
        self._count["bad"] += not whole
        # Only what an attribute is called by can be given to it: the fixed fields are none.
        known = {name: named[name] for name in VOLUME_HEADER_FIELDS if name in VolumeHeader.__dataclass_fields__}
        headers.append((whole, VolumeHeader(**known)))
        for name, value in named.items():
            fields[name] = value.hex() if isinstance(value, bytes) else value
        fields["magic"] = named["magic"]
        fields["store_id"] = str(uuid.UUID(bytes=named["store_id"]))
        fields |= tagged_fields(unpack_extras(raw[VOLUME_HEADER_BYTES : max(VOLUME_HEADER_BYTES, named["length"])]))
        (checksum,) = CHECKSUM.unpack_from(raw, VOLUME_HEADER.size)
        return Line("header", fields | {"checksum": f"{checksum:016x}", "header": OK if whole else BAD})

    def _volume(self, headers: list[tuple[bool, VolumeHeader]]) -> Volume | None:
        """Return the volume with a header under which its needles can be recognised."""
        for whole, header in sorted(headers, key=lambda each: not each[0]):
            volume = Volume(self._disk, self._path, self._file, header, doubting=False)
            # Of a damaged copy, salt and volume id may be what was written all the same.
            if whole or any(
                not isinstance(item, Gap)
                for item in volume.scan(NEEDLES_START, min(self._size, NEEDLES_START + _WINDOW_BYTES))
            ):
                return volume
        return None

    # -- needles ----------------------------------------------------------------------------------------------

    def _needle(self, offset: int, needle: Needle, first_sequence: int) -> Iterator[Line]:
        self._count["needles"] += 1
        fields: dict[str, Value] = {"offset": offset, "bytes": needle.length, **_needle_fields(needle)}
        fields |= {"checksum": f"{needle.checksum:016x}", "header": OK}
        if not plausible_needle(needle, offset, first_sequence):
            fields["doubted"] = True
        if needle.data_size:
            fields |= self._footer(offset, needle)
        if BAD in (fields.get("footer"), fields.get("data")):
            self._count["bad"] += 1
        yield Line("needle", fields)
        start = offset + needle.data_start
        if needle.kind == Kind.XATTR and fields.get("data") == OK and needle.data_size <= _XATTRS_BYTES_MAX:
            yield from attribute_lines(self._disk.read(self._file, start, needle.data_size), start)
        if self._data:
            yield from data_lines(self._disk, self._file, start, start + needle.data_size)

    def _footer(self, offset: int, needle: Needle) -> dict[str, Value]:
        """Return what the footer says of the data of *needle*, and whether that is so."""
        start = offset + needle.data_start
        end = start + needle.data_size
        raw = self._disk.read(self._file, end, footer_bytes(needle.data_size))
        if len(raw) < footer_bytes(needle.data_size):
            return {"footer": BAD, "data": BAD}
        whole = unpack_footer(raw, needle.data_size, needle.checksum) is not None
        numbers = FOOTER.unpack(raw[-FOOTER.size :])
        fields: dict[str, Value] = {name: f"{number:08x}" for name, number in zip(FOOTER_FIELDS, numbers, strict=True)}
        chunk_crcs = [crc for (crc,) in struct.iter_unpack("<I", raw[: -FOOTER.size])]
        if chunk_crcs:
            fields["chunk_crcs"] = [f"{crc:08x}" for crc in chunk_crcs]
        data_crc, bad_chunks = 0, []
        for number, at in enumerate(range(start, end, CHUNK_BYTES)):
            piece = self._disk.read(self._file, at, min(CHUNK_BYTES, end - at))
            data_crc = crc32c(piece, data_crc)
            if chunk_crcs and crc32c(piece) != chunk_crcs[number]:
                bad_chunks.append(number)
        good = data_crc == numbers[0]
        punched = not (good and whole) and next(self._disk.holes(self._file, start, end), None) is not None
        fields["footer"] = OK if whole else "punched" if punched else BAD
        fields["data"] = OK if good else "punched" if punched else BAD
        if bad_chunks:
            fields["bad_chunks"] = bad_chunks
        if not good:
            fields["zeros"] = self._zeros(start, end)
        return fields

    def _gap(self, gap: Gap, volume: Volume | None) -> Iterator[Line]:
        """Yield what lies where no whole needle does; if it begins like one, what its header says, true or not."""
        self._count["gaps"] += 1
        raw = self._disk.read(self._file, gap.start, min(NEEDLE_HEADER_BYTES_MAX, gap.end - gap.start))
        if len(raw) >= NEEDLE_HEADER_BYTES and raw.startswith(NEEDLE_MAGIC.to_bytes(4, "little")):
            needle = volume.unpack(raw, gap.start) if volume is not None else None
            if needle is not None:
                # It would end behind the end of the file.
                fields = {"bytes": needle.length, **_needle_fields(needle)}
                fields |= {"checksum": f"{needle.checksum:016x}", "header": OK, "data": "short"}
            else:
                self._count["bad"] += 1
                (checksum,) = CHECKSUM.unpack_from(raw, NEEDLE_HEADER.size)
                fields = _unverified_fields(raw) | {"checksum": f"{checksum:016x}", "header": BAD}
            yield Line("needle", {"offset": gap.start, **fields})
        size = gap.end - gap.start
        yield Line("gap", {"offset": gap.start, "bytes": size, "zeros": self._zeros(gap.start, gap.end)})
        if self._data:
            yield from data_lines(self._disk, self._file, gap.start, gap.end)

    def _hole(self, start: int, end: int) -> Line:
        self._count["holes"] += 1
        return Line("hole", {"offset": start, "bytes": end - start})

    def _zeros(self, start: int, end: int) -> int:
        """Return how many bytes of the whole pages between *start* and *end* are in pages that hold only zeros."""
        count = 0
        for window_start in range(-(-start // _PAGE_BYTES) * _PAGE_BYTES, end, _WINDOW_BYTES):
            window = self._disk.read(self._file, window_start, min(_WINDOW_BYTES, end - window_start))
            pages = (window[at : at + _PAGE_BYTES] for at in range(0, len(window), _PAGE_BYTES))
            count += sum(_PAGE_BYTES for page in pages if len(page) == _PAGE_BYTES and not page.strip(b"\0"))
        return count


def _is_whole(copy: bytes) -> bool:
    """Return whether *copy*, a page, is a copy of a volume header as it was written."""
    try:
        unpack_volume_header(copy)
    except NewerFormat:
        return True
    except (Damaged, struct.error):
        # The latter: the checksum holds, but no release wrote this.
        return False
    return True


def _needle_fields(needle: Needle) -> dict[str, Value]:
    named = {name: getattr(needle, name, len(needle.name)) for name in NEEDLE_HEADER_FIELDS if name != "magic"}
    return _shown(named) | {"name": needle.name} | tagged_fields(needle.extras)


def _unverified_fields(raw: bytes) -> dict[str, Value]:
    """Return what a header in *raw* says whose checksum does not hold."""
    named = dict(zip(NEEDLE_HEADER_FIELDS, NEEDLE_HEADER.unpack_from(raw), strict=True))
    header_bytes, name_bytes = named["header_bytes"], named["name_bytes"]
    del named["magic"]
    fields = _shown(named)
    if header_bytes >= NEEDLE_HEADER_BYTES and header_bytes + name_bytes <= len(raw):
        fields["name"] = raw[header_bytes : header_bytes + name_bytes]
        fields |= tagged_fields(unpack_extras(raw[NEEDLE_HEADER_BYTES:header_bytes]))
    return fields


def _shown(named: Mapping[str, int]) -> dict[str, Value]:
    """Return the fields of a needle header as they are shown."""
    shown: dict[str, Value] = dict(named)
    return shown | {
        "kind": kind_name(named["kind"]),
        "flags": flag_names(named["flags"]),
        "mode": f"{named['mode']:04o}",
    }
