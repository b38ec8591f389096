"""Programs that look, count, watch and clear away see on a mount what they see on plain XFS."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from beside import Beside, make_photos, make_special
from mounted import run, wait_until

from imgfs.settings import KIB, MIB

pytestmark = [pytest.mark.mount, pytest.mark.root]


def _fill(beside: Beside) -> None:
    """Put the same tree of all sorts into both places."""
    source = beside.outside / "source"
    source.mkdir()
    make_photos(source, seed=12)
    make_special(source / "special")
    beside.run("cp", "-a", source, "tree")


FIND = [
    ["-type", "f", "-printf", r"%P %#m %n %s %U:%G %T@\n"],
    ["-type", "d", "-printf", r"%P %#m %n %U:%G %T@\n"],
    ["-not", "-type", "f", "-not", "-type", "d", "-printf", r"%P %y %#m %n %s %l\n"],
    ["-size", "+100k", "-size", "-2M"],
    ["-empty"],
    ["-links", "+1", "-type", "f"],
    ["-samefile", "tree/special/image"],
    ["-newermt", "2001-01-01", "-not", "-newermt", "2010-06-01"],
    ["-newer", "tree/special/program"],
    ["-user", "33", "-perm", "-u=s"],
    ["-name", "*.jpg", "-path", "*c*"],
    ["-type", "l", "-lname", "a/*"],
    ["-xtype", "l"],
    ["-maxdepth", "2", "-mindepth", "2", "-type", "b,c,p,s"],
    ["-readable", "-executable", "-type", "f"],
]


def test_find(beside: Beside) -> None:
    _fill(beside)
    for expression in FIND:
        # Inside of one directory the order belongs to the file system.
        found = beside.each(lambda place, e=expression: sorted(run("find", "tree", *e, cwd=place).split("\n")))  # type: ignore[misc]
        assert len(found) > 1, expression
    beside.run("find", "tree", "-name", "*[02468].jpg", "-delete")
    beside.run("find", "tree", "-type", "f", "-name", "*1.jpg", "-exec", "chmod", "600", "{}", "+")
    beside.check()


def test_ls_and_stat(beside: Beside) -> None:
    _fill(beside)
    # Of a directory, the sum of blocks in the first line is the file system's.
    beside.each(
        lambda place: run("ls", "-lAn", "--time-style=full-iso", cwd=place / "tree" / "special").split("\n")[2:]
    )
    beside.each(lambda place: sorted(os.listdir(place / "tree" / "a" / "b c")))
    beside.each(lambda place: run("ls", "-1ARF", cwd=place))
    beside.run("stat", "--format=%A %h %u %g %s %y %F %t:%T %N", "tree/special/image", "tree/special/disk", "tree/link")
    unsorted = run("ls", "-f1", cwd=beside.mount / "tree" / "special").splitlines()
    assert sorted(unsorted) == sorted([".", "..", *os.listdir(beside.plain / "tree" / "special")])


def test_du_counts_what_is_there(beside: Beside) -> None:
    beside.run("mkdir", "-p", "a/b", "c")
    sizes = [0, 1, 5000, 100 * KIB, MIB, 3 * MIB + 17]
    for number, size in enumerate(sizes):
        data = os.urandom(size)
        beside.write(f"a/{number}", data)
    beside.run("ln", "a/5", "a/b/again")
    beside.run("ln", "a/5", "c/again")
    # Directories have a size of their own on each file system.
    counted = beside.run("sh", "-c", "find . -type f -print0 | sort -z | du -b -c --files0-from=-")
    assert counted.endswith(f"\n{sum(sizes)}\ttotal\n")
    for place in (beside.mount, beside.plain):
        taken = int(run("du", "-s", "-B1", place).split()[0])
        assert sum(sizes) <= taken < sum(sizes) + 16 * 4 * KIB
        twice = int(run("du", "-s", "-l", "-B1", place).split()[0])
        assert 2 * sizes[5] <= twice - taken < 2 * sizes[5] + 16 * KIB


def test_df_follows_the_disk_below(beside: Beside) -> None:
    fields = "--output=size,used,avail,iused,fstype,target"

    def df(path: Path) -> list[str]:
        return run("df", "-B1", fields, path).splitlines()[1].split()

    mount, plain = beside.mount, beside.plain
    assert df(mount)[0] == df(plain)[0]
    assert df(mount)[4:] == ["fuse.imgfs", str(mount.parent)]
    before = df(mount)
    (mount / "directory").mkdir()
    for number in range(20):
        (mount / "directory" / f"{number}").write_bytes(os.urandom(MIB))
    after = df(mount)
    assert int(after[3]) - int(before[3]) == 21
    # The volumes are preallocated in steps of 8 MiB.
    assert 11 * MIB < int(after[1]) - int(before[1]) < 40 * MIB
    assert run("df", "-B1", "--output=source", mount).split()[-1] == str(beside.mounted.store)


def test_rm_of_a_large_tree(beside: Beside) -> None:
    beside.run("mkdir", "kept")
    for place in (beside.mount, beside.plain):
        for directory in range(20):
            below = place / "tree" / f"{directory % 4}" / f"{directory}"
            below.mkdir(parents=True)
            for number in range(150):
                (below / f"{number:04d}.jpg").touch()
        os.link(place / "tree" / "0" / "0" / "0000.jpg", place / "kept" / "image")
    found = beside.check()
    assert len(found) == 3028
    assert found[b"kept/image"].links == 2
    beside.run("rm", "-rf", "tree")
    found = beside.check()
    assert found.keys() == {b".", b"kept", b"kept/image"}
    assert found[b"kept/image"].links == 1


# -- watching ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _watching(place: Path, *command: str) -> Iterator[Callable[[str], str]]:
    """Run *command* meanwhile; yields what waits until it has written some text, and returns all that it wrote."""
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(command, cwd=place, stdout=output, stderr=subprocess.STDOUT) as watcher,
    ):

        def said() -> str:
            return os.pread(output.fileno(), MIB, 0).decode()

        def once_said(text: str) -> str:
            wait_until(lambda: text in said(), f"{command[0]} says {text!r}, not {said()!r}", process=watcher)
            return said()

        try:
            yield once_said
        finally:
            watcher.terminate()


def test_inotifywait(beside: Beside) -> None:
    """Whoever watches a directory hears of every change that is made through the mount."""
    beside.run("mkdir", "a", "b")
    changes = """
        echo 1 > a/image
        chmod 600 a/image
        mv a/image a/renamed
        mv a/renamed b/moved
        ln b/moved a/hard
        ln -s moved b/soft
        echo more >> a/hard
        cp -p b/moved b/copy
        touch -d 2001-01-01 b/copy
        setfattr -n user.comment -v text a/hard
        mkfifo b/fifo
        mkdir b/new
        rmdir b/new
        truncate -s 1 b/copy
        rm a/hard b/moved b/soft b/copy b/fifo
        touch a/end
    """
    events = "create,modify,close_write,attrib,moved_from,moved_to,delete"

    def watched(place: Path) -> list[str]:
        watch = ["inotifywait", "--monitor", "--event", events, "--format", "%w%f %e", "a", "b"]
        with _watching(place, *watch) as once_said:
            once_said("Watches established.\n")
            run("sh", "-c", changes, cwd=place)
            # The kernel joins two equal events if nobody has heard of the first yet.
            lines = once_said("a/end CLOSE_WRITE,CLOSE\n").split("Watches established.\n")[1].splitlines()
            return [line for line, before in zip(lines, ["", *lines], strict=False) if line != before]

    heard = beside.each(watched)
    assert heard[0] == "a/image CREATE"
    assert {"b/moved MOVED_TO", "a/hard CREATE", "b/new CREATE,ISDIR", "b/fifo DELETE"} <= set(heard)


def test_tail_follows(beside: Beside) -> None:
    beside.run("sh", "-c", "echo one > log")

    def tailed(place: Path) -> list[str]:
        with _watching(place, "tail", "-n", "+1", "-s", "0.02", "-F", "log") as once_said:
            once_said("one\n")
            with open(place / "log", "a") as log:
                # Seen before it is closed.
                log.write("two\n")
                log.flush()
                once_said("two\n")
                log.write("three\n")
            once_said("three\n")
            os.rename(place / "log", place / "log.1")
            (place / "log").write_text("four\n")
            once_said("four\n")
            run("sh", "-c", "echo five >> log", cwd=place)
            # How it learned of the new file is between tail and the kernel.
            return [line for line in once_said("five\n").splitlines() if not line.startswith("tail:")]

    assert beside.each(tailed) == ["one", "two", "three", "four", "five"]
