"""`imgfs mount`: opens the store, mounts it, has it served until it is unmounted or told to stop, closes it.

Owns the order of these steps, and what is checked before. Must not know requests, nor how images are kept.

*Concurrency:* one process, one thread, which becomes the supervisor; the workers are its children.
"""

import functools
import gc
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

from imgfs import handover, heap, logs, maintenance, mountpoint, worker
from imgfs.acts import Manner
from imgfs.background import in_background
from imgfs.board import Board
from imgfs.device import DEVICE, Device, Mounting
from imgfs.errors import EXIT_OK, Busy, MountFailed
from imgfs.handover import Handover
from imgfs.options import MountOptions
from imgfs.processors import waking_is_slow
from imgfs.store import Store
from imgfs.supervisor import Plan, Running, Supervisor

log = logging.getLogger(__name__)

FUSE_CONF = "/etc/fuse.conf"

# The writer knows of every change; a reader beside another writer does not.
TIMEOUT_S = 86_400.0
READER_TIMEOUT_S = 1.0
# More share one device and one lock than they gain.
WORKERS_DEFAULT_MAX = 4
# `umount` of the system returns before the daemon has closed the store; a `mount` right behind it waits.
CLOSING_S = 10.0
CLOSING_POLL_S = 0.05
# Damaged places that are named one by one at the start.
DAMAGE_NAMED = 100


def default_workers() -> int:
    """Return how many workers serve a mount for which nothing is said.

    One for every two processors: to ask takes a client and the kernel as long as an answer takes a worker.
    """
    return min(WORKERS_DEFAULT_MAX, max(1, (os.cpu_count() or 1) // 2))


def mount(store_path: str, mountpoint_path: str, options: MountOptions, *, daemon: bool) -> int:
    """Serve the store at *store_path* until it is unmounted; return the exit code.

    With *daemon* return as soon as the mount answers, and serve it from a process in the background.

    Raises:
        ImgfsError: there is nothing mounted; in the background too, as long as this process waits for it.
    """
    serve = functools.partial(
        _serve, os.path.abspath(store_path), os.path.abspath(mountpoint_path), options, in_background=daemon
    )
    if daemon:
        return in_background(serve, options.log and os.path.abspath(options.log))
    logs.to_stderr()
    serve(lambda: None)
    return EXIT_OK


def _serve(
    store_path: str, mountpoint_path: str, options: MountOptions, ready: Callable[[], None], *, in_background: bool
) -> None:
    """Do all of it, in order; *ready* is called when the mount answers."""
    _check_fuse(options)
    path = mountpoint.prepare(mountpoint_path, store_path)
    _raise_file_limit()
    heap.give_back()
    with _open(store_path, options) as store:
        _log_recovery(store)
        device = Device.mount(_mounting(store, path, options))
        ours = mountpoint.find(path)
        status = handover.make_status()
        served = _Served(store_path, path, options, in_background, ours.device if ours else "", status)
        _supervise(Supervisor(_plan(store, served, device, ready), device), device, served)


class _Served(NamedTuple):
    """A mount, as long as it is served, by whatever release."""

    store_path: str
    path: str
    options: MountOptions
    in_background: bool
    device_number: str
    status: int


def _supervise(supervisor: Supervisor, device: Device, served: _Served) -> None:
    """Have it served, and see to it that nothing of the mount is left."""
    # What is there now stays in memory that parent and children share: no collection touches it.
    gc.freeze()
    try:
        supervisor.run()
    finally:
        # The device is closed first: pages that a mapping left dirty would wait for an answer in umount.
        device.close()
        left = mountpoint.find(served.path)
        if left is not None and left.device == served.device_number:
            mountpoint.take_away(served.path, lazy=True)


def take_over(state: Handover) -> int:
    """Go on serving what another release has handed over; return the exit code."""
    if state.in_background:
        logs.to_background(state.options.log and os.path.abspath(state.options.log))
    else:
        logs.to_stderr()
    heap.give_back()
    device = Device(state.device, state.init)
    served = _Served(
        state.store_path, state.path, state.options, state.in_background, state.device_number, state.status
    )
    running = Running(Board(state.board), state.workers, state.maintenance)
    with Store.attach(state.store_path, state.memory, state.lock, writable=state.options.writable) as store:
        _supervise(Supervisor(_plan(store, served, device, lambda: None), device, running), device, served)
    return EXIT_OK


def try_to_take_over(state: Handover) -> None:
    """Return if this release could go on with what another one serves.

    Raises:
        ImgfsError: the reason why not.
    """
    store = Store.attach(state.store_path, state.memory, None, writable=False)
    device = Device(state.device, state.init)
    worker.try_init(worker.Common(store, device, Board(state.board), _manner(state.options)))


def _mounting(store: Store, path: str, options: MountOptions) -> Mounting:
    chosen = {"default_permissions", *options.kernel}
    if options.allow_other:
        chosen.add("allow_other")
    if not options.writable:
        chosen.add("ro")
    return Mounting(os.path.abspath(store.path), path, frozenset(chosen))


def _manner(options: MountOptions) -> Manner:
    timeout_s = options.timeout_s
    if timeout_s is None:
        # The past does not change, either.
        lasting = options.writable or options.as_of_ns is not None
        timeout_s = TIMEOUT_S if lasting else READER_TIMEOUT_S
    return Manner(timeout_s, options.xattrs, options.publish_at_close)


def _plan(store: Store, served: _Served, device: Device, ready: Callable[[], None]) -> Plan:
    options = served.options
    manner = _manner(options)
    keeps_awake = waking_is_slow() if options.awake is None else options.awake
    look_after = functools.partial(maintenance.maintain, store, maintenance.manner_of(options))

    def work(number: int, board: Board) -> None:
        worker.work(number, worker.Common(store, device, board, manner, keeps_awake))

    def state(running: Running) -> Handover:
        return Handover(
            store_path=served.store_path,
            path=served.path,
            options=options,
            in_background=served.in_background,
            device=device.descriptor,
            memory=store.memory_descriptor,
            lock=store.lock_descriptor,
            status=served.status,
            board=running.board.descriptor,
            workers=running.workers,
            maintenance=running.maintenance,
            init=device.init,
            device_number=served.device_number,
        )

    def try_upgrade(running: Running, said: int) -> None:
        os.dup2(said, 2)
        handover.become(state(running), handover.TRY)

    return Plan(
        store=store,
        path=served.path,
        workers=options.workers or default_workers(),
        grace_s=options.grace_s,
        work=work,
        maintain=look_after if options.writable else None,
        announce=functools.partial(_first_answer, served.path, options),
        ready=ready,
        try_upgrade=try_upgrade,
        upgrade=lambda running: handover.become(state(running), handover.GO),
        status=served.status,
    )


def _first_answer(path: str, options: MountOptions) -> None:
    """Wait until the mount answers."""
    try:
        os.statvfs(path)
        mountpoint.set_read_ahead(path, options.read_ahead_kib)
    except OSError as error:
        raise MountFailed(f"the mount at {path} does not answer: {error}") from None


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
            return Store.open(store_path, writable=options.writable, as_of_ns=options.as_of_ns)
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
    for text in report.renamed:
        log.warning("%s", text)
    for damage in report.damage[:DAMAGE_NAMED]:
        log.error("damage: %s", damage)
    if len(report.damage) > DAMAGE_NAMED:
        log.error("damage: %d more places; imgfs check names them all", len(report.damage) - DAMAGE_NAMED)
