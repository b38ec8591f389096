"""Small files beside the volumes, in JSON, that say what a program knows: one that makes no sense is as good as none.

Owns how they are read and written. Must not know what they say.

*Concurrency:* a file is replaced in one durable step; anybody may read it.
"""

import json
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from imgfs.disk import Disk

log = logging.getLogger(__name__)

T = TypeVar("T")


def read_state_file(disk: Disk, path: str, version: int, parse: Callable[[Any], T], otherwise: str) -> T | None:
    """Return what *parse* makes of the file at *path*; None if there is none, or if it makes no sense.

    *parse* may raise what a structure of other types makes it raise. *version* is the format it must have; *otherwise*
    tells what becomes of a file that makes no sense. OSError as the disk says.
    """
    if not disk.exists(path):
        return None
    data = disk.read_file(path)
    try:
        content = json.loads(data)
        if content["format"] != version:
            raise ValueError("format")
        return parse(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        log.warning("%s is damaged; %s", path, otherwise)
        return None


def write_state_file(disk: Disk, path: str, version: int, content: dict[str, Any]) -> None:
    """Make *content* what the file at *path* says. OSError as the disk says."""
    data = json.dumps({"format": version} | content, indent=2)
    disk.replace_file(path, data.encode() + b"\n")
