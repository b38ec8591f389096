"""The picture that `imgfs map -o` draws: each volume as rows of bytes, coloured by what they are good for.

Owns where everything stands in it, and both formats. Must not know the store, nor judge its bytes. Pillow is asked for
only by PNG.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import numpy.typing as npt

from imgfs.cli.text import binary_size, one_line
from imgfs.errors import NotSupported
from imgfs.format import aligned
from imgfs.usage import Class, VolumeUsage

Cells = npt.NDArray[np.uint8]

_LEFT, _RIGHT, _TOP, _BOTTOM = 136, 72, 112, 72
_ROW_WIDTH = 1000
# Half a pixel each: a PNG has twice as many pixels, so that its text is sharp on any screen.
_SCALE = 2
_COLUMNS = _ROW_WIDTH * _SCALE
_HEIGHT = 900  # of all rows together, as long as there are not more volumes than fit
_ROW_HEIGHT_MIN, _ROW_HEIGHT_MAX = 6, 18
_ROW_GAP, _VOLUME_GAP, _VOLUME_GAP_MIN = 1, 8, 2
_ROW_BYTES_MIN = 16 << 10
_LABEL_HEIGHT = 13
# Told apart by brightness too. The second of each is for the first column of a needle, where needles are wide enough.
_COLOURS = {
    Class.LIVE: ("#2a9d63", "#1b6e45"),
    Class.METADATA: ("#33658a", "#24485f"),
    Class.DEAD: ("#f4a259", "#d97f2b"),
    Class.FREE: ("#e4e6ea", "#e4e6ea"),
}
_TEXT, _FAINT, _PAPER = "#22262b", "#6b7280", "#ffffff"
_FONT = "DejaVu Sans, Verdana, Arial, sans-serif"
_NEEDLE_COLUMNS_MIN = 10


class Text(NamedTuple):
    """A line of text; *anchor* is the end of it that stands at *x*: start, middle or end. *y* is its middle."""

    x: float
    y: float
    text: str
    size: int = 13
    anchor: str = "start"
    colour: str = _TEXT


class Row(NamedTuple):
    """Cells of half a pixel beside each other, each the number of a colour."""

    x: int
    y: int
    height: int
    cells: Cells


class Picture:
    """What is to be drawn."""

    def __init__(self, title: str, sizes: Sequence[int]) -> None:
        """*sizes*: bytes of the volumes that `add` will be given, in the same order."""
        self._sizes = sizes
        self._row_bytes, self._row_height, self._gap = _layout(sizes)
        self._y = _TOP
        self._labelled_y = 0
        self._rows: list[Row] = []
        self._texts = [Text(_LEFT, 26, one_line(title), 20)]

    def add(self, usage: VolumeUsage) -> None:
        """Draw the next volume."""
        count = math.ceil(usage.size / self._row_bytes)
        edges = np.minimum(np.arange(count * _COLUMNS + 1) * (self._row_bytes / _COLUMNS), usage.size)
        cells = choose_cells(usage.spread(edges))
        first = np.unique(np.ceil(usage.needles / self._row_bytes * _COLUMNS).astype(np.int64))
        if len(first) * _NEEDLE_COLUMNS_MIN < usage.size / self._row_bytes * _COLUMNS:
            cells[first[first < len(cells)]] += len(Class)
        top = self._y
        for number in range(count):
            used = math.ceil(min(1.0, usage.size / self._row_bytes - number) * _COLUMNS)
            row = cells[number * _COLUMNS : number * _COLUMNS + used]
            self._rows.append(Row(_LEFT, self._y, self._row_height, row))
            self._y += self._row_height + _ROW_GAP
        middle = (top + self._y - _ROW_GAP) / 2
        self._y += self._gap
        if middle - self._labelled_y >= _LABEL_HEIGHT:
            self._labelled_y = int(middle)
            self._texts += [
                Text(_LEFT - 84, middle, f"{usage.volume_id}", 12, "end"),
                Text(_LEFT - 10, middle, binary_size(usage.size), 12, "end", _FAINT),
                Text(_LEFT + _ROW_WIDTH + 10, middle, share_text(live_share(usage)), 12),
            ]

    def finish(self, subtitle: str, legend: Sequence[tuple[Class, str]], remarks: str) -> None:
        """Add what stands around the volumes."""
        self._texts.append(Text(_LEFT, 52, one_line(subtitle), 13, colour=_FAINT))
        x = _LEFT
        for each, text in legend:
            self._rows.append(Row(x, 70, 14, np.full(14 * _SCALE, each, np.uint8)))
            self._texts.append(Text(x + 21, 77, text))
            x += 250
        headings = (
            (_LEFT - 84, "volume", "end"),
            (_LEFT - 10, "size", "end"),
            (_LEFT + _ROW_WIDTH + 10, "live", "start"),
        )
        for x, heading, anchor in headings:
            self._texts.append(Text(x, _TOP - 13, heading, 12, anchor, _FAINT))
        y = self._y + 14
        for quarter in range(5):
            x = _LEFT + _ROW_WIDTH * quarter // 4
            self._rows.append(Row(x - (quarter == 4), self._y - self._gap, 5, np.full(_SCALE, _AXIS, np.uint8)))
            size = binary_size(self._row_bytes * quarter // 4) if quarter else "0"
            self._texts.append(Text(x, y, size, 12, "middle", _FAINT))
        self._rows.append(Row(_LEFT, self._y - self._gap, 1, np.full(_COLUMNS, _AXIS, np.uint8)))
        how = f"A row shows {binary_size(self._row_bytes)} of a volume; its rows follow each other from top to bottom."
        self._texts += [Text(_LEFT, y + 19, how, 12, colour=_FAINT), Text(_LEFT, y + 37, remarks, 13)]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return _LEFT + _ROW_WIDTH + _RIGHT, self._y + _BOTTOM

    # -- formats ----------------------------------------------------------------------------------------------

    def svg(self) -> str:
        """Return the picture as SVG."""
        width, height = self.size
        box = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family={quoteattr(_FONT)}>',
            f'<rect width="{width}" height="{height}" fill="{_PAPER}"/>',
        ]
        strokes: dict[tuple[int, int], list[str]] = {}
        for row in self._rows:
            for cell, start, length in runs(row.cells):
                x, y = row.x + start / _SCALE, row.y + row.height / 2
                strokes.setdefault((cell, row.height), []).append(f"M{x:g} {y:g}h{length / _SCALE:g}")
        for (cell, stroke), path in strokes.items():
            parts.append(f'<path stroke="{_PALETTE[cell]}" stroke-width="{stroke}" d="{"".join(path)}"/>')
        for text in self._texts:
            # A third of the size below the middle is where the line stands that letters stand on.
            place = f'x="{text.x:g}" y="{text.y + 0.36 * text.size:g}" font-size="{text.size}"'
            parts.append(f'<text {place} text-anchor="{text.anchor}" fill="{text.colour}">{escape(text.text)}</text>')
        return "\n".join([*parts, "</svg>", ""])

    def save_png(self, path: str) -> None:
        """Write the picture to *path* as PNG.

        Raises:
            NotSupported: Pillow is not installed.
        """
        try:
            from PIL import Image, ImageColor, ImageDraw, ImageFont
        except ImportError:
            remedy = "pip install 'imgfs[png]', or draw a .svg"
            raise NotSupported(f"PNG needs Pillow, which is not installed: {remedy}") from None
        width, height = self.size
        palette = np.array([ImageColor.getrgb(colour) for colour in (*_PALETTE, _PAPER)], np.uint8)
        pixels = np.full((height * _SCALE, width * _SCALE), len(_PALETTE), np.uint8)
        for row in self._rows:
            x, y = row.x * _SCALE, row.y * _SCALE
            pixels[y : y + row.height * _SCALE, x : x + len(row.cells)] = row.cells
        image = Image.fromarray(palette[pixels])
        draw = ImageDraw.Draw(image)
        anchors = {"start": "lm", "middle": "mm", "end": "rm"}
        for text in self._texts:
            font = ImageFont.load_default(text.size * _SCALE)
            place = (text.x * _SCALE, text.y * _SCALE)
            draw.text(place, text.text, fill=text.colour, font=font, anchor=anchors[text.anchor])
        # So few colours need no more; shades at the edges of letters are the rest.
        image.quantize(64, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


_PALETTE = [_COLOURS[each][shade] for shade in (0, 1) for each in Class] + [_FAINT]
_AXIS = len(_PALETTE) - 1


def live_share(usage: VolumeUsage) -> float:
    """Return which part of a volume is live or metadata, 0 to 1."""
    amounts = usage.bytes_of()
    return float(amounts[Class.LIVE] + amounts[Class.METADATA]) / usage.size


def share_text(share: float) -> str:
    """Return a share as people read it; never 0 % of something, nor 100 % of not all."""
    if 0 < share < 0.01:
        return "<1 %"
    return f"{round(100 * share) if share == 1 else min(round(100 * share), 99)} %"


def choose_cells(spread: npt.NDArray[np.float64]) -> Cells:
    """Return a class for each cell, by how many bytes of each class it has (cells x classes).

    A cell shows one class. What it does not show is carried on to its neighbours, so that over a few cells each class
    gets the room that is its due.
    """
    cells: Cells = spread.argmax(axis=1).astype(np.uint8)
    totals = spread.sum(axis=1)
    mixed = np.flatnonzero(spread.max(axis=1) < totals)
    due = [0.0] * spread.shape[1]
    for at, amounts in zip(mixed.tolist(), spread[mixed].tolist(), strict=True):
        due = [before + amount for before, amount in zip(due, amounts, strict=True)]
        best = max((each for each, amount in enumerate(amounts) if amount), key=due.__getitem__)
        due[best] -= totals[at]
        cells[at] = best
    return cells


def runs(cells: Cells) -> Iterator[tuple[int, int, int]]:
    """Yield (cell, start, length) for each run of equal cells."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(cells)) + 1])
    lengths = np.diff(np.append(starts, len(cells)))
    yield from zip(cells[starts].tolist(), starts.tolist(), lengths.tolist(), strict=True)


def _layout(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Return bytes and height of a row, and the gap between volumes: rows as short as fit, so that needles show."""
    gap = _VOLUME_GAP if len(sizes) * (_ROW_HEIGHT_MIN + _VOLUME_GAP) <= _HEIGHT else _VOLUME_GAP_MIN
    room = _HEIGHT - gap * len(sizes)
    row_bytes = 1 << max(max(sizes) - 1, _ROW_BYTES_MIN).bit_length()
    while row_bytes > _ROW_BYTES_MIN:
        count = sum(-(-size // (row_bytes // 2)) for size in sizes)
        if count * (_ROW_HEIGHT_MIN + _ROW_GAP) > room:
            break
        row_bytes //= 2
    if row_bytes > max(sizes):
        # A volume is sealed near its limit, a little below or above: let the largest fill its row.
        row_bytes = aligned(max(sizes))
    count = sum(-(-size // row_bytes) for size in sizes)
    height = min(max(room // count - _ROW_GAP, _ROW_HEIGHT_MIN), _ROW_HEIGHT_MAX)
    return row_bytes, height, gap
