"""The mount process: opens the store, mounts it, serves it until it is unmounted or told to stop, closes it.

Owns the order of these steps, the signals, what is logged and where, and the life in the background. Must not
know requests, nor how images are kept.

*Concurrency:* all that forks is done before the store is open and before trio runs. Calls that the kernel turns
into requests to this very process (umount, statvfs of the mountpoint) are made in threads, so that the loop can
answer them.
"""

import contextlib
import functools
import json
import logging
import logging.handlers
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NoReturn

import pyfuse3
import sdnotify
import trio

from imgfs import errors, mountpoint
from imgfs.errors import EXIT_FAILURE, EXIT_OK, Busy, ImgfsError, MountFailed
from imgfs.fs import Filesystem
from imgfs.options import MountOptions
from imgfs.settings import Settings
from imgfs.store import Store

log = logging.getLogger(__name__)

DEVICE = "/dev/fuse"
FUSE_CONF = "/etc/fuse.conf"
SYSTEM_LOG = "/dev/log"

# The writer knows of every change; a reader beside another writer does not.
TIMEOUT_S = 86_400.0
READER_TIMEOUT_S = 1.0
# A mount that does not answer its own process for so long never will.
FIRST_ANSWER_S = 30.0
# Who still uses a mount that was told to stop gets so long to finish.
GRACE_S = 5.0
# `umount` of the system returns before the daemon has closed the store; a `mount` right behind it waits.
CLOSING_S = 10.0
CLOSING_POLL_S = 0.05
# Damaged places that are named one by one at the start.
DAMAGE_NAMED = 100


def mount(store_path: str, mountpoint_path: str, options: MountOptions, *, daemon: bool) -> int:
    """Serve the store at *store_path* until it is unmounted; return the exit code.

    With *daemon* return as soon as the mount answers, and serve it from a process in the background.

    Raises:
        ImgfsError: there is nothing mounted; in the background too, as long as this process waits for it.
    """
    serve = functools.partial(_serve, os.path.abspath(store_path), os.path.abspath(mountpoint_path), options)
    if daemon:
        return _in_background(serve, options.log and os.path.abspath(options.log))
    _log_to(logging.StreamHandler(), "imgfs: %(message)s")
    serve(lambda: None)
    return EXIT_OK


def _serve(store_path: str, mountpoint_path: str, options: MountOptions, ready: Callable[[], None]) -> None:
    """Do all of it, in order; *ready* is called when the mount answers."""
    _check_fuse(options)
    path = mountpoint.prepare(mountpoint_path, store_path)
    _raise_file_limit()
    with _open(store_path, options) as store:
        _log_recovery(store)
        try:
            trio.run(_mounted, store, path, options, ready)
        except BaseExceptionGroup as group:
            raise _only(group) from None


async def _mounted(store: Store, path: str, options: MountOptions, ready: Callable[[], None]) -> None:
    timeout_s = options.timeout_s
    if timeout_s is None:
        timeout_s = TIMEOUT_S if options.writable else READER_TIMEOUT_S
    sync_interval_s = options.sync_interval_s or Settings().sync_interval_s
    filesystem = Filesystem(
        store, timeout_s=timeout_s, xattrs=options.xattrs, publish_at_close=options.publish_at_close
    )
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals, _fuse(filesystem, store, path, options):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_announce, path, options, ready)
            nursery.start_soon(_stop_at_signal, signals, path)
            if options.writable:
                nursery.start_soon(_sync_regularly, filesystem, sync_interval_s)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
    sdnotify.SystemdNotifier().notify("STOPPING=1")


@contextlib.contextmanager
def _fuse(filesystem: Filesystem, store: Store, path: str, options: MountOptions) -> Iterator[None]:
    """Mount at *path*, and see to it that nothing of the mount is left."""
    said: list[str] = []
    try:
        with _stderr_into(said):
            pyfuse3.init(filesystem, path, _fuse_options(store, options))
    except RuntimeError as error:
        raise MountFailed(f"cannot mount at {path}: {' '.join(said) or error}") from None
    ours = None
    try:
        ours = mountpoint.find(path)
        yield
    finally:
        # The descriptor is closed first: pages that a mapping left dirty would wait for an answer in umount.
        pyfuse3.close(unmount=False)
        if ours is not None and mountpoint.find(path) == ours:
            mountpoint.take_away(path, lazy=True)


class _Option(str):
    """A mount option in the bytes of the file system, where pyfuse3 would insist on ASCII."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


def _fuse_options(store: Store, options: MountOptions) -> set[str]:
    # libfuse takes a comma for the end of an option unless a backslash is before it.
    source = os.path.abspath(store.path).replace("\\", "\\\\").replace(",", "\\,")
    chosen = {_Option(f"fsname={source}"), "subtype=imgfs", "default_permissions", *options.kernel}
    if options.allow_other:
        chosen.add("allow_other")
    if not options.writable:
        chosen.add("ro")
    return chosen


async def _announce(path: str, options: MountOptions, ready: Callable[[], None]) -> None:
    """Wait until the mount answers, then tell who waits for it."""

    def ask() -> None:
        os.statvfs(path)
        mountpoint.set_read_ahead(path, options.read_ahead_kib)

    try:
        with trio.fail_after(FIRST_ANSWER_S):
            await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
    except (OSError, trio.TooSlowError) as error:
        raise MountFailed(f"the mount at {path} does not answer: {error or 'no reason given'}") from None
    log.info("mounted at %s", path)
    ready()
    sdnotify.SystemdNotifier().notify("READY=1")


async def _sync_regularly(filesystem: Filesystem, interval_s: float) -> None:
    told = ""
    while True:
        await trio.sleep(interval_s)
        try:
            await filesystem.sync()
        except (ImgfsError, OSError) as error:
            # It will not get better by itself; every interval the same line would only hide the others.
            if str(error) != told:
                told = str(error)
                log.error("sync: %s", told)


async def _stop_at_signal(signals: AsyncIterator[int], path: str) -> None:
    """Unmount at the first signal; at the second, or when that takes too long, stop to serve."""
    async with trio.open_nursery() as nursery:
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            if nursery.child_tasks:
                pyfuse3.terminate()
            else:
                sdnotify.SystemdNotifier().notify("STOPPING=1")
                nursery.start_soon(_stop, path)


async def _stop(path: str) -> None:
    try:
        await trio.to_thread.run_sync(mountpoint.take_away, path)
        # The kernel ends the session when all is answered. If not, a container has a copy of the mount.
    except Busy:
        log.warning("%s is in use; its users have %g s to finish", path, GRACE_S)
        await trio.to_thread.run_sync(functools.partial(mountpoint.take_away, path, lazy=True))
    except ImgfsError as error:
        log.warning("%s", error)
    await trio.sleep(GRACE_S)
    log.warning("somebody still uses what was mounted at %s; stopping all the same", path)
    pyfuse3.terminate()


# -- before the mount -------------------------------------------------------------------------------------------------


def _check_fuse(options: MountOptions) -> None:
    """Say what stands in the way of any mount, before anything is touched."""
    if not os.path.exists(DEVICE):
        raise MountFailed(
            f"{DEVICE} is missing: load the module (modprobe fuse); "
            f"in a container, pass the device in (--device {DEVICE} --cap-add SYS_ADMIN)"
        )
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise MountFailed(f"no permission to open {DEVICE}: chmod 666 {DEVICE}, or mount as root")
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise MountFailed("fusermount3 is missing, which mounts for users other than root: install the package fuse3")
    if options.allow_other and not _users_may_allow_other():
        raise MountFailed(f"only root may use allow_other; to let others, add the line user_allow_other to {FUSE_CONF}")


def _users_may_allow_other() -> bool:
    try:
        with open(FUSE_CONF, encoding="utf-8", errors="replace") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except OSError:
        return False


def _raise_file_limit() -> None:
    """Take as many descriptors as the system allows: volumes and staging files are kept open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open(store_path: str, options: MountOptions) -> Store:
    """Open the store; if its last daemon has left the mount table but is still closing it, wait for that."""
    deadline = time.monotonic() + CLOSING_S
    while True:
        try:
            return Store.open(store_path, writable=options.writable)
        except Busy:
            if time.monotonic() > deadline or any(mount.source == store_path for mount in mountpoint.mounts()):
                raise
        time.sleep(CLOSING_POLL_S)


def _log_recovery(store: Store) -> None:
    report = store.report
    if report.torn_bytes:
        log.warning(
            "the last run was cut off: %d needles (%d bytes) were torn and are left out",
            report.torn_needles,
            report.torn_bytes,
        )
    for name in report.rebuilt:
        log.warning("rebuilt %s from its volume", name)
    for damage in report.damage[:DAMAGE_NAMED]:
        log.error("damage: %s", damage)
    if len(report.damage) > DAMAGE_NAMED:
        log.error("damage: %d more places; imgfs check names them all", len(report.damage) - DAMAGE_NAMED)


@contextlib.contextmanager
def _stderr_into(said: list[str]) -> Iterator[None]:
    """Collect the lines that libfuse or fusermount3 write to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    collected = os.memfd_create("imgfs-stderr")
    try:
        os.dup2(collected, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.lseek(collected, 0, os.SEEK_SET)
            said += os.read(collected, 65536).decode(errors="replace").splitlines()
    finally:
        os.close(collected)
        os.close(kept)


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one exception that trio has wrapped in *group*, or *group* if there are several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) > 1:
            return group
        error = error.exceptions[0]
    return error


# -- in the background ------------------------------------------------------------------------------------------------


def _in_background(serve: Callable[[Callable[[], None]], None], log_path: str | None) -> int:
    """Run *serve* in a daemon; return when it calls what it is given, raise what it raises before."""
    outcome, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(outcome)
        os.setsid()
        if os.fork() == 0:
            _be_daemon(serve, log_path, report)
        os._exit(EXIT_OK)
    os.close(report)
    os.waitpid(child, 0)
    with open(outcome, "rb") as pipe:
        said = pipe.read()
    if not said:
        raise MountFailed("the daemon died before the mount answered; its log may tell why")
    error = json.loads(said)
    if error is None:
        return EXIT_OK
    raise getattr(errors, error["name"])(error["text"])


def _be_daemon(serve: Callable[[Callable[[], None]], None], log_path: str | None, report: int) -> NoReturn:
    code = EXIT_FAILURE

    def tell(error: dict[str, str] | None) -> None:
        nonlocal report
        if report >= 0:
            with contextlib.suppress(BrokenPipeError):  # nobody waits any more
                os.write(report, json.dumps(error).encode())
            os.close(report)
            report = -1

    try:
        os.chdir("/")
        _leave_terminal(log_path)
        serve(lambda: tell(None))
        code = EXIT_OK
    except ImgfsError as error:
        code = error.exit_code
        log.error("%s", error)
        tell({"name": type(error).__name__, "text": str(error)})
    except BaseException as error:
        log.exception("the daemon ends")
        tell({"name": "MountFailed", "text": f"the daemon failed, which is a bug: {error!r}"})
    finally:
        logging.shutdown()
        os._exit(code)


def _leave_terminal(log_path: str | None) -> None:
    """Give up the standard files; log to *log_path*, or else to the system log if there is one."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    if log_path is not None:
        try:
            with open(log_path, "ab") as file:
                os.dup2(file.fileno(), 2)  # for what Python itself says when it crashes
        except OSError as error:
            raise MountFailed(f"cannot write the log {log_path}: {error.strerror}") from None
        _log_to(logging.handlers.WatchedFileHandler(log_path), "%(asctime)s imgfs[%(process)d]: %(message)s")
    elif os.path.exists(SYSTEM_LOG):
        handler = logging.handlers.SysLogHandler(SYSTEM_LOG, logging.handlers.SysLogHandler.LOG_DAEMON)
        _log_to(handler, "imgfs[%(process)d]: %(message)s")
    else:
        _log_to(logging.NullHandler(), "%(message)s")


def _log_to(handler: logging.Handler, form: str) -> None:
    handler.setFormatter(logging.Formatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
