"""A worker: serves requests from the FUSE device until the mount is gone, or it is killed.

Owns its pyfuse3 session and its trio loop. Must not know how it was started, nor what becomes of what it leaves: it
may be killed at any instruction.

*Concurrency:* one trio loop, and threads that wait for the disk. All that others need to carry on is in shared memory.
"""

import sys
import time
from typing import NamedTuple

import pyfuse3
import trio

from imgfs import heap
from imgfs.acts import Acts, Manner
from imgfs.board import Board
from imgfs.calls import Calls
from imgfs.desk import PYFUSE3_TASKS_MAX, Desk, TrialPassed, at_desk
from imgfs.device import Device
from imgfs.errors import MountFailed
from imgfs.express import Express
from imgfs.fs import Filesystem
from imgfs.listers import Listers
from imgfs.store import Store

BEAT_S = 0.5
# A thread that comes back from the disk waits for the interpreter so long at most.
_TURN_S = 0.0002


class Common(NamedTuple):
    """What all workers of a mount share."""

    store: Store
    device: Device
    board: Board
    manner: Manner
    awake: bool = False
    """Whether processors are kept from halting while requests come (awake.py)."""


def work(number: int, common: Common) -> None:
    """Be worker *number*, in a process of its own; return when the mount is gone."""
    heap.keep()
    sys.setswitchinterval(_TURN_S)
    store = common.store
    store.after_fork()
    desk = Desk(number, common.device, common.board, store.requests, awake=common.awake)
    desk.install()
    acts, calls = Acts(store, common.manner), Calls(store, desk)
    filesystem = at_desk(desk, Filesystem(store, desk, acts, calls))
    listers = Listers(common.board.listers)
    desk.express = express = Express(store, acts, calls, listers, store.giving(common.board.giving, desk.give))
    pyfuse3.init(filesystem, desk.session_path, {"default_permissions"})
    trio.run(_serve, desk, express, common, number, listers)


def try_init(common: Common) -> None:
    """Return if a worker of this release would answer INIT as it was answered; nothing is served.

    Raises:
        MountFailed: it would not.
    """
    desk = Desk(0, common.device, common.board, common.store.requests, trial=True)
    desk.install()
    store = common.store
    filesystem = Filesystem(store, desk, Acts(store, common.manner), Calls(store, desk))
    pyfuse3.init(filesystem, desk.session_path, {"default_permissions"})
    try:
        trio.run(pyfuse3.main)
    except BaseExceptionGroup as group:
        if group.subgroup(TrialPassed) is not None:
            return
        raise MountFailed(f"a worker of this release fails at INIT: {group.exceptions[0]}") from None
    raise MountFailed("a worker of this release does not answer INIT")


async def _serve(desk: Desk, express: Express, common: Common, number: int, listers: Listers) -> None:
    async with trio.open_nursery() as nursery:
        desk.serve_late_in(nursery)
        nursery.start_soon(_beat, express, common, number)
        nursery.start_soon(_forget_listings, desk, listers)
        await pyfuse3.main(PYFUSE3_TASKS_MAX, PYFUSE3_TASKS_MAX)
        nursery.cancel_scope.cancel()


async def _beat(express: Express, common: Common, number: int) -> None:
    while True:
        common.board.posts[number].beat_ns = time.monotonic_ns()
        if express.forget_listings():
            heap.trim()
        await trio.sleep(BEAT_S)


async def _forget_listings(desk: Desk, listers: Listers) -> None:
    """Let the kernel list anew what it has names alone of, once somebody looks at more."""
    while True:
        for directory in listers.outdated():
            # In a thread, for it waits for who is reading there.
            await trio.to_thread.run_sync(desk.forget, directory)
        await trio.sleep(BEAT_S)
