"""`imgfs import` and `imgfs export` as a user meets them: what they print, where, and with which exit code."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from command_line import COMMAND, Run, flip, place_of, volume_file

from imgfs import cli
from imgfs.batch import NewImage
from imgfs.errors import EXIT_DAMAGED, EXIT_FAILURE, EXIT_USAGE
from imgfs.gathered import Gathered


def test_photos_go_in_and_come_out(store: Path, photos: Path, tmp_path: Path, run: Run) -> None:
    done = run("import", photos, store)
    assert done.code == 0
    assert done.err == ""
    assert done.out.startswith("imported 20 images (0.1 MB), 2 directories, 1 symbolic link in 0.")
    assert done.out.endswith(" MB/s\n")
    done = run("export", store, tmp_path / "out")
    assert done.code == 0
    assert done.out.startswith("exported 20 images")
    subprocess.run(["diff", "-r", "--no-dereference", photos, tmp_path / "out"], check=True)
    itemized = ["rsync", "-anic", "--delete", f"{photos}/", f"{tmp_path}/out/"]
    assert subprocess.run(itemized, capture_output=True, check=True).stdout == b""


def test_quiet_says_nothing(store: Path, photos: Path, tmp_path: Path, run: Run) -> None:
    assert run("import", "--quiet", photos, store) == (0, "", "")
    assert run("export", "-q", store, tmp_path / "out") == (0, "", "")
    assert run("check", "-q", store) == (0, "", "")


def test_what_is_skipped_is_named_and_the_exit_code_says_so(store: Path, photos: Path, run: Run) -> None:
    with (photos / "huge\n").open("wb") as huge:
        huge.truncate(1 << 32)
    os.setxattr(photos / "album 0", "user.imgfs.volume", b"7")
    done = run("import", photos, store)
    assert done.code == EXIT_FAILURE
    assert done.err.splitlines() == [
        f"imgfs: skipped {photos}/huge\\n: an image has at most 4 GiB - 1 bytes",
        f"imgfs: incomplete {photos}/album 0: extended attribute user.imgfs.volume: b'user.imgfs.volume' cannot be set",
        "imgfs: 1 entry skipped, named above",
        "imgfs: 1 entry copied without some extended attributes",
    ]
    assert done.out.startswith("imported 20 images")


def test_links_and_special_files_are_counted(store: Path, photos: Path, tmp_path: Path, run: Run) -> None:
    os.mkfifo(photos / "pipe")
    (photos / "twin").hardlink_to(photos / "album 1" / "IMG_0019.jpg")
    done = run("import", photos, store)
    assert (done.code, done.err) == (0, "")
    what = "20 images (0.1 MB), 2 directories, 1 symbolic link, 1 special file, 1 hard link in 0."
    assert done.out.startswith(f"imported {what}")
    assert run("export", store, tmp_path / "out").out.startswith(f"exported {what}")


def test_a_store_is_not_imported_into_itself(filled: Path, run: Run) -> None:
    before = run("ls", filled, "-lR").out
    for path in (filled, filled / "volumes"):
        done = run("import", path, filled)
        assert done.code == EXIT_FAILURE
        assert done.err == f"imgfs: '{path}' is where the store itself lies, which cannot be imported into itself\n"
    assert run("ls", filled, "-lR").out == before


def test_into_leads_nowhere_else(filled: Path, photos: Path, run: Run) -> None:
    before = run("ls", filled, "-lR").out
    for path in ("../x", "2024/..", ".."):
        done = run("import", photos, filled, "--into", path)
        assert done.code == EXIT_USAGE
        assert f"'{path}' leads out of the store; paths there start at its top" in done.err
        assert done.err.count("\n") == 1
    assert run("ls", filled, "-lR").out == before


@pytest.mark.mount
def test_a_mounted_store_is_neither_made_again_nor_imported_into_itself(filled: Path, tmp_path: Path, run: Run) -> None:
    point = tmp_path / "point"
    point.mkdir()
    subprocess.run([*COMMAND, "mount", "--daemon", "--read-only", filled, point], check=True, timeout=60)
    try:
        done = run("mkfs", point)
        assert done.code == EXIT_FAILURE
        assert done.err == f"imgfs: {point} is where the store {filled} is mounted; name another directory\n"
        done = run("import", point / "album 0", filled, "--into", "album 0")
        assert done.code == EXIT_FAILURE
        assert done.err == (
            f"imgfs: {point}/album 0 lies in a mount of {filled}, which cannot be imported into itself\n"
        )
    finally:
        subprocess.run([*COMMAND, "umount", point], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_import_into_and_resume(store: Path, photos: Path, run: Run) -> None:
    assert run("import", photos, store, "--into", "2024/all").code == 0
    assert run("ls", store, "2024/all").out == "album 0\nalbum 1\nlatest\n"
    (photos / "album 0" / "new").write_bytes(b"new")
    done = run("import", photos, store, "--into", "2024/all", "--resume")
    assert done.out.startswith("imported 1 image (0.0 MB), 0 directories, 1 symbolic link, 20 images there before in")


def test_an_interrupt_leaves_whole_images(
    store: Path, photos: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = Gathered.add

    def add(self: Gathered, image: NewImage, path: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(signal.SIGINT)
        real(self, image, path)

    monkeypatch.setattr(Gathered, "add", add)
    done = run("import", photos, store)
    assert done.code == cli.EXIT_INTERRUPTED
    assert done.out == ""
    assert "import ended early: 5 images (0.0 MB), " in done.err
    assert done.err.endswith("imgfs: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run("check", store).code == 0
    assert run("export", store, tmp_path / "out").out.startswith("exported 5 images")


def test_export_takes_an_empty_directory_unless_forced(filled: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    done = run("export", filled, out)
    assert done.code == EXIT_FAILURE
    assert "--force" in done.err
    assert os.listdir(out) == ["mine"]
    assert run("export", filled, out, "--force").code == 0
    assert sorted(os.listdir(out)) == ["album 0", "album 1", "latest", "mine"]


def test_export_names_what_is_damaged(filled: Path, tmp_path: Path, run: Run) -> None:
    place = place_of(filled, "album 0/IMG_0004.jpg", run)
    flip(volume_file(filled, place["volume"]), place["offset"] + 1000)
    done = run("export", filled, tmp_path / "out")
    assert done.code == EXIT_DAMAGED
    assert "IMG_0004.jpg: volume " in done.err
    assert done.out.startswith("exported 19 images")
