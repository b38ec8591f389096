"""Waiting for signals, and for a tick where none comes.

Owns the interval timer of the process, and which signals it holds back. Must not know what a signal means.

*Concurrency:* one thread waits, and no other thread of the process may take these signals.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet

TICK = signal.SIGALRM


@contextlib.contextmanager
def waiting_for(wanted: AbstractSet[signal.Signals], tick_s: float) -> Iterator[Callable[[], int]]:
    """Give a function that waits for the next signal of *wanted*, or for TICK, which comes every *tick_s*.

    Of signals that came while nobody waited each number comes once. Not by `signal.sigtimedwait`: where the process was
    stopped for longer than it was to wait, CPython's returns a signal that never came.
    """
    waited = {*wanted, TICK}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    signal.setitimer(signal.ITIMER_REAL, tick_s, tick_s)

    def next_signal() -> int:
        # The kernel gives the lowest number first: whose turns take longer than a tick would get nothing but ticks.
        return signal.sigwaitinfo(signal.sigpending() & wanted or waited).si_signo

    try:
        yield next_signal
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if TICK in signal.sigpending():
            signal.sigwait({TICK})  # let through, it would end the process
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
