"""The volumes of a store that are open for reading, by their entry in the volume table.

Owns the descriptors. Must not know what is read. A volume that the log has begun since is opened when it is first
needed, so that any process that shares the table finds it.

*Concurrency:* an entry is opened once, under a thread lock, and stays.
"""

import threading
from dataclasses import dataclass

from imgfs.disk import Disk
from imgfs.errors import Stale
from imgfs.index import Names, index_paths
from imgfs.layout import VOLUME_GONE, VOLUME_SEALED, Word
from imgfs.plausible import NUMBER_MAX
from imgfs.table import Table
from imgfs.volume import Volume

# The directory of a store that holds them, and what their names end with.
VOLUMES = "volumes"
SUFFIX = ".vol"


@dataclass
class OpenVolume:
    """A volume and the names that its needles gave."""

    volume: Volume
    names: Names


def volume_path(directory: str, volume_id: int) -> str:
    """Return the path of a volume in *directory*."""
    return f"{directory}/{volume_id:08d}{SUFFIX}"


def volume_id_of(name: str) -> int:
    """Return the number of the volume that a file of that *name* belongs to, 0 if it is no such name."""
    stem = name.partition(".")[0]
    number = int(stem) if stem.isascii() and stem.isdecimal() and len(stem) < 20 else 0
    return number if number <= NUMBER_MAX else 0


class Volumes:
    """The open volumes."""

    def __init__(self, disk: Disk, directory: str, table: Table) -> None:
        self._disk = disk
        self._directory = directory
        self._table = table
        self._open: dict[int, OpenVolume] = {}
        self._gone = 0  # removed volumes when we last looked
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """Be a process of its own; files that the parent opened serve both."""
        self._lock = threading.Lock()

    @property
    def gone(self) -> int:
        """How many volumes were removed since the store was opened."""
        return self._table.memory.words[Word.VOLUMES_GONE]

    def add(self, entry: int, volume: OpenVolume) -> None:
        """Take over a volume that was opened already."""
        self._open[entry] = volume

    def get(self, entry: int) -> OpenVolume:
        """Return the volume with that *entry*.

        Raises:
            Stale: it was removed: what is looked for lies elsewhere by now, or is gone.
        """
        if self._gone != self.gone:
            self._forget()
        found = self._open.get(entry)
        if found is not None:
            return found
        with self._lock:
            if entry not in self._open:
                path = volume_path(self._directory, self._table.volume(entry).volume_id)
                try:
                    self._open[entry] = self._opened(path)
                except FileNotFoundError:
                    if self._disk.exists(path):
                        raise
                    raise Stale(f"the volume in row {entry} is removed") from None
            return self._open[entry]

    def _opened(self, path: str) -> OpenVolume:
        """Open the volume at *path*, which may be removed meanwhile."""
        volume = Volume.open(self._disk, path)
        try:
            return OpenVolume(volume, Names(self._disk, self._disk.open(index_paths(path).names)))
        except BaseException:
            volume.close()
            raise

    def _forget(self) -> None:
        """Close the volumes that were removed; their rows may hold others by now."""
        with self._lock:
            gone = self.gone
            for entry, opened in list(self._open.items()):
                if self._table.volume(entry).volume_id != opened.volume.header.volume_id:
                    del self._open[entry]
                    opened.volume.close()
                    opened.names.close()
            # Not before: another thread would take what is not forgotten yet for the volume that has its row now.
            self._gone = gone

    def rows(self, *, sealed: bool = False) -> list[int]:
        """Return the rows of all volumes, or of the *sealed* ones, in the order of their sequence numbers."""
        wanted = VOLUME_SEALED if sealed else 0
        found = []
        for row in range(self._table.memory.words[Word.VOLUMES]):
            entry = self._table.volume(row)
            if entry.flags & (VOLUME_GONE | wanted) == wanted:
                found.append((entry.first_sequence, entry.volume_id, row))
        return [row for _, _, row in sorted(found)]

    def prefetch_names(self) -> None:
        """Let the disk read all names into the page cache."""
        for opened in list(self._open.values()):
            opened.names.prefetch()

    def close(self) -> None:
        for opened in self._open.values():
            opened.volume.close()
            opened.names.close()
        self._open.clear()
