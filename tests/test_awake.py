"""While requests come processors do not halt, and no longer."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounted import WORKER_DEATHS, Mounted, wait_until

from imgfs.awake import _LOOK_NS, _WAITS, DEVICE, Awake
from imgfs.options import parse
from imgfs.processors import FEW, Processors, waking_is_slow

HALTS_SLOWLY = "haltpoll\n"


def wishes(pid: int) -> int:
    """Return how many wishes the process *pid* has at the kernel."""
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += os.readlink(descriptor) == DEVICE
        except FileNotFoundError:
            pass
    return found


def bound_us() -> int:
    """Return in how many us every processor has to wake, by the wish of anybody."""
    with open(DEVICE, "rb") as device:
        return int.from_bytes(device.read(4), "little")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def awake(pipe: tuple[int, int]) -> Iterator[Awake]:
    awake = Awake(wanted=True)
    awake.listen_to(pipe[0])
    yield awake
    awake.close()


# -- which machines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "count", "slow"),
    [
        (HALTS_SLOWLY, 1, True),
        (HALTS_SLOWLY, FEW, True),
        (HALTS_SLOWLY, FEW + 1, False),
        ("intel_idle\n", 2, False),
        ("none\n", 2, False),
    ],
)
def test_only_few_processors_of_a_virtual_machine_are_kept_awake_unasked(
    tmp_path: Path, driver: str, count: int, slow: bool
) -> None:
    path = tmp_path / "current_driver"
    path.write_text(driver)
    assert waking_is_slow(str(path), count) is slow


def test_where_nothing_is_said_of_halting_nobody_is_kept_awake(tmp_path: Path) -> None:
    assert not waking_is_slow(str(tmp_path / "current_driver"), 2)


def test_the_mount_option() -> None:
    assert parse([]).awake is None
    assert parse(["awake"]).awake is True
    assert parse(["awake,noawake"]).awake is False


# -- one who waits ----------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_who_waits_all_the_time_keeps_processors_awake_until_it_is_let_go(awake: Awake) -> None:
    for _ in range(_WAITS):
        assert not awake.wait(0)
        assert not awake.keeps
    deadline = time.monotonic() + 20
    while not awake.keeps:  # this machine may take longer from one to the next
        awake.wait(0)
        assert time.monotonic() < deadline
    assert wishes(os.getpid()) == 1
    assert bound_us() == 0
    awake.let_halt()
    assert not awake.keeps
    assert not wishes(os.getpid())


@pytest.mark.root
def test_who_waits_now_and_then_does_not(awake: Awake) -> None:
    for _ in range(3 * _WAITS):
        awake.wait(0)
        time.sleep(0.003)
        assert not awake.keeps


def test_who_does_not_want_it_does_not(pipe: tuple[int, int]) -> None:
    awake = Awake(wanted=False)
    awake.listen_to(pipe[0])
    for _ in range(1000):
        awake.wait(0)
    assert not awake.keeps
    awake.close()


def test_without_permission_it_waits_all_the_same(pipe: tuple[int, int], tmp_path: Path) -> None:
    awake = Awake(wanted=True, device=str(tmp_path / "missing"))
    awake.listen_to(pipe[0])
    for _ in range(1000):
        assert not awake.wait(0)
    assert not awake.keeps
    os.write(pipe[1], b"x")
    assert awake.wait(0)
    assert awake.look()
    awake.close()


def test_it_waits_for_what_comes_and_no_longer_than_it_is_told(awake: Awake, pipe: tuple[int, int]) -> None:
    assert not awake.look()
    awake.asked(7)
    awake.asked(7)
    for patience_ms in (0, 1, 20):
        since_ns = time.monotonic_ns()
        assert not awake.wait(patience_ms)
        assert time.monotonic_ns() - since_ns >= patience_ms * 1_000_000
    for wait_ns in (0, _LOOK_NS // 2, 5_000_000):
        since_ns = time.monotonic_ns()
        assert not awake.wait_until(since_ns + wait_ns)
        assert time.monotonic_ns() - since_ns >= wait_ns
    writer = threading.Timer(0.02, os.write, (pipe[1], b"x"))
    writer.start()
    assert awake.wait(20_000)
    assert awake.wait_until(time.monotonic_ns() + 20_000_000_000)
    assert awake.wait_until(time.monotonic_ns() + _LOOK_NS // 2)
    writer.join()


def cpu_ns_of_waits(awake: Awake) -> list[int]:
    """Return the processor time that a wait takes, in a few tries: who looks takes it, who sleeps takes less."""
    tries = []
    for _ in range(10):
        since_ns = time.thread_time_ns()
        for _ in range(10):
            awake.wait(1)
        tries.append((time.thread_time_ns() - since_ns) // 10)
    return tries


def test_only_where_one_asks_alone_and_a_processor_is_to_spare_it_looks_without_sleeping(
    pipe: tuple[int, int], tmp_path: Path
) -> None:
    load = tmp_path / "loadavg"

    def look(threads: list[int], running: int) -> list[int]:
        load.write_text(f"0.20 0.18 0.12 {running}/80 11206\n")
        awake = Awake(wanted=False, processors=Processors(str(load)))
        awake.listen_to(pipe[0])
        for thread in threads:
            awake.asked(thread)
        try:
            return cpu_ns_of_waits(awake)
        finally:
            awake.close()

    # Others have work for our processor now and then: then who looks takes less, who sleeps more.
    assert max(look([8, 7, 7, 0], 1)) > _LOOK_NS * 3 // 4  # 0 is nobody in particular
    assert min(look([7, 8], 1)) < _LOOK_NS * 2 // 3
    assert min(look([7, 7], (os.cpu_count() or 1) + 1)) < _LOOK_NS * 2 // 3


# -- a mount ----------------------------------------------------------------------------------------------------------


def ask_until(point: Path, condition: Callable[[], bool]) -> None:
    """Ask for an image, one request after the other, until *condition*."""
    deadline = time.monotonic() + 30
    while not condition():
        for _ in range(50):
            (point / "image").read_bytes()
        assert time.monotonic() < deadline


def wishes_of(mounted: Mounted) -> int:
    return sum(map(wishes, mounted.children()))


@pytest.mark.mount
@pytest.mark.root
def test_processors_do_not_halt_while_requests_come(stopped: Mounted) -> None:
    stopped.start("awake,workers=1")
    (stopped.point / "image").write_bytes(b"bytes of an image")
    for _ in range(2):
        ask_until(stopped.point, lambda: wishes_of(stopped) == 1)
        wait_until(lambda: not wishes_of(stopped), "nobody asks any more")
    ask_until(stopped.point, lambda: wishes_of(stopped) == 1)
    (worker,) = stopped.children("worker")
    stopped.expected_log += WORKER_DEATHS
    os.kill(worker, signal.SIGKILL)  # the kernel drops its wish; the next has its own
    ask_until(stopped.point, lambda: worker not in stopped.children() and wishes_of(stopped) == 1)
    wait_until(lambda: not wishes_of(stopped), "nobody asks any more")


@pytest.mark.mount
@pytest.mark.root
def test_they_do_where_that_is_not_wanted(stopped: Mounted) -> None:
    stopped.start("noawake,workers=1")
    (stopped.point / "image").write_bytes(b"bytes of an image")
    for _ in range(500):
        (stopped.point / "image").read_bytes()
        assert not wishes_of(stopped)
