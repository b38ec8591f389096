"""The lines of docs/operations.md about snapshots and backups do what they say: these very lines are run."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ascending import KEPT, newest_in, writing
from mounted import PROJECT, SETTINGS, XfsDisk, imgfs, make_tree, seen, wait_until

from imgfs import mountpoint
from imgfs.store import Store, make_store

PAGE = PROJECT / "docs" / "operations.md"
DEADLINE_S = 60


def lines_under(heading: str) -> str:
    """Return the commands that stand under *heading*."""
    section = re.split(rf"^#+ {heading}$", PAGE.read_text(), flags=re.MULTILINE)[1]
    section = re.split(r"^#", section, flags=re.MULTILINE)[0]
    return "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))


class Server:
    """What the page supposes: a store in /srv/photos.imgfs that is mounted at /srv/photos; here, below *top*."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.store = top / "srv" / "photos.imgfs"
        self.point = top / "srv" / "photos"
        self.backups = top / "backup"
        self.point.mkdir(parents=True)
        program = top / "bin" / "imgfs"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} -m imgfs "$@"\n')
        program.chmod(0o755)
        make_store(str(self.store), SETTINGS, uid=0, gid=0)
        imgfs("mount", "--daemon", "-o", "allow_other", self.store, self.point)

    def run(self, heading: str, change: Callable[[str], str] = str) -> None:
        """Run the lines under *heading*, as *change* has them."""
        script = change(lines_under(heading)).replace("/srv/", f"{self.top}/srv/")
        script = script.replace("/backup", f"{self.top}/backup")
        assert "imgfs" in script
        done = subprocess.run(
            ["sh", "-eu", "-c", script],
            env={"PATH": f"{self.top}/bin:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def unmount(self) -> None:
        imgfs("umount", self.point)

    def back_up(self, heading: str) -> Path:
        """Run the lines under *heading*; return the backup they made. Each second can have one."""
        second = time.time() // 1
        wait_until(lambda: time.time() // 1 > second, "a second has passed")
        before = set(os.listdir(self.backups)) if self.backups.exists() else set()
        self.run(heading)
        assert not (self.backups / "unfinished").exists()
        assert not (self.top / "srv" / "photos.snapshot").exists()
        (name,) = set(os.listdir(self.backups)) - before - {"last"}
        assert (self.backups / "last").readlink() == Path(name)
        return self.backups / name

    def restore(self) -> None:
        """Lose the store, and restore the last backup."""
        self.unmount()
        shutil.rmtree(self.store)
        # A clean check is no condition: an index may be made anew.
        self.run(
            "Restoring", lambda lines: re.sub("^(imgfs check .*)$", r"\1 || [ $? = 4 ]", lines, flags=re.MULTILINE)
        )

    def tear_down(self) -> None:
        while mountpoint.find(str(self.point)):
            mountpoint.take_away(str(self.point), lazy=True)


@pytest.fixture
def server(disk: XfsDisk) -> Iterator[Server]:
    top = disk.path / f"server{random.getrandbits(32):08x}"
    top.mkdir()
    server = Server(top)
    try:
        yield server
        server.unmount()
        imgfs("check", server.store)
    finally:
        server.tear_down()
        shutil.rmtree(top)


def test_going_back_to_a_snapshot(server: Server) -> None:
    make_tree(server.point / "tree", 1)
    wanted = seen(server.point)
    server.run("Snapshots", lambda lines: lines.partition("imgfs umount")[0])
    shutil.rmtree(server.point / "tree" / "a")
    server.run("Snapshots", lambda lines: "".join(lines.partition("imgfs umount")[1:]))
    assert seen(server.point) == wanted
    assert (server.top / "srv" / "photos.old").is_dir()


@pytest.mark.parametrize("heading", ["From a snapshot", "From the store itself"])
def test_backups_share_what_is_sealed_and_each_comes_back(server: Server, heading: str) -> None:
    make_tree(server.point / "tree", 2)
    first_tree = seen(server.point)
    first = server.back_up(heading)
    shutil.rmtree(server.point / "tree" / "a")
    make_tree(server.point / "more", 3, images=20)
    second_tree = seen(server.point)
    second = server.back_up(heading)
    sealed = sorted((second / "volumes").glob("*.vol"))[:1]
    assert sealed
    for volume in sealed:
        assert volume.samefile(first / "volumes" / volume.name), "it was copied again"
    last = max((first / "volumes").glob("*.vol"))
    assert not last.samefile(second / "volumes" / last.name)
    server.restore()
    assert seen(server.point) == second_tree
    (server.backups / "last").unlink()
    (server.backups / "last").symlink_to(first.name)
    server.restore()
    assert seen(server.point) == first_tree


@pytest.mark.parametrize("heading", ["From a snapshot", "From the store itself"])
def test_a_backup_beside_writers_has_of_each_all_up_to_some_image(server: Server, heading: str) -> None:
    with writing(server.point) as writers:
        wait_until(lambda: all(writer.closed > KEPT * 2 for writer in writers), "enough is written")
        before = [writer.closed for writer in writers]
        server.back_up(heading)
        after = [writer.begun for writer in writers]
    server.restore()
    server.unmount()
    with Store.open(str(server.store)) as store:
        assert store.report.damage == []
        newest = [newest_in(store, writer) for writer in writers]
    assert all(low <= found <= high for low, found, high in zip(before, newest, after, strict=True)), newest
    imgfs("mount", "--daemon", server.store, server.point)
