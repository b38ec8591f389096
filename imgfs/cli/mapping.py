"""`imgfs map`: what the bytes of a store's volumes are good for, in the terminal or as a picture.

Owns characters and colours, and what the totals say. Must not judge bytes, nor change the store.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator

import click
import numpy as np

from imgfs.cli.opening import open_store
from imgfs.cli.picture import Cells, Picture, choose_cells, live_share, runs, share_text
from imgfs.cli.text import binary_size, counted, echo, is_terminal, local_time, path_argument
from imgfs.format import NEEDLES_START
from imgfs.options import MountOptions
from imgfs.store import Store
from imgfs.usage import Class, VolumeSize, VolumeUsage

# A sealed volume of which less is live is worth a compaction.
_COMPACTED_BELOW = MountOptions().compact_percent / 100
_BELOW = share_text(_COMPACTED_BELOW)
_BAR_WIDTH_MIN = 10
_CHARACTERS = {Class.LIVE: "█", Class.METADATA: "▓", Class.DEAD: "░", Class.FREE: "·"}
_ASCII = {Class.LIVE: "#", Class.METADATA: "+", Class.DEAD: "-", Class.FREE: "."}
_COLOURS = {Class.LIVE: "green", Class.METADATA: "cyan", Class.DEAD: "yellow", Class.FREE: "bright_black"}
_MEANS = {
    Class.LIVE: "images, links and attributes",
    Class.METADATA: "directories, renames, deletes, owners, checkpoints",
    Class.DEAD: "deleted, replaced, or torn",
    Class.FREE: "holes, given back already",
}


def _picture_path(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.lower().endswith((".png", ".svg")):
        raise click.BadParameter(f"'{value}' ends neither in .png nor in .svg")
    return value


@click.command("map")
@path_argument("store_path", "STORE")
@click.option("-o", "--output", metavar="FILE", callback=_picture_path, help="Draw a picture: FILE.png or FILE.svg.")
def map_command(store_path: str, output: str | None) -> None:
    """Draw which bytes of the volumes of STORE are live, metadata, dead, or given back as holes.

    Each volume is a row, from its first byte to its last. Below stand the totals, and what compaction or punching
    holes would give back. The store may be mounted.

    \b
    Example:
      imgfs map -o map.svg /srv/photos.imgfs
    """
    with open_store(store_path) as store:
        listed = store.usage().volumes()
        if not listed:
            echo("there are no volumes")
            return
        if output is None:
            _Bars(store, listed).print()
        else:
            _draw(store, listed, output)


class _Totals:
    """What all volumes add up to."""

    def __init__(self) -> None:
        self.bytes_of = np.zeros(len(Class), np.int64)
        self.volumes = self.worth_it = self.copied = self.compactable = self.punchable = 0

    def add(self, usage: VolumeUsage) -> None:
        amounts = usage.bytes_of()
        self.volumes += 1
        self.bytes_of += amounts
        self.punchable += usage.punchable_bytes
        needed = int(amounts[Class.LIVE] + amounts[Class.METADATA])
        if usage.sealed and live_share(usage) < _COMPACTED_BELOW:
            self.worth_it += 1
            self.copied += needed
            # A header is metadata, too; all copies together need but one.
            self.compactable += int(amounts[Class.DEAD]) + (NEEDLES_START if self.worth_it > 1 else 0)

    @property
    def size(self) -> int:
        return int(self.bytes_of.sum())

    def of(self, each: Class) -> tuple[str, str]:
        """Return how much there is of a class, and which share that is."""
        amount = int(self.bytes_of[each])
        return binary_size(amount), share_text(amount / self.size)

    def gains(self) -> Iterator[str]:
        """Yield what could be gained, a sentence each."""
        if self.worth_it:
            volumes = "1 sealed volume is" if self.worth_it == 1 else f"{self.worth_it:,} sealed volumes are"
            copied, gain = binary_size(self.copied), binary_size(self.compactable)
            yield f"{volumes} less than {_BELOW} live: compaction copies {copied} and gives back {gain}."
        else:
            yield f"No sealed volume is less than {_BELOW} live: compaction has nothing to do."
        yield f"Punching holes gives back {binary_size(self.punchable)}."


# -- in the terminal --------------------------------------------------------------------------------------------------


class _Bars:
    """A row of characters for each volume."""

    def __init__(self, store: Store, listed: list[VolumeSize]) -> None:
        self._usage = store.usage()
        self._listed = listed
        unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
        self._characters = _CHARACTERS if unicode else _ASCII
        # https://no-color.org: any value but an empty one.
        self._coloured = is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._id_width = max(len("volume"), *(len(str(each.volume_id)) for each in listed))
        width = shutil.get_terminal_size().columns - self._id_width - len("   1023.9 MiB   100 %  ")
        self._width = max(width, _BAR_WIDTH_MIN)
        self._cell_bytes = max(each.size for each in listed) / self._width

    def print(self) -> None:
        totals = _Totals()
        echo(f"{'volume':>{self._id_width}}   {'size':>10}   {'live':>5}  a character is {self._cell()}")
        for each in self._listed:
            usage = self._usage.of(each)
            totals.add(usage)
            size, share = binary_size(usage.size), share_text(live_share(usage))
            echo(f"{each.volume_id:>{self._id_width}}   {size:>10}   {share:>5}  {self._bar(usage)}")
        echo("")
        for kind in Class:
            amount, share = totals.of(kind)
            sample = self._drawn(np.full(2, kind, np.uint8))
            echo(f"{kind.name.lower():<8} {sample} {amount:>12} {share:>6}  {_MEANS[kind]}")
        echo(f"{'in all':<8}    {binary_size(totals.size):>12}         {counted(totals.volumes, 'volume')}")
        for sentence in totals.gains():
            echo(sentence)

    def _cell(self) -> str:
        return binary_size(round(self._cell_bytes))

    def _bar(self, usage: VolumeUsage) -> str:
        count = min(math.ceil(usage.size / self._cell_bytes), self._width)
        edges = np.minimum(np.arange(count + 1) * self._cell_bytes, usage.size)
        return self._drawn(choose_cells(usage.spread(edges)))

    def _drawn(self, cells: Cells) -> str:
        parts = []
        for cell, _, length in runs(cells):
            text = self._characters[Class(cell)] * length
            parts.append(click.style(text, fg=_COLOURS[Class(cell)]) if self._coloured else text)
        return "".join(parts)


# -- as a picture -----------------------------------------------------------------------------------------------------


def _draw(store: Store, listed: list[VolumeSize], output: str) -> None:
    picture = Picture(f"Volumes of {os.path.abspath(store.path)}", [each.size for each in listed])
    totals, usage = _Totals(), store.usage()
    for each in listed:
        found = usage.of(each)
        totals.add(found)
        picture.add(found)
    subtitle = f"{counted(totals.volumes, 'volume')}, {binary_size(totals.size)}, on {local_time(time.time_ns())}"
    legend = []
    for kind in Class:
        amount, share = totals.of(kind)
        legend.append((kind, f"{kind.name.lower()} {amount} ({share})"))
    picture.finish(subtitle, legend, " ".join(totals.gains()))
    if output.lower().endswith(".svg"):
        with open(output, "w", encoding="utf-8") as file:
            file.write(picture.svg())
    else:
        picture.save_png(output)
    echo(f"drew {counted(totals.volumes, 'volume')} in {output}")
