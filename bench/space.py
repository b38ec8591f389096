"""Space: what an image takes on the disk beyond its own bytes, with everything a system keeps about it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from bench.lineup import Lineup, line_up
from bench.neighbours import JuiceFs, SeaweedFs
from bench.result import OURS, Result
from bench.site import Site, drop_caches
from bench.systems import Imgfs, System, Xfs
from bench.trees import make_tree, name_file

_KINDS = (Imgfs, Xfs, JuiceFs, SeaweedFs)
_IMAGE_BYTES = 20_000
ALLOWED_BYTES = 160


@dataclass(frozen=True)
class _Size:
    images: int
    disk_bytes: int


SIZES = {"tiny": _Size(100, 400 << 20), "quick": _Size(300, 1 << 30), "full": _Size(20_000, 4 << 30)}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("space", "Space on the disk", parameters={"images": chosen.images})
    source = site.fresh("source")
    make_tree(source, chosen.images, _IMAGE_BYTES)
    with line_up(site, chosen.disk_bytes, result, _KINDS) as lineup:
        found = _measure(lineup, source, chosen.images)
    result.add("on the disk for each image, more than its own bytes", "bytes", found)
    name_bytes = len(name_file(0))
    allowed = ALLOWED_BYTES + 2 * name_bytes
    result.add(f"the same by {ALLOWED_BYTES} bytes and twice the name", "", {OURS: [found[OURS][0] / allowed]})
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes with names of {name_bytes}, in directories of 1,000. "
        "What the XFS below has less free afterwards, the system taken down and all of it written out: indexes, "
        "databases, inodes, directories and the rest of last blocks are in it; caches, and what XFS has in reserve for "
        "files that may grow, are not."
    )
    return result


def _measure(lineup: Lineup, source: Path, images: int) -> dict[str, list[float]]:
    def fill(system: System, number: int) -> dict[str, float]:
        system.unmount()
        before = _used(system)
        system.mount()
        system.load(source)
        system.unmount()
        # What is only there for speed: JuiceFS keeps a second copy of everything for a while.
        shutil.rmtree(system.home / "cache", ignore_errors=True)
        each = (_used(system) - before) / images - _IMAGE_BYTES
        return {"bytes": each}

    return lineup.take_turns(1, "beyond its own", fill)["bytes"]


def _used(system: System) -> int:
    """Return how many bytes of the disk are in use, once all is written."""
    # XFS gives a growing file more than it needs, and takes it back once it forgets the file, or after minutes.
    drop_caches()
    found = os.statvfs(system.disk.path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize
