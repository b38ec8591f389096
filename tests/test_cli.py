"""The command line as a user meets it: what it prints, where, and with which exit code."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import COMMAND, Run, volume_file
from crc32c import crc32c

from imgfs import __version__, cli
from imgfs.cli import COMMANDS
from imgfs.cli.text import binary_size, duration, escape, one_line, parse_size
from imgfs.errors import EXIT_BUSY, EXIT_FAILURE, EXIT_NO_STORE, EXIT_USAGE
from imgfs.store import Store

# -- the command line itself --------------------------------------------------------------------------------------


def test_help_lists_every_command_in_the_order_of_use(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    listed = [line.split()[0] for line in done.out.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str, run: Run) -> None:
    done = run(command, "--help")
    assert done.code == 0
    assert f"    imgfs {command} " in done.out


def test_version(run: Run) -> None:
    assert run("--version").out == f"imgfs {__version__}\n"


def test_no_command_shows_the_help(run: Run) -> None:
    done = run()
    assert done.code == EXIT_USAGE
    assert "Commands:" in done.err


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["mkfs"], ["mkfs", "x", "--volume-size", "lots"], ["ls", "x", "-z"], ["import", "/nowhere", "x"]],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], run: Run) -> None:
    done = run(*arguments)
    assert done.code == EXIT_USAGE
    assert done.out == ""
    assert done.err.startswith("imgfs: ")
    assert done.err.endswith("--help)\n")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["mkfs", ""],
        ["mount", "", "point"],
        ["mount", "store", ""],
        ["umount", ""],
        ["import", "", "store"],
        ["import", "/", ""],
        ["import", "/", "store", "--into", ""],
        ["export", "", "out"],
        ["export", "store", ""],
        ["ls", ""],
        ["ls", "store", ""],
        ["stat", "", "x"],
        ["stat", "store", ""],
        ["info", ""],
        ["check", ""],
        ["rebuild-index", ""],
        ["map", ""],
        ["dump", "lock", ""],
    ],
)
def test_an_empty_path_is_a_wrong_command_line(arguments: list[str], run: Run) -> None:
    done = run(*arguments)
    assert done.code == EXIT_USAGE
    assert "path is empty" in done.err or "Directory '' does not exist" in done.err
    assert done.err.count("\n") == 1


def test_help_needs_nothing_that_is_slow_to_import() -> None:
    program = "import sys, imgfs.cli; imgfs.cli.main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    loaded = set(done.stdout.split())
    assert "click" in loaded
    assert not loaded & {"numpy", "tqdm", "trio", "pyfuse3", "imgfs.store", "imgfs.format"}


@pytest.mark.parametrize("command", [["ls"], ["stat"], ["info"], ["check"], ["rebuild-index"], ["export"]])
def test_where_no_store_is(command: list[str], tmp_path: Path, run: Run) -> None:
    more = [tmp_path / "out"] if command == ["export"] else ["x"] if command == ["stat"] else []
    done = run(*command, tmp_path / "none", *more)
    assert done.code == EXIT_NO_STORE
    assert done.err == f"imgfs: there is no store at {tmp_path}/none; make one with: imgfs mkfs {tmp_path}/none\n"


def test_a_store_of_a_newer_release_is_refused(store: Path, run: Run) -> None:
    superblock = store / "imgfs.json"
    fields = json.loads(superblock.read_text())
    fields["format"] += 1
    fields["readable_by"] = "9.8"
    del fields["checksum"]
    fields["checksum"] = f"{crc32c(json.dumps(fields, sort_keys=True).encode()):08x}"
    superblock.write_text(json.dumps(fields))
    for command in (["ls", store], ["check", store], ["rebuild-index", store]):
        done = run(*command)
        assert done.code == 7
        assert "9.8" in done.err
        assert done.err.count("\n") == 1


def test_a_store_in_use_is_left_alone(filled: Path, photos: Path, run: Run) -> None:
    with Store.open(str(filled)):
        for command in (["import", photos, filled], ["rebuild-index", filled]):
            done = run(*command)
            assert done.code == EXIT_BUSY
            assert f"process {os.getpid()}" in done.err
            assert done.err.count("\n") == 1


def test_a_bug_shows_its_traceback(store: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "counts", lambda self: 1 / 0)
    done = run("info", store)
    assert done.code == cli.EXIT_BUG
    assert "ZeroDivisionError" in done.err
    assert done.err.endswith("imgfs: this is a bug in imgfs; please report it with the lines above\n")


def test_a_name_cannot_break_the_line_of_a_message(store: Path, run: Run) -> None:
    done = run("stat", store, "a\nb\x1b[2J")
    assert done.code == EXIT_FAILURE
    assert done.err.startswith("imgfs: a\\nb\\x1b[2J is not in the store")
    assert done.err.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(store: Path, photos: Path, run: Run) -> None:
    many = photos / "many"
    many.mkdir()
    for number in range(3000):
        (many / f"{number:050}").write_bytes(b"")
    assert run("import", photos, store).code == 0
    with subprocess.Popen(
        [*COMMAND, "ls", "-R", str(store)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == cli.EXIT_BROKEN_PIPE


# -- mkfs ---------------------------------------------------------------------------------------------------------


def test_mkfs_says_what_comes_next(tmp_path: Path, run: Run) -> None:
    done = run("mkfs", tmp_path / "a store")
    assert done.code == 0
    assert "volumes of 1.0 GiB" in done.out
    assert f"imgfs mount --daemon '{tmp_path}/a store' MOUNTPOINT" in done.out


def test_mkfs_takes_only_an_empty_directory(tmp_path: Path, run: Run) -> None:
    (tmp_path / "something").touch()
    done = run("mkfs", tmp_path)
    assert done.code == EXIT_FAILURE
    assert "not empty" in done.err
    assert os.listdir(tmp_path) == ["something"]
    (tmp_path / "empty").mkdir()
    assert run("mkfs", tmp_path / "empty").code == 0


def test_mkfs_refuses_a_volume_size_out_of_range(tmp_path: Path, run: Run) -> None:
    for size in ("1K", "65535", "33G"):
        done = run("mkfs", tmp_path / "store", "--volume-size", size)
        assert done.code == EXIT_USAGE
        assert f"'{size}' is out of range: a volume has 64.0 KiB to 32.0 GiB" in done.err
        assert done.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_mkfs_takes_no_file_for_a_directory(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        done = run("mkfs", tmp_path / name)
        assert done.code == EXIT_FAILURE
        assert done.err == f"imgfs: {tmp_path}/{name} is not a directory; name an empty or a new one\n"
    assert (tmp_path / "file").read_bytes() == b"mine"


# -- ls, stat and info --------------------------------------------------------------------------------------------


def test_ls_sorts_and_shows_names_as_they_are(store: Path, photos: Path, run: Run) -> None:
    shutil.rmtree(photos)
    photos.mkdir()
    for name in (b"b", b"\xff", b"a\nb", b"A"):
        Path(os.fsdecode(os.fsencode(photos) + b"/" + name)).touch()
    assert run("import", photos, store).code == 0
    assert os.fsencode(run("ls", store).out) == b"A\na\nb\nb\n\xff\n"


def test_ls_on_a_terminal_escapes_what_would_steer_it(store: Path, photos: Path, run: Run) -> None:
    shutil.rmtree(photos)
    photos.mkdir()
    for name in (b"\xff", b"a\nb", b"it's\x1b[2J", "Île d'Yeu".encode()):
        Path(os.fsdecode(os.fsencode(photos) + b"/" + name)).touch()
    assert run("import", photos, store).code == 0
    screen, terminal = os.openpty()
    subprocess.run([*COMMAND, "ls", str(store)], stdout=terminal, check=True, timeout=30)
    os.write(terminal, b"\0")
    seen = b""
    while not seen.endswith(b"\0"):
        seen += os.read(screen, 4096)
    os.close(screen)
    os.close(terminal)
    assert seen.decode() == "$'a\\nb'\r\n$'it\\'s\\x1b[2J'\r\nÎle d'Yeu\r\n$'\\xff'\r\n\0"


def test_ls_long_and_recursive(filled: Path, photos: Path, run: Run) -> None:
    (photos / "album 0" / "IMG_0000.jpg").chmod(0o640)
    os.utime(photos / "album 0" / "IMG_0000.jpg", (1_700_000_000, 1_700_000_000))
    assert run("import", photos, filled).code == 0
    lines = run("ls", filled, "-lR").out.splitlines()
    assert lines[0] == ".:"
    assert lines[1].startswith("drwxr-xr-x   2 ")
    assert lines[3].startswith("lrwxrwxrwx   1 ")
    assert lines[3].endswith(" latest -> album 1/IMG_0019.jpg")
    assert lines[4:6] == ["", "album 0:"]
    assert lines[6].startswith("-rw-r-----   1 ")
    assert lines[6].endswith(" IMG_0000.jpg")
    assert " 2023-11-1" in lines[6]
    assert " 5000 " in lines[6]


def test_ls_of_a_huge_directory_needs_no_sorting(filled: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = run("ls", filled, "album 0").out.splitlines()
    monkeypatch.setattr("imgfs.cli.looking._SORTED_MAX", 3)
    assert sorted(run("ls", filled, "album 0").out.splitlines()) == listed


def test_ls_of_an_image_shows_the_image(filled: Path, run: Run) -> None:
    assert run("ls", filled, "album 0/IMG_0000.jpg").out == "album 0/IMG_0000.jpg\n"


@pytest.mark.parametrize("path", ["nothing", "album 0/IMG_0000.jpg/below", "x" * 300, "..", "a\0b"])
def test_what_is_not_there_is_said_in_one_line(path: str, filled: Path, run: Run) -> None:
    done = run("ls", filled, path)
    assert done.code == EXIT_FAILURE
    assert "is not in the store" in done.err
    assert done.err.count("\n") == 1


def test_stat_says_where_the_bytes_lie(filled: Path, photos: Path, run: Run) -> None:
    path = "album 1/IMG_0007.jpg"
    facts = json.loads(run("stat", filled, path, "--json").out)
    data = (photos / path).read_bytes()
    status = (photos / path).stat()
    assert facts["kind"] == "file"
    assert facts["size"] == len(data)
    assert facts["checksum"] == f"{crc32c(data):08x}"
    assert (facts["mtime_ns"], facts["uid"], facts["gid"]) == (status.st_mtime_ns, status.st_uid, status.st_gid)
    assert facts["generation"] == 0
    volume = volume_file(filled, facts["volume"]).read_bytes()
    assert volume[facts["data_offset"] :].startswith(data)
    shown = run("stat", filled, path).out
    for text in (f"volume:   {facts['volume']}\n", f"offset:   {facts['offset']}\n", facts["checksum"], "5,007 bytes"):
        assert text in shown


def test_stat_of_links_and_directories(filled: Path, run: Run) -> None:
    assert json.loads(run("stat", filled, "latest", "--json").out)["target"] == "album 1/IMG_0019.jpg"
    assert "target:   album 1/IMG_0019.jpg\n" in run("stat", filled, "latest").out
    facts = json.loads(run("stat", filled, "/album 0/", "--json").out)
    assert facts["kind"] == "directory"
    assert "volume" not in facts
    assert json.loads(run("stat", filled, "/", "--json").out)["inode"] == 1


def test_links_special_files_and_attributes_are_shown(store: Path, photos: Path, run: Run) -> None:
    shutil.rmtree(photos)
    photos.mkdir()
    (photos / "image").write_bytes(b"1")
    (photos / "twin").hardlink_to(photos / "image")
    os.setxattr(photos / "image", "user.comment", b"two\nlines \xff")
    os.setxattr(photos / "image", "user.long", b"x" * 1000)
    os.mkfifo(photos / "pipe", 0o640)
    assert run("import", photos, store).code == 0
    with Store.open(str(store)) as opened:
        opened.special(1, b"tape", stat.S_IFCHR | 0o620, os.makedev(9, 300), 0, 0)
        opened.special(1, b"disk", stat.S_IFBLK | 0o600, os.makedev(259, 1), 0, 0)
        opened.special(1, b"wire", stat.S_IFSOCK | 0o755, 0, 0, 0)
    lines = {line.split()[-1]: line for line in run("ls", "-l", store).out.splitlines()}
    assert lines["disk"].startswith("brw-------   1 ")
    assert " 259, 1 " in lines["disk"]
    assert lines["image"].startswith("-rw-r--r--@  2 ")
    assert lines["twin"].startswith("-rw-r--r--@  2 ")
    assert lines["pipe"].startswith("prw-r-----   1 ")
    assert lines["tape"].startswith("crw--w----   1 ")
    assert " 9, 300 " in lines["tape"]
    assert lines["wire"].startswith("srwxr-xr-x   1 ")

    facts = {name: json.loads(run("stat", "--json", store, name).out) for name in lines}
    assert {name: fact["kind"] for name, fact in facts.items()} == {
        "disk": "block device",
        "image": "file",
        "twin": "file",
        "pipe": "pipe",
        "tape": "character device",
        "wire": "socket",
    }
    assert facts["tape"]["device"] == {"major": 9, "minor": 300}
    assert (facts["tape"]["mode"], "device" in facts["pipe"]) == ("0620", False)
    assert facts["twin"] == facts["image"] | {"path": "twin"}
    assert facts["image"]["links"] == 2
    assert facts["image"]["attributes"] == {"user.comment": "two\nlines \udcff", "user.long": "x" * 1000}
    assert "attributes" not in facts["pipe"]

    shown = run("stat", store, "twin").out
    assert "links:     2\n" in shown
    assert "attribute: user.comment: $'two\\nlines \\xff'\n" in shown
    assert f"attribute: user.long: {'x' * 256}... (1,000 bytes)\n" in shown
    assert "device:   major 9, minor 300\n" in run("stat", store, "tape").out


def test_info(filled: Path, photos: Path, run: Run) -> None:
    facts = json.loads(run("info", filled, "--json").out)
    assert (facts["images"], facts["directories"], facts["symlinks"]) == (20, 3, 1)
    assert facts["live_bytes"] == sum(5000 + number for number in range(20)) + len("album 1/IMG_0019.jpg")
    assert facts["volumes"] == len(list((filled / "volumes").glob("*.vol"))) > 1
    assert facts["disk_bytes"] == facts["live_bytes"] + facts["other_bytes"]
    assert facts["volume_bytes_max"] == 65536
    assert (facts["pid"], facts["mountpoints"]) == (None, [])
    shown = run("info", filled).out
    assert facts["store_id"] in shown
    assert "state:" in shown
    assert "not mounted\n" in shown


def test_info_names_the_process_that_has_the_store(filled: Path, run: Run) -> None:
    with Store.open(str(filled)):
        assert json.loads(run("info", filled, "--json").out)["pid"] == os.getpid()
        assert f"in use by process {os.getpid()}\n" in run("info", filled).out


# -- mount and umount ---------------------------------------------------------------------------------------------


def test_a_wrong_mount_option_is_a_wrong_command_line(store: Path, tmp_path: Path, run: Run) -> None:
    done = run("mount", "-o", "allow_othr", store, tmp_path / "mnt")
    assert done.code == EXIT_USAGE
    assert done.err == "imgfs: unknown mount option 'allow_othr'; did you mean allow_other?\n"


def test_mount_needs_a_mountpoint(store: Path, tmp_path: Path, run: Run) -> None:
    done = run("mount", store, tmp_path / "mnt")
    assert done.code == 9
    assert done.err.count("\n") == 1


def test_umount_of_what_is_not_mounted(tmp_path: Path, run: Run) -> None:
    done = run("umount", tmp_path)
    assert done.code != 0
    assert done.out == ""
    assert done.err.startswith("imgfs: ")
    assert done.err.count("\n") == 1


# -- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("65536", 65536), ("64K", 65536), ("1g", 1 << 30), ("2 MiB", 2 << 20), ("3TB", 3 << 40)],
)
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_text_is_escaped_only_where_it_must_be() -> None:
    assert escape("a b'c\\d") == "a b'c\\d"
    assert escape("a\tb'c\\d") == "$'a\\tb\\'c\\\\d'"
    assert escape(os.fsdecode(b"\xc3")) == "$'\\xc3'"
    assert escape("\u202e") == "$'\\xe2\\x80\\xae'"
    assert one_line("it's\r\n") == "it's\\r\\n"


def test_sizes_and_times_are_readable() -> None:
    assert [binary_size(size) for size in (0, 1023, 1536, 5 << 30)] == ["0 bytes", "1,023 bytes", "1.5 KiB", "5.0 GiB"]
    assert [duration(seconds) for seconds in (-1, 7, 61, 3700)] == ["0:00", "0:07", "1:01", "1:01:40"]
