"""`publish=close`: nobody but its creator finds an image by name before it is closed; then all do, and it is whole."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mounted import Mounted, run

pytestmark = [pytest.mark.mount, pytest.mark.root]

# Creates, writes half, says so, waits for a line, writes the rest, closes.
WRITER = """
import os, sys
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
os.write(file, b"first half")
print(os.stat(sys.argv[1]).st_size, flush=True)
sys.stdin.readline()
os.write(file, b", second half")
os.close(file)
print("closed", flush=True)
sys.stdin.readline()
"""


class Writer:
    """A process that has half of an image written."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", WRITER, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._guard = threading.Timer(30, self._process.kill)
        self._guard.start()
        self.said = self._next()

    def _next(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def go_on(self) -> str:
        """Let it write the rest and close; return what it says then."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._next()

    def end(self) -> None:
        self._guard.cancel()
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def point(stopped: Mounted) -> Path:
    stopped.start("allow_other,publish=close")
    return stopped.point


def test_an_image_appears_when_it_is_closed(point: Path) -> None:
    path = point / "photo.jpg"
    assert not path.exists()  # and the kernel remembers that
    writer = Writer(path)
    try:
        assert writer.said == "10", "its creator finds it"
        assert not path.exists()
        assert os.listdir(point) == []
        with pytest.raises(FileNotFoundError):
            path.read_bytes()
        with pytest.raises(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        assert writer.go_on() == "closed"
        assert path.read_bytes() == b"first half, second half"
        assert os.listdir(point) == ["photo.jpg"]
    finally:
        writer.end()


def test_a_writer_that_dies_publishes_what_the_kernel_closes_for_it(point: Path) -> None:
    path = point / "photo.jpg"
    writer = Writer(path)
    writer.end()
    assert path.read_bytes() == b"first half"


def test_an_image_that_is_written_again_stays_visible(point: Path) -> None:
    path = point / "photo.jpg"
    path.write_bytes(b"old")
    with path.open("r+b") as file:
        file.write(b"new bytes")
        file.flush()
        assert run("stat", "-c", "%s", path) == "9\n"
        assert run("ls", point) == "photo.jpg\n"


def test_usual_programs_do_not_notice(point: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(20):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(os.urandom(number * 1000))
    run("cp", "-a", tmp_path / "a", point / "cp")
    run("rsync", "-a", f"{tmp_path}/a/", point / "rsync")
    run("tar", "-C", tmp_path, "-cf", point / "a.tar", "a")
    run("tar", "-C", point, "-xf", point / "a.tar")
    run("install", "-p", tmp_path / "a" / "7.jpg", point / "installed")
    run("sh", "-c", f"cd {point}; seq 1000 > numbers; seq 1000 | tee copy > /dev/null; cmp numbers copy")
    run("sed", "-i", "s/^7$/seven/", point / "numbers")
    for copy in ("cp", "rsync", "a"):
        assert run("diff", "-r", tmp_path / "a", point / copy) == ""
