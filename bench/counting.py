"""The daemon of imgfs with a count of every request: `python -m bench.counting mount COUNTS OPTIONS STORE MOUNTPOINT`.

COUNTS is a file of 64-bit words, one for each opcode of FUSE; OPTIONS are those of any mount. What the kernel
or libfuse answers by itself does not count, nor does FORGET, which has no answer.
"""

import mmap
import sys
from collections import Counter
from pathlib import Path

from imgfs.mount import mount
from imgfs.options import parse
from imgfs.requests import Request, Requests
from imgfs.wire import NAMES, Opcode

_OPCODES = 64
# Two forms of the same.
_SAME = {Opcode.READDIRPLUS: Opcode.READDIR, Opcode.RENAME2: Opcode.RENAME}


def make_counts(path: Path) -> Path:
    """Make a file of counts, all 0; return *path*."""
    path.write_bytes(bytes(8 * _OPCODES))
    return path


def read_counts(path: Path) -> Counter[str]:
    """Return how many requests of each kind there were so far."""
    counts: Counter[str] = Counter()
    for opcode, count in enumerate(memoryview(path.read_bytes()).cast("Q")):
        if count and opcode in NAMES:
            counts[NAMES[_SAME.get(opcode, opcode)].lower()] += count
    return counts


def count_in(path: str) -> None:
    """Have every request of this process counted in the file at *path*, when it is noted as being in hand."""
    with open(path, "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
    begin = Requests.begin

    def count_and_begin(requests: Requests, row: int, request: Request) -> None:
        words[request.opcode] += 1
        begin(requests, row, request)

    Requests.begin = count_and_begin  # type: ignore[assignment,method-assign]


def main() -> int:
    _, counts, chosen, store, point = sys.argv[1:]
    count_in(counts)
    # One worker: the counts are words that each process would write over.
    return mount(store, point, parse([chosen, "workers=1"]), daemon=False)


if __name__ == "__main__":
    sys.exit(main())
