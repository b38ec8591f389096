"""The maintenance process: makes durable, at intervals, what was closed since.

Owns its interval. Must not know FUSE. It may be killed at any instruction, as a worker may.

*Concurrency:* one process beside the workers, one thread.
"""

import logging
import time

from imgfs.errors import ImgfsError
from imgfs.store import Store

log = logging.getLogger(__name__)


def maintain(store: Store, sync_interval_s: float) -> None:
    """Sync every *sync_interval_s* seconds, in a process of its own, until it is killed."""
    store.after_fork()
    told = ""
    while True:
        time.sleep(sync_interval_s)
        try:
            store.sync()
        except (ImgfsError, OSError) as error:
            # It will not get better by itself; every interval the same line would only hide the others.
            if str(error) != told:
                told = str(error)
                log.error("sync: %s", told)
