"""Processes of a mount are killed, hang, or are replaced by another release, and its users notice a pause.

IMGFS_SOAK=n makes the runs under load n times a minute instead of some seconds.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clients import Load
from mount_load import image
from mounted import PROJECT, WORKER_DEATHS, Mounted, children_of, imgfs, wait_until
from web_server import Nginx

from imgfs import mountpoint
from imgfs.child import is_stopped
from imgfs.errors import EXIT_MOUNT
from imgfs.opening import owner

SOAK = int(os.environ.get("IMGFS_SOAK", "0"))
LOAD_S = 60.0 * SOAK or 10.0

pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.timeout(240 + 4 * LOAD_S)]

STANDSTILL = (
    r"worker \d+ \(process \d+\) (stands still while it reads; it is \w+|was stopped by a signal; it is killed)"
)
MAINTENANCE = r"the maintenance process \(\d+\) died of SIGKILL; starting another"
TAKEN_OVER = [r"SIGHUP: trying the installed release", r"the installed release takes over", r"taken over in \d+ ms"]


@pytest.fixture(autouse=True)
def _deaths_are_expected(stopped: Mounted) -> None:
    stopped.expected_log += WORKER_DEATHS


# -- under load -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def load(mounted: Mounted, seed: int = 1) -> Iterator[Load]:
    mounted.watch(LOAD_S + 200)
    running = Load(mounted.point, seed)
    try:
        yield running
        running.finish()
    finally:
        running.stop()


def repeat(running: Load, pause_s: float, what: Callable[[], object], seconds: float = LOAD_S) -> None:
    """Do *what* again and again, as long as nothing has failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not running.has_failed():
        what()
        time.sleep(pause_s)


def kill_one(mounted: Mounted, chance: random.Random, number: int = signal.SIGKILL) -> None:
    workers = children_of(mounted.process.pid, "worker") if mounted.process else []
    if workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(workers), number)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_worker_is_killed_every_100_ms(stopped: Mounted, workers: int) -> None:
    stopped.start(f"allow_other,workers={workers}")
    chance = random.Random(workers)
    with load(stopped, seed=workers) as running:
        repeat(running, 0.1, lambda: kill_one(stopped, chance))
    assert stopped.log.read_text().count("SIGKILL") > LOAD_S


def test_nginx_answers_every_request_while_workers_are_killed(
    mounted: Mounted, web_server: Nginx, tmp_path: Path
) -> None:
    if shutil.which("wrk") is None:
        pytest.fail("wrk is missing") if os.environ.get("IMGFS_SKIP_NOTHING") else pytest.skip("needs wrk")
    names = [f"{number}.jpg" for number in range(20)]
    for number, name in enumerate(names):
        (mounted.point / name).write_bytes(image(number, 1 << number % 18))
    web_server.start(("open_file_cache max=10000 inactive=60s;", "open_file_cache off;"))
    script = tmp_path / "paths.lua"
    script.write_text(
        "local n = 0\nrequest = function()\n n = n + 1\n"
        f' return wrk.format("GET", "/" .. (n * 7 % {len(names)}) .. ".jpg")\nend\n'
    )
    address = f"http://127.0.0.1:{web_server.port}"
    command = ["wrk", "-t1", "-c8", f"-d{LOAD_S:.0f}s", "--timeout", "30s", "-s", script, address]
    chance = random.Random(3)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrk:
        while wrk.poll() is None:
            time.sleep(0.1)
            kill_one(mounted, chance)
        assert wrk.stdout is not None
        said = wrk.stdout.read()
    assert "Non-2xx" not in said
    assert "Socket errors" not in said, said
    assert web_server.error_log.read_text() == ""
    for number, name in enumerate(names):
        assert web_server.ask(f"/{name}").body == image(number, 1 << number % 18)


def test_all_workers_at_once_and_the_maintenance_process(stopped: Mounted) -> None:
    stopped.expected_log.append(MAINTENANCE)
    stopped.start("allow_other,workers=3,sync_interval=0.1")

    def kill_all() -> None:
        for pid in stopped.children("worker") + stopped.children("maint"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    with load(stopped) as running:
        repeat(running, 0.5, kill_all)
    assert "maintenance process" in stopped.log.read_text()


def test_workers_that_stand_still(stopped: Mounted) -> None:
    """Wherever one is stopped, reading, or holding the store or nothing, it is replaced."""
    stopped.expected_log.append(STANDSTILL)
    stopped.start("allow_other,workers=2")
    chance = random.Random(5)
    with load(stopped) as running:
        repeat(running, 2.0, lambda: kill_one(stopped, chance, signal.SIGSTOP))


def test_ten_upgrades_under_load(mounted: Mounted) -> None:
    mounted.expected_log += TAKEN_OVER
    with load(mounted) as running, open(mounted.point / "open", "w+b") as file:
        for number in range(10):
            file.write(b"%d" % number)
            file.flush()
            imgfs("upgrade", mounted.point)
            assert not running.has_failed()
        file.seek(0)
        assert file.read() == b"0123456789"
    assert len(re.findall(TAKEN_OVER[2], mounted.log.read_text())) == 10
    mounted.stop()


# -- inside a change --------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path, str], object]] = {
    "create": lambda root, name: os.close(os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)),
    "write": lambda root, name: (root / name).write_bytes(b"x" * 5000),
    "overwrite": lambda root, name: (root / "image").write_bytes(name.encode() * 1000),
    "append": lambda root, name: _append(root / name),
    "mkdir": lambda root, name: (root / name).mkdir(),
    "rmdir": lambda root, name: (root / f"empty{name}").rmdir(),
    "unlink": lambda root, name: (root / f"old{name}").unlink(),
    "rename": lambda root, name: (root / f"old{name}").rename(root / name),
    "replace": lambda root, name: (root / f"old{name}").rename(root / "image"),
    "symlink": lambda root, name: os.symlink("target", root / name),
    "link": lambda root, name: os.link(root / "image", root / name),
    "mknod": lambda root, name: os.mknod(root / name, stat.S_IFIFO | 0o600),
    "chmod": lambda root, name: (root / "image").chmod(0o640),
    "truncate": lambda root, name: os.truncate(root / "image", 7),
    "setxattr": lambda root, name: os.setxattr(root / "image", f"user.{name}", b"value"),
    "create xattr": lambda root, name: os.setxattr(root / "image", f"user.{name}", b"value", os.XATTR_CREATE),
    "removexattr": lambda root, name: os.removexattr(root / "image", f"user.old{name}"),
}
STEPS_MAX = 60


def _append(path: Path) -> None:
    with open(path, "xb", buffering=0) as file:
        file.writelines(b"y" * 1000 for _ in range(3))


@pytest.mark.parametrize("name", CHANGES)
def test_a_worker_dies_at_each_step_of_a_change(stopped: Mounted, tmp_path: Path, name: str) -> None:
    """Every change happens exactly once: done twice it would fail, not done at all it would be missed below."""
    marker = tmp_path / "step"
    stopped.start("allow_other,workers=2,xattr", fault=("die-at-step", str(marker)))
    root = stopped.point
    steps = 0
    while not (tmp_path / "step.survived").exists():
        case = f"n{steps}"
        _prepare(root, name, case)
        before = set(os.listdir(root))
        armed = tmp_path / "armed"
        armed.write_text(f"{steps}")
        armed.rename(marker)
        CHANGES[name](root, case)
        _check_changed(root, name, case, before)
        steps += 1
        assert steps < STEPS_MAX
        marker.unlink(missing_ok=True)
    assert steps > 2
    after = {path.name: path.lstat() for path in root.iterdir()}
    stopped.stop()
    stopped.start("allow_other,xattr")
    assert {path.name: (path.lstat().st_mode, path.lstat().st_size) for path in root.iterdir()} == {
        name: (status.st_mode, status.st_size) for name, status in after.items()
    }


def _prepare(root: Path, change: str, name: str) -> None:
    (root / "image").write_bytes(b"image" * 100)
    if change in ("unlink", "rename", "replace"):
        (root / f"old{name}").write_bytes(f"{name}".encode())
    elif change == "rmdir":
        (root / f"empty{name}").mkdir()
    elif change == "removexattr":
        os.setxattr(root / "image", f"user.old{name}", b"x")


def _check_changed(root: Path, change: str, name: str, before: set[str]) -> None:
    now = set(os.listdir(root))
    image = (root / "image").read_bytes()
    new = root / name
    match change:
        case "unlink" | "rmdir" | "replace":
            assert len(before - now) == 1
        case "rename":
            assert (now - before, before - now) == ({name}, {f"old{name}"})
        case "overwrite" | "chmod" | "truncate" | "setxattr" | "create xattr" | "removexattr":
            assert now == before
        case _:
            assert (now - before, before - now) == ({name}, set())
    match change:
        case "write":
            assert new.read_bytes() == b"x" * 5000
        case "append":
            assert new.read_bytes() == b"y" * 3000
        case "overwrite":
            assert image == name.encode() * 1000
        case "rename":
            assert new.read_bytes() == name.encode()
        case "replace":
            assert image == name.encode()
        case "link":
            assert new.stat().st_ino == (root / "image").stat().st_ino
        case "chmod":
            assert stat.S_IMODE((root / "image").stat().st_mode) == 0o640
        case "truncate":
            assert image == (b"image" * 2)[:7]
        case "setxattr" | "create xattr":
            assert os.getxattr(root / "image", f"user.{name}") == b"value"
        case "removexattr":
            assert f"user.old{name}" not in os.listxattr(root / "image")


# -- what cannot be helped --------------------------------------------------------------------------------------------


def test_a_request_that_kills_every_worker_is_answered_eio(stopped: Mounted) -> None:
    stopped.expected_log.append(r"workers died with the same request in hand, .*: LOOKUP at inode 1 of thread \d+")
    stopped.start(fault=("die-at-name", "poison"))
    (stopped.point / "image").write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            os.stat(stopped.point / "poison")
    assert (stopped.point / "image").read_bytes() == b"x"
    assert stopped.log.read_text().count("died of SIGSEGV, with in hand: LOOKUP at inode 1") == 4


def test_a_crash_loop_ends_with_a_clear_message(stopped: Mounted) -> None:
    stopped.expected_log.append(r"5 workers in a row died before they had answered a single request; .*")
    stopped.start("workers=1", fault=("die-at-start", ""), answers=False)
    stopped.wait_for_end(EXIT_MOUNT)
    assert mountpoint.find(str(stopped.point)) is None
    assert owner(str(stopped.store)) is None
    assert stopped.log.read_text().count("worker 0 (process") == 5


def test_a_worker_that_hangs_while_it_reads_is_interrupted(stopped: Mounted, tmp_path: Path) -> None:
    stopped.expected_log.append(STANDSTILL)
    marker = tmp_path / "marker"
    stopped.start("workers=2", fault=("hang-in-a-read", str(marker)))
    pids = stopped.children("worker")
    marker.touch()
    for number in range(20):
        (stopped.point / f"{number}").write_bytes(b"x")
    assert not marker.exists(), "the others went on without it"
    wait_until(lambda: "it is interrupted" in stopped.log.read_text(), "it is interrupted")
    assert stopped.children("worker") == pids


@pytest.mark.parametrize("in_a_look", [False, True])
def test_workers_are_not_blamed_for_a_time_when_all_of_the_daemon_was_frozen(
    stopped: Mounted, tmp_path: Path, in_a_look: bool
) -> None:
    marker = tmp_path / "marker"
    stopped.start("workers=2", fault=("frozen-in-a-look", str(marker)))
    assert stopped.process is not None
    pids = stopped.children("worker")
    # The supervisor first: it would put others in the place of workers that stand still.
    processes = [stopped.process.pid, *stopped.children()]
    if in_a_look:
        marker.touch()
        wait_until(lambda: is_stopped(processes[0]), "all are stopped")
    else:
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(processes[0], signal.SIGCONT)
    time.sleep(0.6)  # it looks before they have a turn, more than once
    for pid in processes[1:]:
        os.kill(pid, signal.SIGCONT)
    for number in range(20):
        (stopped.point / f"{number}").write_bytes(b"x")
    assert stopped.children("worker") == pids


def test_what_was_read_and_not_noted_is_not_done_later_than_what_was_sent_again(
    stopped: Mounted, tmp_path: Path
) -> None:
    marker, hanging = tmp_path / "marker", tmp_path / "marker.pid"
    stopped.expected_log.append(STANDSTILL)
    stopped.start("workers=2", fault=("hang-behind-a-read", str(marker)))
    image = stopped.point / "image"
    image.write_bytes(b"old")
    marker.touch()
    removing = threading.Thread(target=image.unlink)
    removing.start()
    wait_until(lambda: hanging.exists() and hanging.read_text() != "", "one has read it and hangs")
    one = int(hanging.read_text())
    (other,) = set(stopped.children("worker")) - {one}
    os.kill(other, signal.SIGKILL)
    removing.join(30)
    image.write_bytes(b"new")
    wait_until(lambda: one not in stopped.children("worker"), "who did not note it was not left to go on")
    assert image.read_bytes() == b"new"


def test_a_worker_that_hangs_in_a_request_does_not_hold_up_the_others(stopped: Mounted, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    stopped.start("workers=2,timeout=0", fault=("hang-at-name", f"{marker}:hang"))
    (stopped.point / "hang").write_bytes(b"x")
    marker.touch()
    seen: list[bytes] = []
    asking = threading.Thread(target=lambda: seen.append((stopped.point / "hang").read_bytes()))
    asking.start()
    wait_until(lambda: not marker.exists(), "one worker hangs")
    for number in range(20):
        (stopped.point / f"{number}").write_bytes(b"x")
    assert seen == []
    # Whichever dies: what the other one holds is sent again after a moment, and answered.
    os.kill(stopped.children("worker")[0], signal.SIGKILL)
    asking.join(30)
    assert seen == [b"x"]


def test_without_resend_only_the_requests_of_the_dead_worker_fail(stopped: Mounted, tmp_path: Path) -> None:
    stopped.start("workers=2", fault=("never-resent", ""))
    (stopped.point / "image").write_bytes(b"x")
    with open(stopped.point / "open", "wb", buffering=0) as file:
        for _ in range(5):
            for pid in stopped.children("worker"):
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda pid=pid: pid not in stopped.children("worker"), "it is dead")  # type: ignore[misc]
            assert (stopped.point / "image").read_bytes() == b"x"
            file.write(b"y")
    assert (stopped.point / "open").read_bytes() == b"yyyyy"


def test_workers_die_with_their_supervisor_and_the_mount_comes_back_at_once(mounted: Mounted) -> None:
    (mounted.point / "image").write_bytes(b"x")
    for _ in range(3):
        mounted.kill()
        mounted.start()
        assert (mounted.point / "image").read_bytes() == b"x"


# -- an upgrade -------------------------------------------------------------------------------------------------------


@pytest.fixture
def release(stopped: Mounted, tmp_path: Path) -> Path:
    """A mount served by a release that is installed in a directory of its own, where it can be changed."""
    shutil.copytree(PROJECT / "imgfs", tmp_path / "imgfs", ignore=shutil.ignore_patterns("__pycache__"))
    stopped.start(environment={"PYTHONPATH": str(tmp_path)})
    return tmp_path / "imgfs"


def _change(module: Path, old: str, new: str) -> None:
    text = module.read_text()
    assert old in text
    module.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("module", "old", "new", "reason"),
    [
        ("layout.py", "LAYOUT_VERSION = ", "LAYOUT_VERSION = 1000 + ", "the table in memory has layout"),
        ("handover.py", "VERSION = 1", "VERSION = 2", "hands over by version 1, this one takes 2"),
        ("worker.py", "import pyfuse3", "import pyfuse3, not_there", "No module named 'not_there'"),
        ("fs.py", "supports_dot_lookup = True", "supports_dot_lookup = False", "promise the kernel something else"),
    ],
)
def test_a_release_that_cannot_take_over_is_found_out(
    stopped: Mounted, release: Path, module: str, old: str, new: str, reason: str
) -> None:
    stopped.expected_log += [TAKEN_OVER[0], r"the old release goes on, the installed one cannot take over: .*"]
    (stopped.point / "image").write_bytes(b"x")
    pids = stopped.children("worker")
    _change(release / module, old, new)
    said = imgfs("upgrade", stopped.point, code=EXIT_MOUNT)
    assert "is served by the old release" in said
    assert reason in said
    assert reason in stopped.log.read_text()
    assert stopped.children("worker") == pids
    assert (stopped.point / "image").read_bytes() == b"x"


def test_a_new_release_serves_what_was_open(stopped: Mounted, release: Path) -> None:
    stopped.expected_log += [*TAKEN_OVER, r"the new one is here"]
    gone = open(stopped.point / "gone", "w+b", buffering=0)  # noqa: SIM115
    with gone, open(stopped.point / "image", "wb", buffering=0) as file:
        gone.write(b"unlinked")
        (stopped.point / "gone").unlink()
        file.write(b"before ")
        _change(
            release / "maintenance.py",
            "    store.after_fork()\n",
            '    log.info("the new one is here")\n    store.after_fork()\n',
        )
        assert imgfs("upgrade", stopped.point) == f"{stopped.point} is served by the installed release\n"
        file.write(b"after")
        gone.seek(0)
        assert gone.read() == b"unlinked"
    assert (stopped.point / "image").read_bytes() == b"before after"
    wait_until(lambda: "the new one is here" in stopped.log.read_text(), "it is the new one")


def test_the_upgrade_of_a_mount_in_the_background(stopped: Mounted, tmp_path: Path) -> None:
    log = tmp_path / "log"
    imgfs("mount", "--daemon", "-o", f"log={log}", stopped.store, stopped.point)
    daemon = owner(str(stopped.store))
    imgfs("upgrade", stopped.point)
    assert owner(str(stopped.store)) == daemon
    assert f"imgfs[{daemon}]: taken over in" in log.read_text()
    (stopped.point / "image").write_bytes(b"x")
    imgfs("umount", stopped.point)
    assert owner(str(stopped.store)) is None
    imgfs("mount", "--daemon", "-o", f"ro,log={log}", stopped.store, stopped.point)
    imgfs("upgrade", stopped.point)
    assert (stopped.point / "image").read_bytes() == b"x"
    imgfs("umount", stopped.point)


def test_upgrade_where_nothing_is_mounted(stopped: Mounted) -> None:
    assert "no store is mounted" in imgfs("upgrade", stopped.point, code=EXIT_MOUNT)


# -- what it says -----------------------------------------------------------------------------------------------------


def test_sigusr1_shows_what_every_process_does(mounted: Mounted) -> None:
    mounted.expected_log += [
        r"worker \d+ \(process \d+\): \d+ answered, with nothing in hand",
        r"maintenance .*",
        r"  .*",
    ]
    assert mounted.process is not None
    mounted.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: "maintenance.py" in mounted.log.read_text(), "the last stack is shown")
    text = mounted.log.read_text()
    assert re.search(r"worker 0 \(process \d+\): \d+ answered", text)
    assert "worker.py" in text


def test_the_grace_is_an_option(stopped: Mounted) -> None:
    stopped.expected_log += [r".* is in use; its users have 0.1 s to finish", r"somebody still uses .*"]
    stopped.start("grace=0.1")
    (stopped.point / "image").write_bytes(b"x")
    reading = os.open(stopped.point / "image", os.O_RDONLY)
    stopped.terminate()
    with pytest.raises(OSError, match="not connected"):
        os.fsync(reading)
    os.close(reading)
    assert mountpoint.find(str(stopped.point)) is None


def test_lines_for_the_journal_have_priorities(stopped: Mounted) -> None:
    stopped.log.touch()
    status = stopped.log.stat()
    stopped.start(environment={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    kill_one(stopped, random.Random(1))
    wait_until(lambda: "replaced" in stopped.log.read_text(), "the worker is replaced")
    stopped.stop()
    lines = stopped.log.read_text().splitlines()
    stopped.log.unlink()
    assert lines[0] == f"<6>mounted at {stopped.point}"
    assert re.fullmatch(r"<3>worker \d+ \(process \d+\) died of SIGKILL, with .*", lines[1])
