"""Until when the trash of a store was emptied: what was deleted or replaced by then is not kept any longer.

Owns `STORE/trash.json`. Must not know what is in the trash, nor who frees it.

*Concurrency:* the file is replaced in one durable step; of two who empty at once the later time stays, or either if
both do it at the same moment.
"""

import json

from imgfs.disk import Disk
from imgfs.errors import disk_error

TRASH = "trash.json"


def emptied_ns(disk: Disk, store_path: str) -> int:
    """Return the time, in ns since 1970, up to which the trash of the store at *store_path* was emptied; 0: never.

    A file that is not whole counts for nothing: the trash is kept too long rather than too short.
    """
    path = f"{store_path}/{TRASH}"
    try:
        if not disk.exists(path):
            return 0
        data = disk.read_file(path)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        value = json.loads(data)["emptied_ns"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return value if isinstance(value, int) else 0


def empty(disk: Disk, store_path: str, until_ns: int) -> None:
    """Say that what went up to *until_ns* is not kept any longer; durable when this returns, and never taken back.

    Raises:
        StoreFull, DiskFailure: as the disk says.
    """
    path = f"{store_path}/{TRASH}"
    until_ns = max(until_ns, emptied_ns(disk, store_path))
    try:
        disk.replace_file(path, (json.dumps({"emptied_ns": until_ns}) + "\n").encode())
    except OSError as error:
        raise disk_error(error, path) from error
