"""What a long command shows: a bar on a terminal, a line now and then elsewhere."""

import io
import os
import struct
import termios
from collections.abc import Iterator
from fcntl import ioctl
from typing import TextIO

import pytest

from imgfs.cli.progress import LINE_INTERVAL_S, Progress, rate


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A terminal of 100 columns; `seen` is what was drawn on it."""

    def __init__(self) -> None:
        self.screen, inner = os.openpty()
        ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.stream: TextIO = os.fdopen(inner, "w", encoding="utf-8")

    def seen(self) -> str:
        """Return what was drawn since the last call."""
        # The kernel hands it over in pieces, and not at once: read up to a mark.
        self.stream.write("\0")
        self.stream.flush()
        seen = b""
        while not seen.endswith(b"\0"):
            seen += os.read(self.screen, 65536)
        return seen[:-1].decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self.screen)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_pipe_gets_a_line_every_few_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("importing", stream, count=1000, data_bytes=100_000_000, clock=clock) as progress:
        progress.show(1, 100_000)
        assert stream.getvalue() == ""
        clock.now += LINE_INTERVAL_S
        progress.show(250, 25_000_000)
        progress.show(251, 25_100_000)
    assert stream.getvalue() == "importing: 250 of 1,000 images, 50 images/s, 5.0 MB/s, 0:15 left\n"


def test_without_a_total_there_is_no_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("counting", stream, clock=clock) as progress:
        clock.now += LINE_INTERVAL_S
        progress.show(1, 0)
    assert stream.getvalue() == "counting: 1 image, 0 images/s, 0.0 MB/s\n"


def test_the_time_left_follows_from_images_and_bytes() -> None:
    """Half of the images are done, but hardly any of the bytes: most of the work is left."""
    clock, stream = Clock(), io.StringIO()
    with Progress("importing", stream, count=2, data_bytes=100 * 65_536 - 2 * 65_536, clock=clock) as progress:
        clock.now += 10
        progress.show(1, 0)
    assert "16:30 left" in stream.getvalue()


def test_quiet_shows_nothing() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("importing", stream, count=2, quiet=True, clock=clock) as progress:
        clock.now += 60
        progress.show(1, 1)
    assert stream.getvalue() == ""


def test_a_message_is_one_line() -> None:
    stream = io.StringIO()
    with Progress("importing", stream) as progress:
        progress.message("skipped a\nb\x1b[2J")
    assert stream.getvalue() == "skipped a\\nb\\x1b[2J\n"


def test_a_terminal_gets_a_bar(terminal: Terminal) -> None:
    clock = Clock()
    with Progress("importing", terminal.stream, count=1000, data_bytes=1000, clock=clock) as progress:
        clock.now += 10
        progress.show(500, 500)
        seen = terminal.seen()
        assert "\r 50%|" in seen
        assert "importing: 500 of 1,000 images, 50 images/s, 0.0 MB/s, 0:10 left" in seen
        assert "\n" not in seen
        progress.message("imgfs: skipped a pipe")
        seen = terminal.seen()
        assert "imgfs: skipped a pipe\r\n" in seen
        assert seen.endswith("left")


def test_the_bar_is_taken_away_at_the_end(terminal: Terminal) -> None:
    clock = Clock()
    with Progress("importing", terminal.stream, count=10, clock=clock) as progress:
        clock.now += 10
        progress.show(5, 0)
        assert terminal.seen().endswith("left")
    assert terminal.seen().strip() == ""


def test_rate_survives_no_time_at_all() -> None:
    assert rate(5, "image", 5_000_000, 0.0) == "5,000 images/s, 5,000.0 MB/s"
