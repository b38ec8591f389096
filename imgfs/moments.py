"""Reads times as people write them: a moment such as `2026-11-22T14:00` or `@1795356000`, an age such as `2h`.

Owns how they may be written. Must not know what they are for. ISO 8601 is read by the standard library; what is left
is too little for a library of its own.
"""

import re
from datetime import UTC, datetime, timedelta

from imgfs.errors import EXIT_USAGE, InvalidArgument

_SECOND_NS = 1_000_000_000
_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PART = re.compile(r"(\d+)\s*([a-z]+)\s*", re.IGNORECASE)
_UNIX = re.compile(r"@(-?\d{1,10})(?:\.(\d{1,9}))?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_AGE_MAX_S = 1 << 32


class BadTime(InvalidArgument):
    """That is no time, or no age."""

    exit_code = EXIT_USAGE


def parse_age(text: str) -> int:
    """Return the length of time in *text*, such as 2h, 30min or 1d12h, in ns.

    Raises:
        BadTime: that is none.
    """
    parts = _PART.findall(text.strip())
    known = all(unit.lower() in _UNITS_S for _, unit in parts)
    if not parts or not known or _PART.sub("", text.strip()):
        raise BadTime(f"'{text}' is no age; write it like 90s, 30min, 2h, 1d12h or 2w")
    seconds = sum(int(number) * _UNITS_S[unit.lower()] for number, unit in parts)
    if seconds > _AGE_MAX_S:
        raise BadTime(f"'{text}' is longer ago than any store")
    return seconds * _SECOND_NS


def parse_moment(text: str, now_ns: int) -> int:
    """Return the moment that *text* means at *now_ns*, in ns since 1970.

    It may be ISO 8601, local time unless it ends in a zone; seconds since 1970 behind an @; or an age, which is so
    long ago.

    Raises:
        BadTime: it is none of these.
    """
    stripped = text.strip()
    unix = _UNIX.fullmatch(stripped)
    if unix:
        sign = -1 if unix[1].startswith("-") else 1
        return int(unix[1]) * _SECOND_NS + sign * int((unix[2] or "").ljust(9, "0"))
    try:
        moment = datetime.fromisoformat(stripped).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    else:
        return (moment - _EPOCH) // timedelta(microseconds=1) * 1000
    try:
        return now_ns - parse_age(stripped)
    except BadTime:
        raise BadTime(
            f"'{text}' is no time; write it like 2026-11-22T14:00, 2026-11-22T13:00:00Z, @1795356000 or 2h (ago)"
        ) from None
