"""What imgfs is to reach, held against what was found: the table at the top of docs/performance.md.

Owns the list of targets. Must not know how anything is measured.
"""

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.result import OURS

_BOTH = ("JuiceFS", "SeaweedFS")
_PASSING = ("bindfs", "passthrough_ll", "JuiceFS")

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A row of a bench and what it has to be: a figure of imgfs, or its ratio to the best of others."""

    what: str
    bench: str
    row: str
    """A regular expression for all of its name; the last one that fits counts."""
    least: float | None = None
    most: float | None = None
    against: tuple[str, ...] = ()
    unit: str = ""

    def find(self, found: Found) -> Found | None:
        """Return the row in what a bench has found."""
        rows = [row for row in found["rows"] if re.fullmatch(self.row, row["what"])]
        return rows[-1] if rows else None

    def measured(self, found: Found) -> list[float]:
        """Return figures or ratios, round by round; none if it was not measured."""
        row = self.find(found)
        if row is None or OURS not in row["systems"]:
            return []
        ours = row["systems"][OURS]["samples"]
        if not self.against:
            return list(ours)
        theirs = [row["systems"][name]["samples"] for name in self.against if name in row["systems"]]
        return [mine / max(others) for mine, *others in zip(ours, *theirs, strict=False)] if theirs else []

    def absent(self, found: Found) -> list[str]:
        """Return what it is to be compared with, and could not be."""
        row = self.find(found)
        return [name for name in self.against if row is None or name not in row["systems"]]

    def is_met(self, figure: float) -> bool:
        return (self.least is None or figure >= self.least) and (self.most is None or figure <= self.most)

    @property
    def wanted(self) -> str:
        """Return the target in words."""
        if not self.against:
            return " ".join(
                word for word in (f"at most {self.most:g}" if self.most is not None else "", self.unit) if word
            )
        other = self.against[0] if len(self.against) == 1 else f"the best of {', '.join(self.against)}"
        return f"at least {self.least:g}x {other}"


def _each(what: str, bench: str, row: str, *limits: tuple[float, tuple[str, ...]]) -> list[Target]:
    """Return one target for each of several to be compared with."""
    return [Target(what, bench, row, least, against=against) for least, against in limits]


_DURABLE = ((1.6, ("bindfs",)), (1.0, ("XFS",)))
_LISTED = {"`ls -U`": "of a directory of 1 million", "`ls -l`": "of the same", "`find`": "over 1 million in 1,000"}

TARGETS: tuple[Target, ...] = (
    Target("disk reads per cold image, 200,000 images, 1 reader", "cold", "disk reads per image, 1 reader", most=1.05),
    Target("the same, 4 readers", "cold", "disk reads per image, 4 readers", most=1.05),
    Target("the same, 10,000,000 images", "cold", r"disk reads per image of [\d,]+", most=1.05),
    Target("the same, many directories down", "cold", r"disk reads per image, \d+ directories down", most=1.05),
    *_each("cold images per second, 1 reader", "cold", "images per second, 1 reader", (1.5, ("XFS",))),
    *_each("the same, 4 readers", "cold", "images per second, 4 readers", (1.5, ("XFS",))),
    *_each("the same, 1 reader, disk capped", "cold", "images per second, 1 reader, capped.*", (2.5, ("XFS",))),
    *_each("the same, 4 readers, disk capped", "cold", "images per second, 4 readers, capped.*", (2.5, ("XFS",))),
    *_each("open, read, close, hot, 1 client", "hot", "open, read, close, 1 client, 1 worker", (1.3, ("bindfs",))),
    *_each("the same, 2 workers", "hot", "open, read, close, 1 client, 2 workers", (1.3, ("bindfs",))),
    *_each(
        "the same, 4 clients, 2 workers",
        "hot",
        "open, read, close, 4 clients, 2 workers",
        (1.2, ("bindfs",)),
        (1.5, _BOTH),
    ),
    *_each("nginx, hot, `open_file_cache` on", "web", "GET, open_file_cache on", (0.95, ("XFS",))),
    *_each("the same, off", "web", "GET, open_file_cache off", (1.0, _PASSING), (1.5, _PASSING)),
    Target("FUSE requests for a GET of a known image", "requests", "GET of a known image", most=3.0),
    Target("the same, of a new one", "requests", "GET of an image that is new to the kernel", most=4.0),
    *_each("`cp -r` in", "copying", "`cp -r` in", (1.5, ("bindfs",)), (5.0, _BOTH)),
    *_each("`imgfs import` against `cp -r`", "copying", "`imgfs import` / XFS: `cp -r`", (1.5, ("XFS",))),
    *_each("durable ingest, 4 writers", "ingest", "create, write, fsync, close, 4 writers", *_DURABLE),
    *_each("the same, 16 writers", "ingest", "create, write, fsync, close, 16 writers", *_DURABLE),
    Target(
        "memory of all processes, 10,000,000 images",
        "memory",
        "all of the daemon,.*",
        most=48.0,
        unit="bytes per image",
    ),
    Target(
        "start, 10,000,000 images, clean",
        "start",
        "clean start, [^,]+(,\\d+)* images, everything.*",
        most=1.0,
        unit="s",
    ),
    Target("the same, after a crash", "start", "start after a crash, .*", most=5.0, unit="s"),
    *_each(
        "the same, from volumes alone",
        "start",
        "from volumes alone, images of 20 KB",
        (0.95, ("the disk, read in order",)),
    ),
    *(
        target
        for name, where in _LISTED.items()
        for target in (
            Target(f"{name} {where}, warm", "listing", f"{name}, warm", 4.0, against=("JuiceFS", "bindfs")),
            Target(f"{name} {where}, cold", "listing", f"{name}, cold", 1.0, against=("XFS",)),
        )
    ),
    Target("disk bytes per image over its own", "space", "the same by .*", most=1.0, unit="x (160 + twice the name)"),
    *_each("`rm -rf` of 100,000", "copying", "`rm -rf`", (1.3, ("bindfs",)), (5.0, _BOTH)),
)


def summary_table(results: Mapping[str, Found]) -> str:
    """Return target by target whether it is met, as a table in Markdown."""
    lines = ["| what | target | measured | met? |", "| --- | --- | ---: | --- |"]
    for target in TARGETS:
        found = results.get(target.bench)
        figures = target.measured(found) if found else []
        absent = target.absent(found) if found and figures else []
        lines.append(f"| {target.what} | {target.wanted} | {_said(target, figures, absent)} |")
    return "\n".join(lines)


def _said(target: Target, figures: list[float], absent: list[str]) -> str:
    if not figures:
        return "| not measured"
    median = statistics.median(figures)
    sign = "x" if target.against else ""
    spread = f" ({min(figures):.3g} to {max(figures):.3g})" if min(figures) < max(figures) else ""
    without = f", without {' and '.join(absent)}" if absent else ""
    return f"{median:.3g}{sign}{spread} | {'yes' if target.is_met(median) else '**no**'}{without}"
