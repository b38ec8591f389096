"""What becomes of the requests that dead workers had in hand: each is answered once, by another worker.

Owns the order of the steps (docs/concurrency.md). Must not know what requests do, nor how workers are started.

*Concurrency:* runs in the supervisor, which holds the gate; the living have nothing in hand.
"""

import errno
import logging
from typing import NamedTuple

from imgfs import wire
from imgfs.device import Device
from imgfs.requests import Request
from imgfs.store import Store

log = logging.getLogger(__name__)


class Dead(NamedTuple):
    """A worker that died; *blame*: how much that says of what it had in hand, as `Store.settle`."""

    number: int
    blame: int


def settle(store: Store, device: Device, dead: list[Dead], write_bytes_max: int) -> None:
    """Have the requests of *dead* workers sent again, note which of them were applied already, refuse poisonous ones.

    `Store.roll_forward` comes before.
    """
    device.resend()
    resent: dict[Request, list[int]] = {}
    for data in device.queued(write_bytes_max + wire.READ_BYTES_EXTRA):
        raw = wire.parse(data)
        if raw.resent:
            resent.setdefault(raw.request, []).append(raw.unique)
    requests = [request for request, uniques in resent.items() for _ in uniques]
    for number, blame in dead:
        for request in store.settle(number, requests, blame=blame):
            for unique in resent.pop(request, []):
                device.answer(wire.error_reply(unique, errno.EIO))
            log.error("workers died with the same request in hand, which is answered EIO: %s", wire.describe(request))
    # What was read here goes back to where workers read it.
    device.resend()
