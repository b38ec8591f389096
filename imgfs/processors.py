"""What is known of the machine's processors: whether one is to spare, and whether to wake one takes long.

Owns an open /proc/loadavg, and how often it is read. Must not know who waits for what.

*Concurrency:* an object belongs to one thread.
"""

import os

# So many answers are given from memory before the kernel is asked again, which takes 2 us.
_ANSWERS_EACH = 8
_LOAD_BYTES_MAX = 128
# What halts idle processors of a virtual machine says so here.
_DRIVER = "/sys/devices/system/cpu/cpuidle/current_driver"
_HALTS_SLOWLY = b"haltpoll\n"
# To keep two of them awake keeps all of them awake.
FEW = 8


def waking_is_slow(driver: str = _DRIVER, count: int | None = None) -> bool:
    """Return whether to wake a processor of this machine takes long, and they are few."""
    if (count or os.cpu_count() or 1) > FEW:
        return False
    try:
        with open(driver, "rb") as file:
            return file.read() == _HALTS_SLOWLY
    except OSError:
        return False


class Processors:
    """The processors of the machine, as *path* tells of those that have work."""

    def __init__(self, path: str = "/proc/loadavg") -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        count = os.cpu_count() or 1
        # Who may use some of them only is not told how busy these are.
        self._count = count if len(os.sched_getaffinity(0)) == count else 0
        self._answers = 0
        self._spare = False

    def close(self) -> None:
        os.close(self._file)

    def spare(self) -> bool:
        """Return whether, a moment ago, no more threads had work than there are processors, ours among them."""
        if not self._answers:
            self._answers = _ANSWERS_EACH
            # "0.20 0.18 0.12 1/80 11206": three averages, then how many threads can run, of how many.
            running = os.pread(self._file, _LOAD_BYTES_MAX, 0).split(b" ")[3].partition(b"/")[0]
            self._spare = int(running) <= self._count
        self._answers -= 1
        return self._spare
