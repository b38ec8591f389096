"""What can become of a store's files: bytes flipped, cut, swapped, spliced.

Owns the mutators that write no checksums, each of which knows the format, and how often each is due; those that do
are in lies.py. Must not know how recovery works.

*Concurrency:* none; a case is made from one `Random`, so that its number makes it again.
"""

from random import Random

from cases import STORE, VOLUMES, Case, Mutator, any_file, any_needle, number

from imgfs.format import INDEX_RECORD_BYTES


def flip(case: Case, random: Random) -> None:
    """Flip bits, most often within what a needle or a header says of itself."""
    at = any_needle(case, random)
    if at is not None and random.random() < 0.7:
        part = at.parts()[random.choice(("header", "header", "name", "data", "footer"))]
        path, start, end = at.path, part.start, part.stop
    else:
        path = any_file(case, random)
        start, end = 0, len(case.files.get(path, b""))
    if start >= end:
        return
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        offset = random.randrange(start, end)
        case.files[path][offset] ^= 1 << random.randrange(8)
        case.touch(path, offset, offset + 1)
        case.log.append(f"flip {path} {offset}")


def overwrite(case: Case, random: Random) -> None:
    """Let a block, a sector or a number be something else: zeros, ones, noise."""
    path = any_file(case, random)
    data = case.files.get(path)
    if not data:
        return
    size = random.choice((1, 2, 4, 8, 39, 512, 4096))
    start = random.randrange(len(data))
    if random.random() < 0.6:
        start = start // size * size
    size = min(size, len(data) - start)
    noise = random.choice(
        (bytes(size), b"\xff" * size, random.randbytes(size), number(random, 64).to_bytes(8, "little"))
    )
    data[start : start + size] = (noise + bytes(size))[:size]
    case.touch(path, start, start + size)
    case.log.append(f"overwrite {path} {start}+{size}")


def cut(case: Case, random: Random) -> None:
    path = any_file(case, random)
    data = case.files.get(path)
    if not data:
        return
    ends = [at.end for at in case.seed.needles if at.path == path and at.end < len(data)]
    length = random.choice(ends) if ends and random.random() < 0.4 else random.randrange(len(data))
    case.touch(path, length, len(data))
    del data[length:]
    case.log.append(f"cut {path} to {length}")


def append(case: Case, random: Random) -> None:
    """Let a file be longer than what was written."""
    path = any_file(case, random)
    if not path:
        return
    other = case.files[any_file(case, random)]
    start = random.randrange(len(other) + 1)
    size = random.choice((1, 8, 39, 100, 4096))
    more = random.choice((bytes(size), random.randbytes(size), bytes(other[start : start + size])))
    case.touch(path, len(case.files[path]), len(case.files[path]) + len(more))
    case.files[path] += more
    case.log.append(f"append {len(more)} to {path}")


def shift(case: Case, random: Random) -> None:
    """Take bytes out of a file, or put some in."""
    path = any_file(case, random)
    data = case.files.get(path)
    if not data:
        return
    size = random.choice((1, 8, 39, 64, 512))
    start = random.randrange(len(data)) // size * size
    case.touch(path, start, len(data) + size)
    if random.random() < 0.5:
        del data[start : start + size]
    else:
        data[start:start] = data[start : start + size] if random.random() < 0.5 else bytes(size)
    case.log.append(f"shift {path} at {start} by {size}")


def move_needle(case: Case, random: Random) -> None:
    """Put the bytes of a needle where another lies, in this volume or the next; or let two change places."""
    one, other = any_needle(case, random), any_needle(case, random)
    if one is None or other is None or one is other:
        return
    first, second = case.files[one.path][one.offset : one.end], case.files[other.path][other.offset : other.end]
    case.files[other.path][other.offset : other.offset + len(first)] = first
    case.touch(other.path, other.offset, other.offset + max(len(first), len(second)))
    if random.random() < 0.5:
        case.files[one.path][one.offset : one.offset + len(second)] = second
        case.touch(one.path, one.offset, one.offset + max(len(first), len(second)))
    case.log.append(f"needle {one.path} {one.offset} to {other.path} {other.offset}")


def change_index(case: Case, random: Random) -> None:
    """Repeat, drop, swap or replace records, or names."""
    path = any_file(case, random, random.choice((".idx", ".names")))
    data = case.files.get(path)
    if not data:
        return
    size = INDEX_RECORD_BYTES
    start, end = (random.randrange(len(data)) // size * size for _ in range(2))
    first, second = data[start : start + size], data[end : end + size]
    match random.randrange(4):
        case 0:
            data[start : start + size], data[end : end + size] = second, first
        case 1:
            del data[start : start + size]
        case 2:
            data[start:start] = second
        case 3:
            data[start : start + size] = random.randbytes(len(first))
    case.log.append(f"index {path} {start} {end}")


def lose_file(case: Case, random: Random) -> None:
    path = any_file(case, random)
    if not path:
        return
    case.rearranged |= path.endswith(".vol")
    del case.files[path]
    case.log.append(f"lose {path}")


def swap_files(case: Case, random: Random) -> None:
    """Let a file be what another is, was, or never was."""
    one, other = any_file(case, random), any_file(case, random)
    if not one:
        return
    case.rearranged |= one.endswith(".vol") or other.endswith(".vol")
    match random.randrange(3):
        case 0:
            case.files[one], case.files[other] = case.files[other], case.files[one]
        case 1:
            case.files[one] = bytearray(case.files[other])
        case 2:
            case.files[one] = bytearray(random.randbytes(random.choice((0, 1, 100, 9000))))
    case.log.append(f"swap {one} {other}")


_STRANGERS = (
    "0.vol",
    "x.vol",
    ".vol",
    "\u00b2.vol",
    "\u0663.vol",
    "-1.vol",
    "00000001.vol.new",
    "1.vol",
    "00000099.vol",
)
_STRANGERS += (
    "99999999999999999999.vol",
    "00000098.idx",
    "\u00b2.idx",
    "00000099.names",
    "note",
    "18446744073709551615.vol",
)


def strangers(case: Case, random: Random) -> None:
    """Put files into the store that do not belong there: under any name, with any content."""
    directory, names = random.choice(
        ((VOLUMES, _STRANGERS), (VOLUMES, _STRANGERS), (f"{STORE}/staging", ("0000", "x")))
    )
    path = f"{directory}/{random.choice(names)}"
    content = random.choice((b"", random.randbytes(50), bytes(case.files[any_file(case, random)])))
    case.files[path] = bytearray(content)
    case.log.append(f"stranger {path!r} of {len(content)}")


PLAIN: dict[Mutator, int] = {
    flip: 20,
    overwrite: 10,
    cut: 5,
    append: 5,
    shift: 4,
    move_needle: 6,
    change_index: 6,
    lose_file: 2,
    swap_files: 3,
    strangers: 3,
}
