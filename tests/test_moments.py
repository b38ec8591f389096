"""Times as people write them."""

import time
from collections.abc import Iterator

import pytest

from imgfs.errors import EXIT_USAGE
from imgfs.moments import BadTime, parse_age, parse_moment
from imgfs.options import BadOption, parse

NOW_NS = 1_795_356_000_123_456_789
SECOND_NS = 10**9


@pytest.fixture
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_berlin")
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-11-22T14:00", 1_795_352_400),
        ("2026-11-22 14:00:00", 1_795_352_400),
        ("2026-07-01T14:00", 1_782_907_200),  # summer
        ("2026-11-22", 1_795_302_000),
        ("2026-11-22T13:00:00Z", 1_795_352_400),
        ("2026-11-22T16:00:00+03:00", 1_795_352_400),
        ("20261122T130000Z", 1_795_352_400),
        ("@1795352400", 1_795_352_400),
        ("@-5", -5),
    ],
)
def test_moments(text: str, seconds: int) -> None:
    assert parse_moment(text, NOW_NS) == seconds * SECOND_NS


def test_moments_below_a_second() -> None:
    assert parse_moment("@1795352400.000000001", NOW_NS) == 1_795_352_400_000_000_001
    assert parse_moment("@-1.5", NOW_NS) == -1_500_000_000
    assert parse_moment("2026-11-22T13:00:00.25Z", NOW_NS) == 1_795_352_400_250_000_000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30min", 1800), ("2h", 7200), ("1d12h", 129_600), ("2 w", 1_209_600), ("0s", 0), ("1H", 3600)],
)
def test_ages(text: str, seconds: int) -> None:
    assert parse_age(text) == seconds * SECOND_NS
    assert parse_moment(text, NOW_NS) == NOW_NS - seconds * SECOND_NS


@pytest.mark.parametrize(
    "text", ["", "5", "5m", "h", "-2h", "2h ago", "2h!", "yesterday", "@", "@x", "2026-13-01", "9999999999w"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(BadTime) as caught:
        parse_moment(text, NOW_NS)
    assert caught.value.exit_code == EXIT_USAGE
    with pytest.raises(BadTime):
        parse_age(text)


def test_a_mount_of_the_past_is_read_only() -> None:
    options = parse(["asof=@1795352400.5,rw"])
    assert options.as_of_ns == 1_795_352_400_500_000_000
    assert not options.writable
    with pytest.raises(BadOption, match="mount option 'asof=soon': 'soon' is no time"):
        parse(["asof=soon"])
    with pytest.raises(BadOption, match=r"needs a value, as in asof=\.\.\."):
        parse(["asof"])
