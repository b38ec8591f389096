"""Who waits for signals gets those that came, each once, and a tick where none does; whatever stops it meanwhile."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

TICK_S = 0.05
WAITS = f"""
import signal
from imgfs import ticks
with ticks.waiting_for({{signal.SIGUSR1, signal.SIGTERM}}, {TICK_S}) as next_signal:
    while (number := next_signal()) != signal.SIGTERM:
        print(int(number), flush=True)
"""
SLOW = """
import os, signal, time
from imgfs import ticks
with ticks.waiting_for({signal.SIGTERM, signal.SIGCHLD}, 0.01) as next_signal:
    time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGCHLD)
    came = set()
    for _ in range(4):
        came.add(next_signal())
        time.sleep(0.02)
assert came == {signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM}, came
"""
ENDS = """
import signal, time
from imgfs import ticks
before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
with ticks.waiting_for({signal.SIGTERM}, 0.0001):
    time.sleep(0.05)
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
time.sleep(0.05)
"""


@pytest.fixture
def waiting() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def got(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_a_tick_comes_where_no_signal_does(waiting: subprocess.Popen[str]) -> None:
    assert [got(waiting) for _ in range(5)] == [signal.SIGALRM] * 5
    since = time.monotonic()
    assert [got(waiting) for _ in range(5)] == [signal.SIGALRM] * 5
    assert time.monotonic() - since > 3 * TICK_S


def test_each_signal_comes_once_though_the_process_was_stopped(waiting: subprocess.Popen[str]) -> None:
    assert got(waiting) == signal.SIGALRM
    for _ in range(3):
        waiting.send_signal(signal.SIGUSR1)
        while got(waiting) != signal.SIGUSR1:
            pass
        waiting.send_signal(signal.SIGSTOP)
        time.sleep(4 * TICK_S)
        waiting.send_signal(signal.SIGCONT)
        assert {got(waiting) for _ in range(4)} == {signal.SIGALRM}
        waiting.send_signal(signal.SIGSTOP)
        waiting.send_signal(signal.SIGUSR1)
        time.sleep(2 * TICK_S)
        waiting.send_signal(signal.SIGCONT)
        assert [got(waiting) for _ in range(4)].count(signal.SIGUSR1) == 1


def test_who_is_slow_gets_more_than_ticks() -> None:
    subprocess.run([sys.executable, "-c", SLOW], check=True, timeout=30)


def test_afterwards_nothing_ticks(waiting: subprocess.Popen[str]) -> None:
    """A tick that comes to whoever waits for none would end the process."""
    assert got(waiting) == signal.SIGALRM
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(10) == 0
    subprocess.run([sys.executable, "-c", ENDS], check=True)
