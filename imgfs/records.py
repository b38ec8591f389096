"""What stands in the rows of the table, unpacked: records, places of needles, volumes.

Owns the names of their fields. Must not know where rows lie, nor who changes them.

*Concurrency:* none; these are values.
"""

from typing import NamedTuple

from imgfs.format import Kind
from imgfs.layout import Flag

_KIND, _KIND_OR_DEAD, _STALE = Flag.KIND, Flag.KIND | Flag.DEAD, Flag.STALE_MTIME
_STALE_DIRECTORY = _STALE | int(Kind.DIRECTORY)


class Record(NamedTuple):
    """A record, unpacked; the fields as layout.RECORD has them."""

    flags: int
    volume: int
    name_volume: int
    parent: int  # slot + 1
    name_offset: int
    offset8: int
    size: int
    mtime_ns: int
    ctime_s: int
    owner: int
    hash_generation: int

    @property
    def kind(self) -> int:
        return self.flags & _KIND

    @property
    def live(self) -> bool:
        """Whether it has a name, or a link has; the record of an unlinked image rests until its slot is needed."""
        return 0 < self.flags & _KIND_OR_DEAD <= _KIND  # the bit DEAD lies above the kind

    @property
    def stale(self) -> bool:
        """Whether it is a directory that changed since its last needle."""
        return self.flags & (_STALE | _KIND) == _STALE_DIRECTORY

    @property
    def generation(self) -> int:
        return self.hash_generation >> 24


class Place(NamedTuple):
    """Where a needle came to lie: entries of the volume table, bytes from the start of its files."""

    volume: int
    offset: int
    name_offset: int


class VolumeEntry(NamedTuple):
    """A row of the volume table."""

    volume_id: int
    end: int
    first_sequence: int
    flags: int
