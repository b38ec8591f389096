"""What a store's files can say that is not so: fields, orders and lengths that nobody wrote, whose checksums are right.

Owns the mutators that fix the checksums, each of which knows the format, and how often each is due. Must not know how
recovery works.

*Concurrency:* none; a case is made from one `Random`, so that its number makes it again.
"""

import struct
from dataclasses import replace
from random import Random

import xxhash
from cases import NAMES, SUPERBLOCK, Case, Mutator, any_file, any_needle, number
from crc32c import crc32c

from imgfs.format import (
    CHECKSUM,
    INDEX_RECORD,
    INDEX_RECORD_BYTES,
    INDEX_STATE,
    NEEDLE_HEADER,
    NEEDLES_START,
    VOLUME_HEADER,
    VOLUME_HEADER_COPIES,
    IndexState,
    Kind,
    Needle,
    Tag,
    aligned,
    checksums,
    pack_extras,
    pack_footer,
    pack_needle_header,
    unpack_needle_header,
)
from imgfs.index import names_a_name, names_header, pack_name, pack_record
from imgfs.superblock import Superblock, pack_superblock


def write_needle(case: Case, path: str, offset: int, needle: Needle, data: bytes) -> bool:
    """Write *needle* with *data* at *offset* of the volume at *path*; return whether there is such a needle."""
    header = case.seed.headers.get(path)
    if header is None:
        return False
    try:
        packed = pack_needle_header(needle, header.seed(), offset)
        footer = pack_footer(checksums(data), len(data), needle.checksum)
    except (struct.error, OverflowError):
        return False
    whole = packed + data + footer
    whole += bytes(aligned(len(whole)) - len(whole))
    case.files[path][offset : offset + len(whole)] = whole
    case.touch(path, offset, offset + len(whole))
    case.lie(needle, data)
    return True


def _hostile(needle: Needle, random: Random, case: Case) -> Needle:
    """Return *needle* with a field or two that nobody would write."""
    inodes = [each.needle.inode for each in case.seed.needles]
    for _ in range(random.choice((1, 1, 2, 3))):
        match random.randrange(16):
            case 0:
                needle = replace(needle, kind=random.choice((*range(14), 14, 99, 255)))
            case 1:
                needle = replace(needle, flags=random.choice((0, 1, 2, 4, 6, 8, 14, 16, 128, 255)))
            case 2:
                needle = replace(needle, sequence=number(random, 64))
            case 3 | 4:
                needle = replace(needle, inode=random.choice((number(random, 64), *inodes, 0, 1)))
            case 5 | 6:
                needle = replace(needle, parent=random.choice((number(random, 64), *inodes, needle.inode, 0, 1)))
            case 7:
                needle = replace(
                    needle, mtime_ns=number(random, 64) - (1 << 63), ctime_ns=number(random, 64) - (1 << 63)
                )
            case 8:
                needle = replace(needle, durable=number(random, 64))
            case 9:
                needle = replace(needle, uid=number(random, 32), gid=number(random, 32))
            case 10:
                needle = replace(needle, mode=number(random, 16))
            case 11:
                needle = replace(needle, owner=random.choice((number(random, 16), 65535, 0)))
            case 12 | 13:
                needle = replace(needle, name=random.choice((*NAMES, needle.name, random.randbytes(len(needle.name)))))
            case 14:
                tag = random.choice((*Tag, 0, 99, 65535))
                value = random.choice(
                    (
                        b"",
                        b"\1",
                        number(random, 64).to_bytes(8, "little"),
                        b"\xff" * 12,
                        random.randbytes(32),
                        random.choice(inodes).to_bytes(8, "little"),
                    )
                )
                needle = replace(needle, extras={**needle.extras, tag: value})
            case 15:
                state = [number(random, 32) for _ in range(5)]
                needle = replace(needle, extras={**needle.extras, Tag.CHECKPOINT: INDEX_STATE.pack(*state)})
    return needle


def lying_needle(case: Case, random: Random) -> None:
    """Change the fields of a needle, and fix its checksums; what lies behind it may be covered by it."""
    at = any_needle(case, random)
    if at is None:
        return
    needle = _hostile(at.needle, random, case)
    if write_needle(case, at.path, at.offset, needle, case.seed.data(at)):
        case.log.append(f"lie {at.path} {at.offset}: {at.needle} -> {needle}")


def lying_length(case: Case, random: Random) -> None:
    """Change the lengths that a header tells, and fix its checksum alone."""
    at = any_needle(case, random)
    if at is None:
        return
    data = case.files[at.path]
    fields = list(NEEDLE_HEADER.unpack_from(data, at.offset))
    where = random.choice((1, 11, 16))  # header_bytes, data_size, name_bytes
    fields[where] = number(random, 32 if where == 11 else 16)
    fixed = NEEDLE_HEADER.pack(*fields)
    tail = data[at.offset + NEEDLE_HEADER.size + 8 : at.offset + fields[1] + fields[16]]
    seed = case.seed.headers[at.path].seed()
    value = xxhash.xxh3_64_intdigest(fixed + bytes(tail), (seed + at.offset) & 0xFFFF_FFFF_FFFF_FFFF)
    data[at.offset : at.offset + NEEDLE_HEADER.size + 8] = fixed + CHECKSUM.pack(value)
    case.touch(at.path, at.offset, at.end)
    case.lying = True
    told = unpack_needle_header(memoryview(data)[at.offset :], seed, at.offset)
    if told is not None and not told.data_size:
        case.lie(told, b"")
    if told is not None and random.random() < 0.7:  # a footer that fits, so that the data counts
        start = at.offset + told.data_start
        body = bytes(data[start : start + told.data_size])
        if len(body) == told.data_size:
            footer = pack_footer(checksums(body), len(body), told.checksum)
            data[start + len(body) : start + len(body) + len(footer)] = footer
            case.touch(at.path, start, start + len(body) + len(footer))
            case.lie(told, body)
    case.log.append(f"length {at.path} {at.offset}: field {where} is {fields[where]}")


def lying_attributes(case: Case, random: Random) -> None:
    """Let the data of an XATTR be no attributes."""
    found = [
        at for at in case.seed.needles if at.needle.kind == Kind.XATTR and len(case.files.get(at.path, b"")) >= at.end
    ]
    if not found:
        return
    at = random.choice(found)
    data = bytearray(case.seed.data(at))
    if not data:
        return
    where = random.randrange(random.choice((len(data), min(6, len(data)))))
    data[where] ^= random.randrange(1, 256)
    if write_needle(case, at.path, at.offset, replace(at.needle), bytes(data)):
        case.log.append(f"attributes {at.path} {at.offset}")


def lying_log(case: Case, random: Random) -> None:
    """Write the needles of a volume anew: repeated, dropped, in another order, of another volume, with other fields."""
    path = any_file(case, random, ".vol")
    own = [at for at in case.seed.needles if at.path == path]
    if not own:
        return
    log = [(replace(at.needle), case.seed.data(at)) for at in own]
    for _ in range(random.choice((1, 1, 2, 4))):
        if not log:
            break
        one, other = random.randrange(len(log)), random.randrange(len(log))
        match random.randrange(6):
            case 0:
                log[one], log[other] = log[other], log[one]
            case 1:
                log.insert(one, (replace(log[other][0]), log[other][1]))
            case 2:
                del log[one]
            case 3:
                at = random.choice(case.seed.needles)
                log.insert(one, (replace(at.needle), case.seed.data(at)))
            case 4 | 5:
                log[one] = _hostile(log[one][0], random, case), log[one][1]
    _rewrite(case, path, log, index=random.random() < 0.5)
    case.log.append(f"log {path}: {[(Kind(n.kind).name if n.kind in [*Kind] else n.kind, n.inode) for n, _ in log]}")


def _rewrite(case: Case, path: str, log: list[tuple[Needle, bytes]], *, index: bool) -> None:
    """Make *log* all that the volume at *path* says; with *index* let checkpoints vouch for an index of it."""
    case.rearranged = True
    header = case.seed.headers[path]
    del case.files[path][NEEDLES_START:]
    records, names = bytearray(), bytearray(names_header(header.volume_id))
    for needle, data in log:
        offset = len(case.files[path])
        if index and needle.kind == Kind.CHECKPOINT and len(needle.extras.get(Tag.CHECKPOINT, b"")) == INDEX_STATE.size:
            state = IndexState(offset, len(records) // INDEX_RECORD_BYTES, crc32c(records), len(names), crc32c(names))
            needle.extras = {**needle.extras, Tag.CHECKPOINT: INDEX_STATE.pack(*state)}
        if needle.durable > offset and needle.durable < 1 << 20:
            needle.durable = offset
        if not write_needle(case, path, offset, needle, data):
            continue
        name_offset = len(names) if needle.name and names_a_name(needle.kind) else 0
        try:
            records += pack_record(needle, offset, name_offset, xxhash.xxh3_64_intdigest(needle.name) & 0xFF_FFFF)
            names += pack_name(needle.name) if name_offset else b""
        except (struct.error, OverflowError, ValueError):
            index = False
    if index:
        stem = path.removesuffix(".vol")
        case.files[stem + ".idx"], case.files[stem + ".names"] = records, names


_RECORD_BITS = (8, 32, 32, 32, 32, 32, 63, 32, 16, 32)


def lying_index(case: Case, random: Random) -> None:
    """Change records or names, and fix the checksums that a checkpoint of the volume vouches with."""
    path = any_file(case, random, ".vol")
    stem = path.removesuffix(".vol")
    found = [at for at in case.seed.needles if at.path == path and at.needle.kind == Kind.CHECKPOINT]
    if not found or stem + ".idx" not in case.files or stem + ".names" not in case.files:
        return
    at = random.choice(found)
    state = IndexState(*INDEX_STATE.unpack(at.needle.extras[Tag.CHECKPOINT]))
    records, names = case.files[stem + ".idx"], case.files[stem + ".names"]
    if not state.records or len(records) < state.records * INDEX_RECORD_BYTES or len(case.files[path]) < at.end:
        return
    for _ in range(random.choice((1, 1, 2, 5))):
        row = INDEX_RECORD_BYTES * random.randrange(state.records)
        fields = list(INDEX_RECORD.unpack_from(records, row))
        which = random.randrange(len(fields) + 2)
        if which < len(fields):
            others = [INDEX_RECORD.unpack_from(records, INDEX_RECORD_BYTES * n)[which] for n in range(state.records)]
            fields[which] = random.choice((number(random, _RECORD_BITS[which]), random.choice(others)))
            INDEX_RECORD.pack_into(records, row, *fields)
        elif which == len(fields):
            other = INDEX_RECORD_BYTES * random.randrange(state.records)
            records[row : row + INDEX_RECORD_BYTES] = records[other : other + INDEX_RECORD_BYTES]
        elif len(names) >= state.names_bytes > 16:
            names[random.randrange(16, state.names_bytes)] = random.choice((0, 47, 255, 1, 46))
    size = state.records * INDEX_RECORD_BYTES
    state = state._replace(
        records_crc=crc32c(bytes(records[:size])), names_crc=crc32c(bytes(names[: state.names_bytes]))
    )
    needle = replace(at.needle, extras={**at.needle.extras, Tag.CHECKPOINT: INDEX_STATE.pack(*state)})
    write_needle(case, at.path, at.offset, needle, b"")
    case.log.append(f"index lies {stem}, checkpoint at {at.offset}")


_HEADER_BITS = (0, 16, 16, 32, 32, 32, 0, 0, 64, 64, 63, 64)


def lying_header(case: Case, random: Random) -> None:
    """Change the header of a volume, one copy or both, and fix the checksum."""
    path = any_file(case, random, ".vol")
    data = case.files.get(path)
    if path not in case.seed.headers or data is None or len(data) < NEEDLES_START:
        return
    fields = list(VOLUME_HEADER.unpack_from(data))
    (length,) = fields[2:3]
    extras = bytes(data[VOLUME_HEADER.size + 8 : length]) if length < 4096 else b""
    which = random.randrange(13)
    if which in (6, 7):
        fields[which] = random.randbytes(16)
    elif 1 <= which < 12:
        fields[which] = number(random, _HEADER_BITS[which])
    else:
        ids = [header.volume_id for header in case.seed.headers.values()]
        size = random.choice((0, 7, 8, 16, 40, 48, 60))
        value = struct.pack("<Q", random.choice(ids)) + random.randbytes(60)
        extras = pack_extras({random.choice((*Tag, 8, 9, 77)): value[:size]})
        extras = extras if random.random() < 0.8 else random.randbytes(20)
    if which != 2:
        fields[2] = VOLUME_HEADER.size + 8 + len(extras)
    fixed = VOLUME_HEADER.pack(*fields)
    copy = fixed + CHECKSUM.pack(xxhash.xxh3_64_intdigest(fixed + extras)) + extras
    copies = random.choice(
        (VOLUME_HEADER_COPIES, VOLUME_HEADER_COPIES, VOLUME_HEADER_COPIES[:1], VOLUME_HEADER_COPIES[1:])
    )
    for start in copies:
        data[start : start + len(copy)] = copy
    case.lying = case.rearranged = True
    case.touch(path, 0, NEEDLES_START)
    case.log.append(f"header {path}: field {which}, copies {copies}")


def lying_superblock(case: Case, random: Random) -> None:
    """Let the superblock say something else, with the right checksum."""
    import json

    fields = json.loads(pack_superblock(Superblock(bytes(16), 10_000)))
    fields.pop("checksum")
    key = random.choice((*fields, "more"))
    values = (
        None,
        -1,
        0,
        1,
        2,
        1 << 80,
        1e400,
        "x",
        "",
        [],
        {},
        True,
        10_000,
        "12",
        1.5,
        "00000000-0000-0000-0000-000000000000",
    )
    fields[key] = random.choice(values)
    if random.random() < 0.2:
        fields.pop(random.choice(sorted(fields)))
    checksum = f"{crc32c(json.dumps(fields, sort_keys=True).encode()):08x}"
    text = json.dumps(fields | {"checksum": checksum})
    if random.random() < 0.1:
        text = random.choice(
            ("[" * 5000, "[]", "1", "null", '"checksum"', "{}", "1" * 5000, '{"checksum": {}}', "\ufeff{}", "\x00")
        )
    case.files[SUPERBLOCK] = bytearray(text.encode())
    case.lying = case.rearranged = True
    case.log.append(f"superblock {text[:200]}")


LIES: dict[Mutator, int] = {
    lying_needle: 24,
    lying_length: 8,
    lying_attributes: 3,
    lying_log: 14,
    lying_index: 12,
    lying_header: 6,
    lying_superblock: 2,
}
