"""An import reads large directories in a process of its own, and ends the same whatever becomes of that."""

import os
import signal
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from mortal import DEADLINE_S, in_process, status_of
from trees import Watcher, bring_in, snapshot, take_out

from imgfs.ahead import FILES_MIN, ReadAhead
from imgfs.errors import StoreFull
from imgfs.import_tree import import_tree
from imgfs.log import SMALL_BYTES
from imgfs.settings import MIB, Settings
from imgfs.store import Store, make_store
from imgfs.transfer import Tally

SETTINGS = Settings(volume_bytes_max=4 * MIB, headroom_bytes=0, rest_slots=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Directories that are worth a reader, with some of all that it leaves to the import."""
    path = tmp_path / "source"
    for directory in (path / "large", path / "large" / "below"):
        directory.mkdir(parents=True)
        for number in range(3 * FILES_MIN):
            (directory / f"{number}").write_bytes(os.urandom(number * 97 % 20_011))
        (directory / "mebibyte").write_bytes(os.urandom(SMALL_BYTES))
        (directory / "too large").write_bytes(os.urandom(SMALL_BYTES + 1))
        (directory / "twin").hardlink_to(directory / "7")
        (directory / "pointer").symlink_to("8")
        (directory / "set-id").write_bytes(b"?")
        (directory / "set-id").chmod(0o4711)
        os.mkfifo(directory / "pipe")
        os.setxattr(directory / "9", "user.rating", b"5")
        os.utime(directory / "10", ns=(1, 981_173_106_123_456_789))
    (path / "small").mkdir()
    (path / "small" / "one").write_bytes(b"1")
    return path


@pytest.fixture
def store_path(tmp_path: Path) -> str:
    path = str(tmp_path / "store")
    make_store(path, SETTINGS, uid=os.geteuid(), gid=os.getegid())
    return path


def children() -> list[int]:
    """Return the processes that this one has begun."""
    return list(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def import_in_process(path: str, source: Path, act: Callable[[Tally], None], *, resume: bool = False) -> int:
    """Import in a process that has one thread, as the command has; return its wait status."""

    def run() -> None:
        with Store.open(path, settings=SETTINGS) as store:
            import_tree(store, os.fsencode(source), Watcher(act), resume=resume)
        assert not children()

    return status_of(in_process(run))


def out_of(path: str, target: Path) -> dict[bytes, object]:
    with Store.open(path, settings=SETTINGS) as store:
        assert not store.report.damage
        assert take_out(store, target).damaged == 0
    return dict(snapshot(target))


def test_what_another_process_reads_goes_in_as_it_is(source: Path, store_path: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def look(tally: Tally) -> None:
        if tally.images == 2 * FILES_MIN:
            seen.write_text(str(len(children())))

    assert import_in_process(store_path, source, look) == 0
    assert seen.read_text() == "1"
    assert out_of(store_path, tmp_path / "out") == snapshot(source)


def test_an_import_goes_on_alone_when_its_reader_is_killed(source: Path, store_path: str, tmp_path: Path) -> None:
    killed = tmp_path / "killed"

    def kill(tally: Tally) -> None:
        if tally.images in (0, 1, 2 * FILES_MIN):
            for pid in children():
                os.kill(pid, signal.SIGKILL)
                killed.touch()

    assert import_in_process(store_path, source, kill) == 0
    assert killed.exists()
    assert out_of(store_path, tmp_path / "out") == snapshot(source)


def test_an_interrupted_import_has_stored_what_it_counted(source: Path, store_path: str, tmp_path: Path) -> None:
    counted = tmp_path / "counted"

    def interrupt(tally: Tally) -> None:
        if tally.images >= 2 * FILES_MIN + 3:
            counted.write_text(f"{tally.images} {tally.data_bytes}")
            raise KeyboardInterrupt

    assert import_in_process(store_path, source, interrupt) != 0
    with Store.open(store_path, settings=SETTINGS) as store:
        done = take_out(store, tmp_path / "some")
    assert f"{done.images} {done.data_bytes}" == counted.read_text()
    assert import_in_process(store_path, source, lambda tally: None, resume=True) == 0
    assert out_of(store_path, tmp_path / "all") == snapshot(source)


def test_the_reader_dies_with_its_import_and_holds_no_lock(source: Path, store_path: str, tmp_path: Path) -> None:
    reader = tmp_path / "reader"

    def die(tally: Tally) -> None:
        if tally.images == 2 * FILES_MIN:
            (pid,) = children()
            reader.write_text(str(pid))
            os.kill(pid, signal.SIGSTOP)  # so that it could not let go of anything by itself
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(import_in_process(store_path, source, die)) == signal.SIGKILL
    Store.open(store_path, settings=SETTINGS).close()
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{reader.read_text()}/exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert import_in_process(store_path, source, lambda tally: None, resume=True) == 0
    assert out_of(store_path, tmp_path / "all") == snapshot(source)


def test_a_full_store_ends_it_too(source: Path, store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.put_new
    calls = 0

    def full(store: Store, images: Sequence[object]) -> int:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise StoreFull("the disk is full")
        return real(store, images)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "put_new", full)
    ended: list[Tally] = []

    def run() -> None:
        with Store.open(store_path, settings=SETTINGS) as store:
            with pytest.raises(StoreFull):
                bring_in(store, source, Watcher(ended.append))
            assert ended[-1].images == store.counts().images > 0
        assert not children()

    assert status_of(in_process(run)) == 0


def test_it_reads_what_is_plain_and_small_and_leaves_the_rest(source: Path) -> None:
    directory = source / "large"
    names = [b"gone", b"below", *(os.fsencode(each.name) for each in directory.iterdir()), b"gone too"]
    emptied = []

    def run() -> None:
        ahead = ReadAhead(lambda file: not os.listxattr(file), lambda: emptied.append(1))
        for _ in range(2):
            ahead.ask(os.fsencode(directory), names)
            for name in names:
                found, path = ahead.take(), directory / os.fsdecode(name)
                left = not os.path.lexists(path) or not stat.S_ISREG(os.lstat(path).st_mode)
                if left or name in (b"twin", b"7", b"9", b"too large"):
                    assert found is None, name
                else:
                    assert found is not None, name
                    status = path.stat()
                    assert found.data == path.read_bytes()
                    assert (found.mode, found.uid, found.gid) == (status.st_mode, status.st_uid, status.st_gid)
                    assert found.mtime_ns == status.st_mtime_ns
            assert ahead.take() is None
        # Who gives up in between gets nothing of that afterwards.
        ahead.ask(os.fsencode(directory), names)
        ahead.take()
        ahead.ask(os.fsencode(directory), [b"11"] * FILES_MIN)
        found = ahead.take()
        assert found is not None
        assert found.data == (directory / "11").read_bytes()
        # Nor is anything found where there is no directory any more.
        ahead.close()
        ahead.ask(b"/nowhere", names)
        assert [ahead.take() for _ in names] == [None] * len(names)
        ahead.close()
        assert not children()
        assert len(emptied) > 4

    assert status_of(in_process(run)) == 0
