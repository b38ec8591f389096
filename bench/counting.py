"""The daemon of imgfs with a count of every request: `python -m bench.counting mount COUNTS OPTIONS STORE MOUNTPOINT`.

COUNTS is a file of 64-bit words, one for each handler in the order of `HANDLERS`; OPTIONS are those of any mount. What
the kernel or libfuse answers without asking a handler does not count; FORGET, which has no answer, counts once for each
message.
"""

import inspect
import mmap
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyfuse3

import imgfs.worker
from imgfs.fs import Filesystem
from imgfs.mount import mount
from imgfs.options import parse

HANDLERS = tuple(
    sorted(
        name
        for name, value in vars(pyfuse3.Operations).items()
        if not name.startswith("_") and (inspect.iscoroutinefunction(value) or name == "forget")
    )
)
_WORD_BYTES = 8


def make_counts(path: Path) -> Path:
    """Make a file of counts, all 0; return *path*."""
    path.write_bytes(bytes(_WORD_BYTES * len(HANDLERS)))
    return path


def read_counts(path: Path) -> Counter[str]:
    """Return how many requests each handler has had so far."""
    words = memoryview(path.read_bytes()).cast("Q")
    return Counter(dict(zip(HANDLERS, words, strict=True)))


def counting(path: str) -> type[Filesystem]:
    """Return the class of a `Filesystem` that counts its requests in the file at *path*."""
    with open(path, "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")

    def counted(name: str, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        index = HANDLERS.index(name)

        async def count_and_answer(*args: Any) -> Any:
            words[index] += 1
            return await handler(*args)

        def count_and_do(*args: Any) -> Any:
            words[index] += 1
            return handler(*args)

        return count_and_answer if inspect.iscoroutinefunction(handler) else count_and_do

    return type(
        "CountingFilesystem", (Filesystem,), {name: counted(name, getattr(Filesystem, name)) for name in HANDLERS}
    )


def main() -> int:
    _, counts, chosen, store, point = sys.argv[1:]
    imgfs.worker.Filesystem = counting(counts)  # type: ignore[attr-defined]
    # One worker: the counts are words that each process would write over.
    return mount(store, point, parse([chosen, "workers=1"]), daemon=False)


if __name__ == "__main__":
    sys.exit(main())
