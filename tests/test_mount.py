"""The life of a mount: it begins, is refused, ends, dies and comes back; and what it tells those around it."""

import errno
import os
import pwd
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounted import PROJECT, Mounted, as_user, failure, imgfs, run, wait_until

from imgfs import mountpoint
from imgfs.errors import EXIT_BUSY, EXIT_MOUNT, EXIT_NO_STORE, EXIT_USAGE, MountFailed
from imgfs.mount import default_workers, mount
from imgfs.opening import owner
from imgfs.options import parse

pytestmark = [pytest.mark.mount, pytest.mark.root]

HELPER = Path("/sbin/mount.fuse.imgfs")
# fusermount3 wants users to have a name.
UID, GID = pwd.getpwnam("nobody")[2:4]


def _mount_line(mounted: Mounted) -> str:
    return run("findmnt", "--noheadings", "--raw", "--output", "FSTYPE,SOURCE,OPTIONS", mounted.point)


# -- it begins --------------------------------------------------------------------------------------------------------


def test_the_mount_table_names_store_and_type(mounted: Mounted) -> None:
    fstype, source, options = _mount_line(mounted).split()
    assert (fstype, source) == ("fuse.imgfs", str(mounted.store))
    assert {"rw", "nosuid", "nodev", "default_permissions", "allow_other"} <= set(options.split(","))


@pytest.mark.parametrize(("processors", "workers"), [(None, 1), (1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (64, 4)])
def test_half_of_the_processors_are_left_to_who_asks(
    monkeypatch: pytest.MonkeyPatch, processors: int | None, workers: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert default_workers() == workers


def test_options_reach_the_kernel(stopped: Mounted) -> None:
    stopped.start("noexec,suid,noatime,x-systemd.automount,_netdev")
    options = set(_mount_line(stopped).split()[2].split(","))
    assert "noexec" in options
    assert not {"nosuid", "allow_other"} & options


def test_the_kernel_reads_ahead_in_large_requests(stopped: Mounted) -> None:
    stopped.start("read_ahead=512")
    device = os.stat(stopped.point).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert setting.read_text() == "512\n"


def test_a_store_with_any_name_can_be_mounted(stopped: Mounted) -> None:
    odd = stopped.store.with_name("a, b\\c ä=1\n")
    stopped.store.rename(odd)
    try:
        stopped.start(store=odd)
        mount = mountpoint.find(str(stopped.point))
        assert mount is not None
        assert mount.source == str(odd)
        (stopped.point / "image").touch()
        stopped.stop()
        assert owner(str(odd)) is None
    finally:
        odd.rename(stopped.store)


def test_mount_and_umount_of_the_system(stopped: Mounted, mount_helper: None) -> None:
    run("mount", "-t", "fuse.imgfs", "-o", "allow_other,noatime,nofail", stopped.store, stopped.point)
    daemon = owner(str(stopped.store))
    assert daemon
    (stopped.point / "image").write_bytes(b"x")
    assert "allow_other" in _mount_line(stopped)
    # Nobody waits in between for the daemon to close the store.
    run("umount", stopped.point)
    run("mount", "-t", "fuse.imgfs", stopped.store, stopped.point)
    assert (stopped.point / "image").read_bytes() == b"x"
    imgfs("umount", stopped.point)
    run("mount", "-t", "fuse.imgfs", "-o", "ro", stopped.store, stopped.point)
    assert (stopped.point / "image").read_bytes() == b"x"
    imgfs("umount", stopped.point)


@pytest.fixture
def mount_helper() -> Iterator[None]:
    """The helper of mount(8), at the only place where that looks for it."""
    if HELPER.exists():
        yield
        return
    HELPER.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={PROJECT}\nexport IMGFS='{sys.executable} -m imgfs'\n"
        f'exec {PROJECT}/systemd/mount.fuse.imgfs "$@"\n'
    )
    HELPER.chmod(0o755)
    try:
        yield
    finally:
        HELPER.unlink()


@pytest.fixture
def fuse_for_all() -> Iterator[None]:
    """Let everybody open the device, as Debian does; some containers keep it for root."""
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", mode)


@pytest.mark.usefixtures("fuse_for_all")
def test_others_than_root_mount_with_fusermount3(stopped: Mounted) -> None:
    store, point = str(stopped.store), str(stopped.point)
    for path in [stopped.point, stopped.store, *stopped.store.rglob("*")]:
        os.chown(path, UID, GID)
    log = stopped.point.with_suffix(".daemon-log")
    log.touch()
    os.chown(log, UID, GID)
    options = parse([f"log={log}"])
    # Children of this process: another user may not be able to start the interpreter.
    as_user(UID, GID, lambda: mount(store, point, options, daemon=True))
    as_user(UID, GID, lambda: os.listdir(point))
    assert failure(os.listdir, point) == "EACCES"  # even for root
    daemon = owner(store)
    assert daemon
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: owner(store) is None, "the daemon is dead")
    as_user(UID, GID, lambda: mount(store, point, options, daemon=True))
    as_user(UID, GID, lambda: os.listdir(point))
    as_user(UID, GID, lambda: mountpoint.unmount(point))
    assert (owner(store), mountpoint.find(point)) == (None, None)
    assert "clearing its stale mount" in log.read_text()
    log.unlink()


# -- it is refused ----------------------------------------------------------------------------------------------------


def test_a_second_daemon_is_refused_and_told_the_pid_of_the_first(mounted: Mounted, site: Path) -> None:
    other = site / "other"
    other.mkdir()
    try:
        assert mounted.process is not None
        said = imgfs("mount", mounted.store, other, code=EXIT_BUSY)
        assert str(mounted.process.pid) in said
        assert said.count("\n") == 1
        said = imgfs("mount", "--daemon", mounted.store, other, code=EXIT_BUSY)
        assert str(mounted.process.pid) in said
        assert said.count("\n") == 1
    finally:
        other.rmdir()


def test_where_nothing_can_be_mounted(stopped: Mounted, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "inside").mkdir()
    for arguments, code, text in [
        ((stopped.store, tmp_path / "missing"), EXIT_MOUNT, "does not exist; make it first: mkdir -p"),
        ((stopped.store, tmp_path / "file"), EXIT_MOUNT, "is not a directory"),
        ((stopped.store, stopped.store.parent), EXIT_MOUNT, "which would hide it"),
        ((stopped.store, stopped.store), EXIT_MOUNT, "which would hide it"),
        ((stopped.store, stopped.store / "volumes"), EXIT_MOUNT, "lies inside the store"),
        ((tmp_path / "inside", stopped.point), EXIT_NO_STORE, "no store"),
        (("-o", "allow_othr", stopped.store, stopped.point), EXIT_USAGE, "did you mean allow_other?"),
    ]:
        for daemon in ([], ["--daemon"]):
            said = imgfs("mount", *daemon, *arguments, code=code)
            assert text in said
            assert re.fullmatch(r"imgfs: .*\n", said)
    assert mountpoint.find(str(stopped.point)) is None
    assert owner(str(stopped.store)) is None


def test_a_mountpoint_is_not_covered_twice(mounted: Mounted) -> None:
    said = imgfs("mount", mounted.store, mounted.point, code=EXIT_BUSY)
    assert f"unmount it first: imgfs umount {mounted.point}" in said


def test_a_log_that_cannot_be_written_is_noticed_at_once(stopped: Mounted) -> None:
    said = imgfs("mount", "--daemon", "-o", "log=/nonexistent/log", stopped.store, stopped.point, code=EXIT_MOUNT)
    assert "cannot write the log /nonexistent/log" in said


def test_a_mount_that_fails_halfway_leaves_nothing(stopped: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken on purpose")

    monkeypatch.setattr(mountpoint, "set_read_ahead", fail)
    with pytest.raises(MountFailed, match="broken on purpose"):
        mount(str(stopped.store), str(stopped.point), parse([]), daemon=True)
    wait_until(lambda: owner(str(stopped.store)) is None, "the daemon has ended")
    assert mountpoint.find(str(stopped.point)) is None


def test_umount_of_what_is_not_ours(stopped: Mounted) -> None:
    assert "nothing is mounted" in imgfs("umount", stopped.point, code=EXIT_MOUNT)
    assert "is xfs, not imgfs" in imgfs("umount", stopped.store.parent, code=EXIT_MOUNT)


# -- read-only --------------------------------------------------------------------------------------------------------


def test_a_read_only_mount_refuses_every_change(mounted: Mounted) -> None:
    root = mounted.point
    (root / "image").write_bytes(b"x")
    mounted.stop()
    mounted.start("ro")
    assert (root / "image").read_bytes() == b"x"
    for change in (
        lambda: (root / "image").write_bytes(b"y"),
        lambda: (root / "new").touch(),
        lambda: (root / "image").unlink(),
        lambda: (root / "image").chmod(0o600),
        lambda: (root / "new").mkdir(),
        lambda: os.utime(root / "image"),
    ):
        with pytest.raises(OSError, match="Read-only"):
            change()
    mounted.stop()
    mounted.start()
    assert (root / "image").read_bytes() == b"x"


def test_a_reader_beside_the_writer(mounted: Mounted, site: Path) -> None:
    (mounted.point / "image").write_bytes(b"x")
    reader = Mounted(mounted.store, site / "reader")
    reader.point.mkdir()
    try:
        reader.start("ro")
        assert (reader.point / "image").read_bytes() == b"x"
        (mounted.point / "image").write_bytes(b"y")
        reader.stop()
        reader.start("ro")
        assert (reader.point / "image").read_bytes() == b"y"
    finally:
        reader.tear_down()


# -- it ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(mounted: Mounted, number: int) -> None:
    (mounted.point / "image").write_bytes(b"x")
    mounted.terminate(number)
    assert mountpoint.find(str(mounted.point)) is None
    mounted.start()
    assert (mounted.point / "image").read_bytes() == b"x"


def test_a_mount_in_use_is_not_unmounted(mounted: Mounted) -> None:
    (mounted.point / "image").write_bytes(b"x")
    with open(mounted.point / "image", "rb") as file:
        said = imgfs("umount", mounted.point, code=EXIT_BUSY)
        assert "is in use" in said
        imgfs("umount", "--lazy", mounted.point)
        assert mountpoint.find(str(mounted.point)) is None
        assert file.read() == b"x"
    mounted.wait_for_end()


def test_a_signal_stops_it_although_it_is_in_use(mounted: Mounted) -> None:
    (mounted.point / "image").write_bytes(b"x")
    mounted.expected_log.append(r".* is in use; its users have 5 s to finish")
    assert mounted.process is not None
    reading = os.open(mounted.point / "image", os.O_RDONLY)
    mounted.process.send_signal(signal.SIGTERM)
    wait_until(lambda: mountpoint.find(str(mounted.point)) is None, "it is gone from the tree")
    assert os.read(reading, 10) == b"x"
    mounted.terminate()  # at the second signal it does not wait
    with pytest.raises(OSError, match="not connected"):
        os.fsync(reading)
    os.close(reading)
    mounted.start()
    assert (mounted.point / "image").read_bytes() == b"x"


def test_who_finishes_in_time_is_served_to_the_end(mounted: Mounted) -> None:
    mounted.expected_log.append(r".* is in use; its users have 5 s to finish")
    assert mounted.process is not None
    with open(mounted.point / "image", "wb", buffering=0) as file:
        mounted.process.send_signal(signal.SIGTERM)
        wait_until(lambda: mountpoint.find(str(mounted.point)) is None, "it is gone from the tree")
        file.write(b"to the end")
    mounted.wait_for_end()
    mounted.start()
    assert (mounted.point / "image").read_bytes() == b"to the end"


# In a mount namespace of its own: keeps the mount at $0, and none that another test has meanwhile.
_KEEP_ONE = """
while read -r _ point type _; do
    [ "$type" != fuse.imgfs ] || [ "$point" = "$0" ] || umount -l "$point"
done </proc/self/mounts
exec sleep 60
"""


def test_a_mount_namespace_that_keeps_a_copy_is_named(mounted: Mounted) -> None:
    assert mounted.process is not None
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _KEEP_ONE, str(mounted.point)]
    with subprocess.Popen(command) as other:
        try:
            own = os.stat("/proc/self/ns/mnt")
            wait_until(lambda: os.stat(f"/proc/{other.pid}/ns/mnt") != own, "it has a namespace", process=other)
            line = Path(f"/proc/{other.pid}/cmdline")
            wait_until(lambda: line.read_bytes().startswith(b"sleep"), "it sleeps", process=other)
            said = imgfs("umount", mounted.point, code=EXIT_BUSY)
            assert f"process {other.pid} still has it in a mount namespace" in said
            assert f"process {mounted.process.pid}" in said
        finally:
            other.kill()
    mounted.wait_for_end()


def test_umount_returns_when_the_store_is_free(mounted: Mounted) -> None:
    for number in range(3):
        (mounted.point / f"{number}").write_bytes(os.urandom(1_000_000))
        mounted.stop()
        assert owner(str(mounted.store)) is None
        mounted.start()


# -- it dies ----------------------------------------------------------------------------------------------------------


def test_a_stale_mountpoint_is_recognised_and_cleared(mounted: Mounted) -> None:
    (mounted.point / "image").write_bytes(b"x")
    mounted.kill()
    with pytest.raises(OSError, match="not connected"):
        os.stat(mounted.point)
    mounted.start()
    assert (mounted.point / "image").read_bytes() == b"x"
    assert "is dead; clearing its stale mount" in mounted.log.read_text()
    mounted.kill()
    imgfs("umount", mounted.point)
    assert os.listdir(mounted.point) == []


def test_a_daemon_that_hangs_is_told_from_one_that_is_dead(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "PATIENCE_S", 0.2)
    assert mounted.process is not None
    threads = threading.active_count()
    # The supervisor first: it would put others in the place of workers that stand still.
    processes = [mounted.process.pid, *mounted.children()]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(mountpoint.Busy, match="has not answered"):
            mountpoint.prepare(str(mounted.point), str(mounted.store))
    finally:
        for pid in reversed(processes):
            os.kill(pid, signal.SIGCONT)
    # The question that was left behind uses the mount until it is answered.
    wait_until(lambda: threading.active_count() <= threads, "the daemon has answered")
    with pytest.raises(mountpoint.Busy, match="unmount it first"):
        mountpoint.prepare(str(mounted.point), str(mounted.store))


def test_a_connection_that_was_aborted_ends_the_daemon_and_the_mount(mounted: Mounted, tmp_path: Path) -> None:
    device = os.stat(mounted.point).st_dev
    run("mount", "-t", "fusectl", "none", tmp_path)
    try:
        (tmp_path / str(os.minor(device)) / "abort").write_text("1")
    finally:
        run("umount", tmp_path)
    mounted.wait_for_end()
    assert mountpoint.find(str(mounted.point)) is None


# -- in the background ------------------------------------------------------------------------------------------------


def test_in_the_background(stopped: Mounted, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert imgfs("mount", "--daemon", "-o", f"log={log}", stopped.store, stopped.point) == ""
    daemon = owner(str(stopped.store))
    assert daemon
    assert os.getsid(daemon) != os.getsid(0)
    for descriptor in range(2):
        assert os.readlink(f"/proc/{daemon}/fd/{descriptor}") == "/dev/null"
    assert os.readlink(f"/proc/{daemon}/cwd") == "/"
    (stopped.point / "image").write_bytes(b"x")
    assert f"imgfs[{daemon}]: mounted at {stopped.point}\n" in log.read_text()
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: owner(str(stopped.store)) is None, "the daemon is dead")
    imgfs("mount", "--daemon", "-o", f"log={log}", stopped.store, stopped.point)
    assert (stopped.point / "image").read_bytes() == b"x"
    imgfs("umount", stopped.point)
    assert owner(str(stopped.store)) is None


def test_the_init_system_is_told(stopped: Mounted, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        stopped.start(environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert notify.recv(100) == b"READY=1"
        assert os.path.ismount(stopped.point)
        stopped.terminate()
        assert notify.recv(100) == b"STOPPING=1"
