"""Bounds how long a step of a bench takes: what hangs is cut off, what is slow is given up.

Owns the alarm of the process. Must not know what a step is.

*Concurrency:* a thread watches the clock, for the step itself may stand in a request that only the end of who serves it
ends. The exception is raised in the main thread, where every step runs.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from bench.commands import Failed

_interrupted = threading.Event()


def note_interrupts() -> None:
    """Let SIGINT end the bench, at the next step if not at once: Python forgets what is raised while it tidies up."""

    def interrupt(number: int, frame: object) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def _end_if_interrupted() -> None:
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def within(seconds: float, cut: Callable[[], object]) -> Iterator[None]:
    """Give the body so many *seconds*; then call *cut*, which must not wait, and raise Failed in the body."""
    _end_if_interrupted()
    done = threading.Event()
    left = False

    def alarm(number: int, frame: object) -> None:
        # It may come when all is done.
        if not left:
            raise Failed(f"it took more than {seconds:g} s")

    def watch() -> None:
        if not done.wait(seconds):
            cut()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, alarm)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left = True
        done.set()
        watcher.join()
        signal.signal(signal.SIGALRM, before)
    _end_if_interrupted()
