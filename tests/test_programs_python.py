"""Python's own tests of files, run on a mount and on plain XFS: each must end the same on both.

They need the package `test` of the Python that runs this. Debian has it in libpython3.11-testsuite, which
`make test` installs.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from beside import Beside
from mounted import DEADLINE_S

from imgfs.settings import MIB

pytestmark = [pytest.mark.mount, pytest.mark.root]

# Those in one line are run one after the other.
MODULES = [
    ("test_os",),
    ("test_pathlib",),
    ("test_shutil", "test_posix"),
    ("test_mmap", "test_tempfile", "test_fcntl", "test_file"),
    ("test_fileio", "test_filecmp", "test_genericpath", "test_posixpath", "test_stat"),
]

# A hole is stored as zeros when the file is closed, and 2 GiB do not fit on the disk of the tests.
NO_ROOM_FOR_HOLES = "a large hole needs room"
# A file has at most 4 GiB - 1 bytes.
TOO_LARGE = "larger than an image can be"
DIFFERENT = {
    "test.test_mmap.LargeMmapTests.test_around_2GB": ("error", NO_ROOM_FOR_HOLES),
    "test.test_mmap.LargeMmapTests.test_around_4GB": ("skipped", TOO_LARGE),
    "test.test_mmap.LargeMmapTests.test_large_filesize": ("skipped", TOO_LARGE),
    "test.test_mmap.LargeMmapTests.test_large_offset": ("skipped", TOO_LARGE),
}


@pytest.mark.parametrize("modules", MODULES, ids=lambda modules: modules[0])
def test_python(beside: Beside, modules: tuple[str, ...]) -> None:
    beside.mounted.expected_log.append(r"what was written to .* is lost: .*")
    # Both at once: the mount leaves a core to the other.
    with (
        _tests(beside.mount, beside.outside / "mount.xml", modules) as on_mount,
        _tests(beside.plain, beside.outside / "plain.xml", modules) as on_plain,
    ):
        mount, plain = on_mount(), on_plain()
    assert list(plain.values()).count("passed") > len(plain) / 2
    differ = {name: mount.get(name) for name in plain.keys() | mount.keys() if mount.get(name) != plain.get(name)}
    expected = {name: outcome for name, (outcome, _) in DIFFERENT.items() if name in plain}
    assert differ == expected
    beside.each(lambda place: os.listdir(place) == [])


@contextlib.contextmanager
def _tests(place: Path, report: Path, modules: tuple[str, ...]) -> Iterator[Callable[[], dict[str, str]]]:
    """Run Python's tests *modules* in *place* meanwhile; yields what waits for the end and returns how each ended."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "TMPDIR": str(place)}
    command = [sys.executable, "-m", "test", "--tempdir", place, "--junit-xml", report, *modules]
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            command, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):

        def ended() -> dict[str, str]:
            process.wait(DEADLINE_S * 3)
            assert report.exists(), os.pread(output.fileno(), MIB, 0).decode(errors="replace")
            return _outcomes(report)

        try:
            yield ended
        finally:
            process.kill()


def _outcomes(report: Path) -> dict[str, str]:
    """Return how each test ended, by its name."""
    found: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ends = {part.tag for part in case} & {"error", "failure", "skipped"}
        found.setdefault(case.attrib["name"], set()).update(ends or {"passed"})
    return {name: ", ".join(sorted(ends)) for name, ends in found.items()}
