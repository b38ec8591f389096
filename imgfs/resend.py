"""What becomes of the requests that dead workers had in hand: each is answered once, by another worker.

Owns the order of the steps (docs/concurrency.md), and which requests are to blame for deaths. Must not know what
requests do, nor how workers are started.

*Concurrency:* runs in the supervisor, which has shut the gate; the living have nothing in hand.
"""

import errno
import logging
from typing import NamedTuple

from imgfs import wire
from imgfs.device import Device
from imgfs.requests import Request
from imgfs.store import Store

log = logging.getLogger(__name__)

# What a death says of each request that was in hand: a worker that crashed did so for a reason, as did one for which
# there was no memory; one that somebody sent SIGKILL was just chosen. With so much blame a request is not handed to
# another worker.
CRASH_BLAME = 100
KILL_BLAME = 1
BLAME_MAX = 2 * CRASH_BLAME


class Dead(NamedTuple):
    """A worker that died; *blame*: how much that says of what it had in hand, 0 if it was only in the way."""

    number: int
    blame: int


class Resending:
    """The requests that were sent again."""

    def __init__(self, store: Store, device: Device) -> None:
        self._store = store
        self._device = device
        self._blame: dict[Request, int] = {}

    def settle(self, dead: list[Dead], write_bytes_max: int) -> None:
        """Have what *dead* workers had in hand sent again, note what was applied already, refuse what is poisonous.

        `Store.roll_forward` comes before.
        """
        self._device.resend()
        resent: set[Request] = set()
        for data in self._device.queued(write_bytes_max + wire.READ_BYTES_EXTRA):
            head = wire.IN_HEADER.unpack_from(data)
            if head[2] & wire.RESENT:
                resent.add(wire.identify(head))
        # Only what is still not answered can be to blame for a next death.
        blame = {request: self._blame.get(request, 0) for request in resent}
        for number, more in dead:
            for request in self._store.settle(number, resent):
                if blame[request] < BLAME_MAX <= blame[request] + more:
                    self._refuse(request)
                blame[request] += more
        self._blame = {request: much for request, much in blame.items() if 0 < much < BLAME_MAX}
        # What was read here goes back to where workers read it.
        self._device.resend()

    def _refuse(self, request: Request) -> None:
        log.error("workers died with the same request in hand, which is answered EIO: %s", wire.describe(request))
        self._device.answer(wire.error_reply(request.unique | wire.RESENT, errno.EIO))
