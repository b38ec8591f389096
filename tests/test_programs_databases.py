"""sqlite3 and git keep their data on a mount, with all they ask of a file system: locks, mappings, fsync, rename."""

import os
import sqlite3
import subprocess
from pathlib import Path

import pytest
from beside import Beside, make_photos
from mounted import Mounted, run, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]

JOURNALS = ["delete", "truncate", "persist", "memory", "wal"]
# The same commits at the same time have the same names.
GIT = (
    *("env", "GIT_AUTHOR_DATE=2001-01-01T00:00:00Z", "GIT_COMMITTER_DATE=2001-01-01T00:00:00Z"),
    *("git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "safe.directory=*"),
    *("-c", "gc.auto=0", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always"),
)


# -- sqlite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", JOURNALS)
def test_sqlite_holds_the_same_rows(beside: Beside, journal: str) -> None:
    statements = f"""
        pragma journal_mode={journal};
        create table photos (name text primary key, data blob);
        insert into photos values ('a.jpg', zeroblob(20000));
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 500)
            insert into photos select printf('%04d.jpg', i), printf('%.*c', i, 'x') from n;
        begin; delete from photos where name like '%7.jpg'; rollback;
        begin; update photos set data = zeroblob(3000) where name like '%3.jpg'; commit;
        delete from photos where name like '%5.jpg';
        vacuum;
        pragma integrity_check;
    """
    said = beside.run("sqlite3", "photos.db", statements)
    assert said == f"{journal}\nok\n"
    rows = beside.run("sqlite3", "photos.db", ".dump")
    assert rows.count("INSERT") == 451
    beside.run("sqlite3", "photos.db", ".backup copy.db")
    assert run("sqlite3", beside.mount / "photos.db", ".dump") == rows
    assert run("sqlite3", beside.mount / "copy.db", "pragma integrity_check", ".dump") == f"ok\n{rows}"


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite_from_several_processes(beside: Beside, journal: str) -> None:
    """Three processes add to one counter, and read in between: neither locks nor the shared index are lost."""
    path = beside.mount / "counter.db"
    run("sqlite3", path, f"pragma journal_mode={journal}", "create table counter (n)", "insert into counter values (0)")
    add = "begin immediate; update counter set n = n + 1; commit; select count(*) from counter;"
    writers = [
        subprocess.Popen(["sqlite3", "-cmd", ".timeout 60000", path, add * 25], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    try:
        for writer in writers:
            assert writer.communicate(timeout=60)[0] == b"1\n" * 25
            assert writer.returncode == 0
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert run("sqlite3", path, "select n from counter", "pragma integrity_check") == "75\nok\n"


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite_killed_in_a_transaction(beside: Beside, journal: str) -> None:
    """What was not committed is rolled back by the next that opens the database."""
    path = beside.mount / "photos.db"
    run(
        "sqlite3", path, f"pragma journal_mode={journal}", "create table photos (data)", "insert into photos values (1)"
    )
    # A cache of a few pages is spilled into the database before the commit.
    endless = """
        pragma cache_size=5; pragma cache_spill=5; begin;
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 2000)
            insert into photos select zeroblob(1000) from n;
        with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n;
    """
    spilled = path if journal == "delete" else beside.mount / "photos.db-wal"
    with subprocess.Popen(["sqlite3", path, endless], stdout=subprocess.DEVNULL) as writer:
        try:
            wait_until(
                lambda: spilled.exists() and spilled.stat().st_size > 1_000_000, "pages are spilled", process=writer
            )
        finally:
            writer.kill()
    assert (beside.mount / ("photos.db-journal" if journal == "delete" else "photos.db-wal")).stat().st_size > 0
    assert run("sqlite3", path, "select count(*) from photos", "pragma integrity_check") == "1\nok\n"


def test_sqlite_outlives_the_daemon(mounted: Mounted) -> None:
    path = mounted.point / "photos.db"
    for mode in ("delete", "wal"):
        database = sqlite3.connect(path)
        assert database.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
        database.execute(f"create table {mode}_photos (name text primary key, data blob)")
        for number in range(20):
            with database:
                database.execute(f"insert into {mode}_photos values (?, ?)", (f"{number}.jpg", os.urandom(20_000)))
        database.close()
    assert run("sqlite3", path, "pragma integrity_check", "select count(*) from wal_photos") == "ok\n20\n"
    mounted.kill()
    mounted.start()
    assert run("sqlite3", path, "pragma integrity_check", "select count(*) from delete_photos") == "ok\n20\n"


# -- git --------------------------------------------------------------------------------------------------------------


def _origin(path: Path) -> None:
    """Make a repository with three commits and two branches."""
    run(*GIT, "init", "-q", path)
    make_photos(path / "photos", seed=4)
    for photo in path.glob("photos/**/*"):
        if not photo.is_symlink():
            photo.chmod(0o755)
    for number in range(3):
        (path / "text").write_text(f"line {number}\n" * 1000)
        run(*GIT, "-C", path, "add", "-A")
        run(*GIT, "-C", path, "commit", "-q", "-m", f"commit {number}")
    run(*GIT, "-C", path, "branch", "other", "HEAD~2")


def test_git(beside: Beside) -> None:
    _origin(beside.outside / "origin")
    beside.run(*GIT, "clone", "-q", "--no-hardlinks", beside.outside / "origin", "clone")
    git = (*GIT, "-C", "clone")

    def check() -> None:
        beside.run(*git, "fsck", "--strict", "--no-progress")
        assert beside.run(*git, "status", "--porcelain") == ""
        beside.run(*git, "log", "--stat", "--format=%T %s", "--all")
        beside.run(*git, "ls-files", "--stage")

    check()
    head = beside.run(*git, "rev-parse", "HEAD")
    beside.run(*git, "checkout", "-q", "-b", "mine", "origin/other")
    beside.run(*git, "mv", "text", "moved")
    beside.run(*git, "commit", "-q", "-m", "moved")
    beside.run(*git, "stash", "list")
    beside.run(*git, "checkout", "-q", "main")
    beside.run(*git, "merge", "-q", "-m", "merge", "mine")
    beside.run(*git, "reset", "-q", "--hard", head.strip())
    beside.run(*git, "clean", "-qfdx")
    beside.run(*git, "gc", "-q", "--prune=now")
    check()
    assert beside.run(*git, "rev-parse", "HEAD") == head
    check()
    # Times and numbers of inodes stand in it.
    beside.run("rm", "clone/.git/index")
    assert beside.check()[b"clone/text"].size == len("line 2\n" * 1000)


def test_git_clones_by_hard_links(beside: Beside) -> None:
    """A clone next to its origin shares the objects; it is whole when the origin is gone."""
    _origin(beside.outside / "origin")
    beside.run("cp", "-a", beside.outside / "origin", "origin")
    beside.run(*GIT, "clone", "-q", "origin", "clone")
    shared = beside.run("sh", "-c", "find clone/.git/objects -type f -links 2 | wc -l")
    assert int(shared) > 50
    beside.run(*GIT, "-C", "clone", "worktree", "add", "-q", "../worktree", "origin/other")
    beside.run("rm", "-rf", "origin")
    for place in ("clone", "worktree"):
        beside.run(*GIT, "-C", place, "fsck", "--strict", "--no-progress")
        assert beside.run(*GIT, "-C", place, "status", "--porcelain") == ""
    assert beside.run("sh", "-c", "find clone/.git/objects -type f -links 2 | wc -l") == "0\n"
