"""How names, sizes and times are written for a person, and how sizes and times are read from one.

Owns no state. Must not know the store: plain values in, text out.
"""

import grp
import os
import pwd
import re
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import click

from imgfs.moments import BadTime, parse_age, parse_moment

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_BINARY_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Return the number of bytes in *text* such as 65536, 64K or 1G; the letters count in powers of 1024.

    Raises:
        click.BadParameter: that is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"'{text}' is no size; write it like 65536, 64K, 512M or 1G")
    return int(match[1]) * _FACTORS[match[2].upper()]


def moment(text: str) -> int:
    """Return the time that *text* on a command line means, in ns since 1970. click.BadParameter."""
    try:
        return parse_moment(text, time.time_ns())
    except BadTime as error:
        raise click.BadParameter(str(error)) from None


def age(text: str) -> int:
    """Return the length of time that *text* on a command line means, in ns. click.BadParameter."""
    try:
        return parse_age(text)
    except BadTime as error:
        raise click.BadParameter(str(error)) from None


def path_argument(name: str, metavar: str) -> Callable[[F], F]:
    """Return a decorator that adds the argument *metavar*, a path, to a command: the parameter *name*."""
    return click.argument(name, metavar=metavar, callback=not_empty)


def not_empty(context: click.Context, parameter: click.Parameter, value: T) -> T:
    """Return *value*, what a command line has for a path.

    Raises:
        click.BadParameter: it is empty, as that of a variable that is not set; nobody means the top by that.
    """
    if value == "":
        raise click.BadParameter("the path is empty", context, parameter)
    return value


def escape(text: str) -> str:
    r"""Return *text* so that it stays on one line and cannot steer a terminal.

    Text that has nothing to escape comes back as it is; other text as a shell would read it: `$'a\nb'`.
    """
    if text.isprintable():
        return text
    return "$'" + "".join(map(_escape_character, text)) + "'"


def _escape_character(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable():
        return character
    if character in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def one_line(text: str) -> str:
    """Return *text* for a message: whatever would end the line or steer a terminal is escaped in place."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape_character(c) for c in text)


def name_for(name: bytes, *, terminal: bool) -> str:
    """Return *name* as it is shown: escaped for a terminal, else byte for byte (`echo` writes it back so)."""
    text = os.fsdecode(name)
    return escape(text) if terminal else text


def echo(text: str) -> None:
    """Print a line of *text* on standard output; what `os.fsdecode` made of any bytes comes out as those bytes."""
    click.echo(os.fsencode(text))


def complain(text: str) -> None:
    """Print one line on standard error, in the form all messages have."""
    click.echo(f"imgfs: {one_line(text)}", err=True)


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout.isatty()


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2,000 images"."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun if number == 1 else plural}"


def binary_size(size: int) -> str:
    """Return *size* bytes in the largest unit of 1024 that fits: "512 bytes", "1.5 GiB"."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_BINARY_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{size:,} bytes" if unit == 0 else f"{value:,.1f} {_BINARY_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Return a time as a clock shows it: "0:07", "12:30", "1:05:00"."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def local_time(time_ns: int, *, to_the_second: bool = False, nanoseconds: bool = False) -> str:
    """Return a time in the local zone, to the minute, to the second, or to the nanosecond."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    local = time.localtime(seconds)
    if nanoseconds:
        return time.strftime("%Y-%m-%d %H:%M:%S", local) + f".{rest:09d}" + time.strftime(" %z", local)
    return time.strftime("%Y-%m-%d %H:%M:%S" if to_the_second else "%Y-%m-%d %H:%M", local)


@lru_cache(maxsize=256)
def user_name(uid: int) -> str:
    """Return the name of a user; the number where nobody has it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@lru_cache(maxsize=256)
def group_name(gid: int) -> str:
    """Return the name of a group; the number where none has it."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
