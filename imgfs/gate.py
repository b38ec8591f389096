"""The gate: whoever holds it, and nobody else, reads the FUSE device.

Owns the file that is locked. Must not know the device.

When a request arrives, every worker wakes and one gets it; the others would block inside libfuse, with all that they
had to do. So a worker reads only while it holds the gate, and the supervisor takes it to keep them all away.

*Concurrency:* a `flock` belongs to the open file, so each process opens the gate anew after fork. It dies with its
holder.
"""

import errno
import fcntl
import os
import time

_POLL_S = 0.0005


def make_gate() -> int:
    """Return a descriptor of a new gate, for children to inherit."""
    return os.memfd_create("imgfs-gate", os.MFD_CLOEXEC)


class Gate:
    """One process's own opening of the gate *descriptor*."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._file)

    def try_take(self) -> bool:
        """Take the gate unless another has it; return whether it is ours."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            return False
        return True

    def take(self, patience_s: float) -> bool:
        """Take the gate, or give up after *patience_s* seconds; return whether it is ours."""
        deadline = time.monotonic() + patience_s
        while not self.try_take():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def let_go(self) -> None:
        """Give the gate back."""
        fcntl.flock(self._file, fcntl.LOCK_UN)
