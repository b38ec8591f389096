"""`imgfs trash` and `imgfs ls --as-of` as a user meets them, on a store that is not mounted."""

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import Run

from imgfs.cli import imgfs
from imgfs.disk import Disk
from imgfs.errors import EXIT_BUSY, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_NO_STORE, EXIT_USAGE
from imgfs.retention import emptied_ns
from imgfs.store import ROOT, Store


def moment() -> str:
    """Return the time as a command takes it, when the clock of the store has gone on."""
    time.sleep(0.02)
    now_ns = time.time_ns()
    time.sleep(0.02)
    return f"@{now_ns // 10**9}.{now_ns % 10**9:09d}"


@pytest.fixture
def album(filled: Path) -> tuple[Path, str]:
    """Return a store from which an album was deleted, and when it was still there."""
    before = moment()
    with Store.open(str(filled)) as store:
        directory = store.resolve(b"album 1")
        for entry in list(store.list(directory)):
            store.unlink(directory, entry.name)
        store.rmdir(ROOT, b"album 1")
        store.rename(store.resolve(b"album 0"), b"IMG_0000.jpg", store.resolve(b"album 0"), b"IMG_0002.jpg")
    return filled, before


def test_ls_as_of(album: tuple[Path, str], run: Run) -> None:
    store, before = album
    assert run("ls", store).out == "album 0\nlatest\n"
    done = run("ls", "--as-of", before, store)
    assert (done.code, done.out, done.err) == (0, "album 0\nalbum 1\nlatest\n", "")
    assert run("ls", "-R", store, "album 1", "--as-of", before).out.count(".jpg") == 10
    done = run("ls", "--as-of", "20000d", store)
    assert done.code == EXIT_FAILURE
    assert "this store was not there yet" in done.err
    done = run("ls", "--as-of", "tomorrow", store)
    assert done.code == EXIT_USAGE
    assert "'tomorrow' is no time; write it like" in done.err
    assert done.err.count("\n") == 1


def test_list(album: tuple[Path, str], run: Run) -> None:
    store, before = album
    lines = run("trash", "list", store).out.splitlines()
    assert len(lines) == 11
    assert " replaced " in lines[-1]
    assert lines[-1].endswith(" album 0/IMG_0002.jpg")
    assert all(" deleted " in line and "-rw-r--r-- " in line for line in lines[:-1])
    assert len(run("trash", "list", store, "--since", before).out.splitlines()) == 11
    assert run("trash", "list", store, "--since", moment()).out == ""
    facts = json.loads(run("trash", "list", store, "--json").out)
    assert [fact["id"] for fact in facts] == [line.split()[0] for line in lines]
    assert facts[-1]["by"] == "replaced"
    assert facts[-1]["path"] == "album 0/IMG_0002.jpg"


def test_restore(album: tuple[Path, str], photos: Path, run: Run, tmp_path: Path) -> None:
    store, _ = album
    done = run("trash", "restore", store, "/album 1")
    assert (done.code, done.out, done.err) == (0, "restored 10 images (48.9 KiB) and 1 directory\n", "")
    done = run("trash", "restore", store, "album 0/IMG_0002.jpg")
    assert done.code == EXIT_FAILURE
    assert done.err == (
        "imgfs: album 0/IMG_0002.jpg: there is something of that name; "
        "bring it back in its place with --force, or elsewhere with --to\n"
    )
    assert run("trash", "restore", store, "album 0/IMG_0002.jpg", "--to", "back").code == 0
    assert run("export", store, tmp_path / "out").code == 0
    for path in [*photos.glob("album 1/*"), photos / "album 0" / "IMG_0002.jpg"]:
        place = "back" if path.name == "IMG_0002.jpg" else path.parent.name
        copy = tmp_path / "out" / place / path.name
        assert copy.read_bytes() == path.read_bytes()
        assert copy.stat().st_mtime_ns == path.stat().st_mtime_ns
    assert run("check", store, "-q").code == 0
    done = run("trash", "restore", store, "9:9")
    assert done.code == EXIT_FAILURE
    assert done.err == "imgfs: 9:9 is not in the trash; imgfs trash list shows what is\n"


def test_empty(album: tuple[Path, str], run: Run) -> None:
    store, _ = album
    assert run("trash", "empty", store, "--yes", "--older-than", "1h").out == "gave up 0 images (0 bytes)\n"
    assert len(run("trash", "list", store).out.splitlines()) == 11
    asked = CliRunner().invoke(imgfs, ["trash", "empty", str(store)], input="n\n")
    assert "Give up 11 images (53.8 KiB) for good?" in asked.output
    assert asked.exit_code != 0
    assert len(run("trash", "list", store).out.splitlines()) == 11
    before_ns = time.time_ns()
    assert run("trash", "empty", store, "-y").out == "gave up 11 images (53.8 KiB)\n"
    assert run("trash", "list", store).out == ""
    assert run("trash", "restore", store, "album 1").code == EXIT_FAILURE
    assert before_ns <= emptied_ns(Disk(), str(store)) <= time.time_ns()
    # The bytes are still there as long as nobody needs the room.
    assert run("check", store, "-q").code == 0


def test_nobody_to_ask(album: tuple[Path, str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = album
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert run("trash", "empty", store).code == EXIT_INTERRUPTED
    assert emptied_ns(Disk(), str(store)) == 0


def test_a_store_in_use_that_is_mounted_nowhere(album: tuple[Path, str], run: Run) -> None:
    store, _ = album
    with Store.open(str(store)):
        assert len(run("trash", "list", store).out.splitlines()) == 11
        done = run("trash", "restore", store, "album 1")
    assert done.code == EXIT_BUSY
    assert done.err.startswith(f"imgfs: {store} is in use by process {os.getpid()}, which has it mounted nowhere here")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("command", [["list"], ["restore"], ["empty", "-y"]])
def test_where_no_store_is(command: list[str], tmp_path: Path, run: Run) -> None:
    more = ["x"] if command == ["restore"] else []
    done = run("trash", *command, tmp_path / "none", *more)
    assert done.code == EXIT_NO_STORE
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "arguments",
    [["list", ""], ["restore", "x", ""], ["restore", "x"], ["empty", ""], ["empty", "x", "--older-than", "1m"]],
)
def test_a_wrong_command_line(arguments: list[str], run: Run) -> None:
    done = run("trash", *arguments)
    assert done.code == EXIT_USAGE
    assert done.err.count("\n") == 1
