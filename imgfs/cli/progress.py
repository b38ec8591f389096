"""Shows how far a long command is, with rate and time left: a bar on a terminal, now and then a line elsewhere.

Owns what is written to its stream while it is open. Must not know what is being done.

*Concurrency:* none; one thread shows.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Never, Self, TextIO

from imgfs.cli.text import counted, duration, one_line

if TYPE_CHECKING:
    from tqdm import tqdm

# Often enough to look alive; a bar that is redrawn for each image would cost more than the image.
BAR_INTERVAL_S = 0.2
LINE_INTERVAL_S = 5.0
# An image costs about as much as so many bytes of data. The time left is reckoned from both, because a tree may
# have its small images first and its large ones last.
IMAGE_COST_BYTES = 65_536


class Progress:
    """One running display; `show` may be called for every image."""

    def __init__(
        self,
        verb: str,
        stream: TextIO,
        noun: str = "image",
        *,
        count: int = 0,
        data_bytes: int = 0,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start a display of *verb* ("importing"); *count* and *data_bytes* are the whole, 0 where it is unknown."""
        self._verb = verb
        self._stream = stream
        self._noun = noun
        self._count = count
        self._cost_bytes = IMAGE_COST_BYTES if count else 0
        self._work = data_bytes + count * self._cost_bytes
        self._clock = clock
        self._start = clock()
        self._bar: tqdm[Never] | None = None
        self._quiet = quiet
        self._interval_s = LINE_INTERVAL_S
        if not quiet and stream.isatty():
            self._bar = _new_bar(stream, self._work)
            self._interval_s = BAR_INTERVAL_S
        self._next = self._start + self._interval_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return self._clock() - self._start

    def show(self, count: int, data_bytes: int) -> None:
        """Say that so much is done, if it is time for it."""
        now = self._clock()
        if now < self._next or self._quiet:
            return
        self._next = now + self._interval_s
        work = data_bytes + count * self._cost_bytes
        text = self._text(count, data_bytes, work, now - self._start)
        if self._bar is None:
            self._stream.write(f"{text}\n")
            self._stream.flush()
            return
        self._bar.n = min(work, self._work)
        self._bar.set_description_str(text, refresh=False)
        self._bar.refresh()

    def message(self, text: str) -> None:
        """Print a line of its own; a bar stays below it."""
        if self._bar is not None:
            self._bar.clear()
        self._stream.write(f"{one_line(text)}\n")
        self._stream.flush()
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Take the bar away; what was done is said by the command's last line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _text(self, count: int, data_bytes: int, work: int, seconds: float) -> str:
        done = f"{count:,} of {counted(self._count, self._noun)}" if self._count else counted(count, self._noun)
        parts = [f"{self._verb}: {done}", rate(count, self._noun, data_bytes, seconds)]
        if self._work and work:
            parts.append(f"{duration(seconds * max(self._work - work, 0) / work)} left")
        return ", ".join(parts)


def rate(count: int, noun: str, data_bytes: int, seconds: float) -> str:
    """Return "812 images/s, 97.3 MB/s"; a MB is 1,000,000 bytes."""
    seconds = max(seconds, 1e-3)
    return f"{count / seconds:,.0f} {noun}s/s, {data_bytes / seconds / 1e6:,.1f} MB/s"


def _new_bar(stream: TextIO, total: int) -> "tqdm[Never]":
    from tqdm import tqdm

    # tqdm starts a thread that looks after slow bars; this one is drawn by hand, and a thread would be one more
    # thing that a fork can break.
    tqdm.monitor_interval = 0
    bar_format = "{percentage:3.0f}%|{bar}| {desc}" if total else "{desc}"
    bar: tqdm[Never] = tqdm(total=total or None, file=stream, bar_format=bar_format, leave=False, dynamic_ncols=True)
    return bar
