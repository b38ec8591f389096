"""The brake of background work, by a clock that only waits and work move: its rate, and how it gives way to readers."""

from types import SimpleNamespace

import pytest

from imgfs import pace
from imgfs.pace import Pace

MB = 1_000_000
IMAGE_BYTES = 20_000


class Clock:
    """Time that passes when somebody sleeps, or says that it has."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.naps = 0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.naps += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    return clock


class Readers:
    """What readers have waited so far."""

    def __init__(self) -> None:
        self.waits = (0, 0)

    def wait(self, time_ns: int) -> None:
        self.waits = self.waits[0] + 1, self.waits[1] + time_ns

    def __call__(self) -> tuple[int, int]:
        return self.waits


def work(pace: Pace, clock: Clock, total_bytes: int, takes_s: float, readers: Readers, wait_ns: int = 0) -> float:
    """Do it image by image, each of which takes so long; return how many bytes a second that were."""
    start_s = clock.now_s
    for _ in range(total_bytes // IMAGE_BYTES):
        clock.now_s += takes_s
        if wait_ns:
            readers.wait(wait_ns)
        pace.done(IMAGE_BYTES)
    return total_bytes / (clock.now_s - start_s)


def test_work_goes_at_its_rate_though_it_takes_time_itself(clock: Clock) -> None:
    readers = Readers()
    rate = work(Pace(50 * MB, readers), clock, 50 * MB, IMAGE_BYTES / (60 * MB), readers)
    assert rate == pytest.approx(50 * MB, rel=0.02)
    assert clock.naps < 50 * MB // IMAGE_BYTES / 2


def test_lost_time_is_made_up_for_but_in_no_long_burst(clock: Clock) -> None:
    readers = Readers()
    brake = Pace(10 * MB, readers)
    clock.now_s += 60.0
    assert work(brake, clock, 10 * MB, 0.0, readers) < 1.2 * 10 * MB


def test_work_without_a_limit_does_not_sleep(clock: Clock) -> None:
    readers = Readers()
    work(Pace(1e12, readers), clock, 10 * MB, 0.0001, readers)
    assert not clock.naps


@pytest.mark.parametrize("bytes_per_s", [50 * MB, 1e12])
def test_work_gives_way_while_readers_wait(clock: Clock, bytes_per_s: float) -> None:
    readers = Readers()
    brake = Pace(bytes_per_s, readers)
    takes_s = IMAGE_BYTES / (100 * MB)
    free = work(brake, clock, 20 * MB, takes_s, readers)
    work(brake, clock, 20 * MB, takes_s, readers, wait_ns=50_000_000)
    held_back = work(brake, clock, 5 * MB, takes_s, readers, wait_ns=50_000_000)
    assert held_back < free / 10
    work(brake, clock, 40 * MB, takes_s, readers)
    assert work(brake, clock, 20 * MB, takes_s, readers) == pytest.approx(free, rel=0.05)


def test_what_readers_wait_anyway_is_not_held_against_it(clock: Clock) -> None:
    readers = Readers()
    brake = Pace(50 * MB, readers)
    for _ in range(20):
        readers.wait(40_000_000)
        brake.rest()
    rate = work(brake, clock, 20 * MB, 0.0, readers, wait_ns=50_000_000)
    assert rate == pytest.approx(50 * MB, rel=0.05)
