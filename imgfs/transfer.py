"""What copying a tree into a store (`import_tree`) and out of it (`export_tree`) have in common.

Owns the words both directions use for what is done and for who watches. Must not know the store.

*Concurrency:* none; one copy runs in one thread. An image is copied in one step, so wherever a copy ends, what was
copied is whole.
"""

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")

# An image up to here is copied in one piece; a larger one in pieces of this size.
PIECE_BYTES = 4 << 20
# Entries of one directory are taken so many at a time, sorted by where they lie on the disk: memory stays bounded
# in a directory of millions, and a cold copy seeks less.
_BATCH = 4096

# Types of files that only root can make.
DEVICES = frozenset({stat.S_IFCHR, stat.S_IFBLK})


@dataclass
class Tally:
    """What a copy has done so far."""

    images: int = 0
    data_bytes: int = 0
    directories: int = 0
    symlinks: int = 0
    special_files: int = 0
    hard_links: int = 0
    """Further names of what has a name in the copy already."""
    separated: int = 0
    """Further names that had to become copies, where there can be no more links, or none."""
    resumed: int = 0
    """Images that were there already and were left as they are."""
    skipped: int = 0
    incomplete: int = 0
    """Those that were copied without some of their extended attributes."""
    damaged: int = 0
    """Those of the skipped and incomplete that are damaged in the store."""


class Observer(Protocol):
    """Who watches a copy."""

    def advanced(self, tally: Tally) -> None:
        """Hear how far the copy is; called where nothing is half done, so raising here ends it cleanly."""

    def skipped(self, path: bytes, reason: str) -> None:
        """Hear that *path* was left out."""

    def incomplete(self, path: bytes, reason: str) -> None:
        """Hear that *path* was copied without something of it."""


class Totals(NamedTuple):
    """How much there is to copy."""

    images: int
    data_bytes: int


def batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield *items* in lists of bounded length."""
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def reason(error: OSError) -> str:
    """Return why the operating system refused a call, as the end of a sentence."""
    return (error.strerror or str(error)).lower()
