"""Removes the index files of a store, so that the next opening makes them anew from the volumes.

Owns which files are derived. Must not know what is in them.

*Concurrency:* holds the store's lock meanwhile.
"""

from imgfs.disk import Disk
from imgfs.errors import Busy, NoStore, disk_error
from imgfs.opening import owner, try_lock
from imgfs.saved_table import saved_paths
from imgfs.volumes import VOLUMES

_DERIVED = (".idx", ".names")


def remove_index(path: str, disk: Disk | None = None) -> list[str]:
    """Remove every index file of the store at *path*, and a table that was kept; return the paths of the index files.

    Raises:
        NoStore: there is none.
        Busy: another process writes to it.
        DiskFailure: the disk refused.
    """
    disk = disk or Disk()
    directory = f"{path}/{VOLUMES}"
    try:
        if not disk.exists(directory):
            raise NoStore(f"there is no store at {path}; make one with: imgfs mkfs {path}")
        lock = try_lock(path, disk)
        if lock is None:
            raise Busy(f"{path} is in use by process {owner(path, disk) or '?'}; unmount it first")
        try:
            paths = [f"{directory}/{name}" for name in disk.names(directory) if name.endswith(_DERIVED)]
            for derived in [*paths, *filter(disk.exists, saved_paths(path))]:
                disk.unlink(derived)
        finally:
            disk.close(lock)
    except OSError as error:
        raise disk_error(error, path) from error
    return paths
