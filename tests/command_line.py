"""Fixtures for tests of the command line: runs commands in this process, on a small store full of photos.

Its fixtures are registered in `conftest.py`.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from imgfs.cli import main

COMMAND = [sys.executable, "-m", "imgfs"]


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Return a function that runs one command in this process, and leaves logging as it was."""
    log = logging.getLogger()

    def run(*arguments: str | Path) -> Done:
        capfdbinary.readouterr()
        level, handlers = log.level, log.handlers[:]
        log.handlers.clear()
        try:
            code = main([str(argument) for argument in arguments])
        finally:
            log.setLevel(level)
            log.handlers[:] = handlers
        out, err = capfdbinary.readouterr()
        return Done(code, os.fsdecode(out), os.fsdecode(err))

    return run


@pytest.fixture
def store(tmp_path: Path, run: Run) -> Path:
    """Return the path of a store with small volumes."""
    path = tmp_path / "store"
    assert run("mkfs", path, "--volume-size", "64K").code == 0
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a directory with images in two albums."""
    path = tmp_path / "photos"
    for number in range(20):
        image = path / f"album {number % 2}" / f"IMG_{number:04}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        # As a JPEG begins: nothing else must pass for what a store has.
        image.write_bytes(b"\xff\xd8\xff\xe0" + os.urandom(4996 + number))
    (path / "latest").symlink_to("album 1/IMG_0019.jpg")
    return path


@pytest.fixture
def filled(store: Path, photos: Path, run: Run) -> Path:
    """Return the path of a store with the photos in several volumes."""
    assert run("import", photos, store).code == 0
    return store


def volume_file(store: Path, volume: int) -> Path:
    return store / "volumes" / f"{volume:08d}.vol"


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def place_of(store: Path, path: str, run: Run) -> dict[str, int]:
    found: dict[str, int] = json.loads(run("stat", store, path, "--json").out)
    return found
