"""Parses the options of a mount, as they stand in /etc/fstab or behind `-o`.

Owns their names and defaults. Must not know how they are carried out.
"""

import difflib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from imgfs.errors import EXIT_USAGE, InvalidArgument
from imgfs.moments import BadTime, parse_moment

# Each needs a number of its own in shared memory, also while a dead one is replaced.
WORKERS_MAX = 8


class BadOption(InvalidArgument):
    """A mount option is unknown, or has no such value."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True)
class MountOptions:
    """How a store is mounted."""

    writable: bool = True

    allow_other: bool = False
    """Let other users in, as far as mode bits allow; without it nobody else gets past the mountpoint, not even root."""

    timeout_s: float | None = None
    """How long the kernel may keep names, absent names and attributes; None: a day, or 1 s if not writable."""

    sync_interval_s: float | None = None
    """What power loss can take of images that were closed but not synced; None: the default of the settings."""

    read_ahead_kib: int = 1024
    """How much the kernel reads ahead of a sequential reader, in requests of up to 1 MiB; only root can set it."""

    workers: int | None = None
    """How many processes serve the mount; None: one for each processor, at most four."""

    grace_s: float = 5.0
    """How long users of the mount may go on after SIGTERM."""

    log: str | None = None
    """The file a daemon writes its log to; None: the system log."""

    xattrs: bool = False
    """Keep extended attributes."""

    publish_at_close: bool = False
    """Let nobody but the process that creates an image find it by name before it is closed."""

    awake: bool | None = None
    """Keep processors from halting while requests come; None: where waking one takes long, and they are few."""

    retention_s: float = 86_400.0
    """How long what was deleted or replaced can be restored; 0: its space comes back at once."""

    compact_percent: float = 70.0
    """A volume of which less is needed is compacted; 0: none is."""

    compact_rate_mib: float = 50.0
    """How fast compaction copies, in MiB per second, while no reader has to wait."""

    as_of_ns: int | None = None
    """Show the store as it was then, in ns since 1970; such a mount is not writable."""

    kernel: frozenset[str] = frozenset()
    """Flags that the kernel carries out, such as `noexec`."""


_OPPOSITES = {"nosuid": "suid", "nodev": "dev", "noexec": "exec", "sync": "async"}
_KERNEL = {**_OPPOSITES, **{off: on for on, off in _OPPOSITES.items()}, "dirsync": ""}

# Who may mount, and when; what is so anyway; and access times, which are not kept.
_IGNORED_NAMES = """
    defaults auto noauto user nouser users owner noowner group nogroup nofail _netdev default_permissions
    atime noatime relatime norelatime strictatime nostrictatime diratime nodiratime lazytime nolazytime
    iversion noiversion silent loud
"""
_IGNORED = frozenset(_IGNORED_NAMES.split())
_IGNORED_WITH_VALUE = frozenset({"user", "comment", "fsname", "subtype"})

_FLAGS = ("ro", "rw", "allow_other", "xattr", "noxattr", "awake", "noawake")
_VALUES = (
    *("timeout", "sync_interval", "read_ahead", "workers", "grace", "log", "publish", "asof"),
    *("retention", "compact", "compact_rate"),
)
_COUNTS = frozenset(str(number) for number in range(1, WORKERS_MAX + 1))
_NUMBER_MAX = 1e9  # thirty years; what sleeps and clocks take ends at ten times that
_PUBLISH = {"create": False, "close": True}


def parse(texts: Iterable[str]) -> MountOptions:
    """Return the options in *texts*, each a list with commas; of two that contradict each other the later one counts.

    Raises:
        BadOption: one is unknown, or has no such value.
    """
    options = MountOptions()
    for text in texts:
        for item in text.split(","):
            options = _with(options, item)
    return options if options.as_of_ns is None else replace(options, writable=False)


def _with(options: MountOptions, item: str) -> MountOptions:
    name, equals, value = item.partition("=")
    if not item or name.lower().startswith("x-"):
        return options
    if equals:
        if name in _IGNORED_WITH_VALUE:
            return options
        match name:
            case "timeout":
                return replace(options, timeout_s=_number(item, value))
            case "sync_interval":
                return replace(options, sync_interval_s=_number(item, value, least=0.1))
            case "read_ahead":
                return replace(options, read_ahead_kib=int(_number(item, value)))
            case "workers":
                return replace(options, workers=_count(item, value))
            case "grace":
                return replace(options, grace_s=_number(item, value))
            case "retention":
                return replace(options, retention_s=_number(item, value))
            case "compact":
                return replace(options, compact_percent=_number(item, value, most=100.0))
            case "compact_rate":
                return replace(options, compact_rate_mib=_number(item, value, least=0.1))
            case "log" if value:
                return replace(options, log=value)
            case "publish":
                if value not in _PUBLISH:
                    raise BadOption(f"mount option {item!r}: publish is create or close")
                return replace(options, publish_at_close=_PUBLISH[value])
            case "asof":
                try:
                    return replace(options, as_of_ns=parse_moment(value, time.time_ns()))
                except BadTime as error:
                    raise BadOption(f"mount option {item!r}: {error}") from None
    elif name in _IGNORED:
        return options
    elif name in _KERNEL:
        return replace(options, kernel=options.kernel - {_KERNEL[name]} | {name})
    elif name == "allow_other":
        return replace(options, allow_other=True)
    elif name in ("xattr", "noxattr"):
        return replace(options, xattrs=name == "xattr")
    elif name in ("awake", "noawake"):
        return replace(options, awake=name == "awake")
    elif name in ("ro", "rw"):
        return replace(options, writable=name == "rw")
    raise BadOption(_complaint(name, item))


def _number(item: str, value: str, least: float = 0.0, most: float = _NUMBER_MAX) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise BadOption(f"mount option {item!r} needs a number from {least:g} to {most:g}")
    return number


def _count(item: str, value: str) -> int:
    if value not in _COUNTS:
        raise BadOption(f"mount option {item!r} needs a number from 1 to {WORKERS_MAX}")
    return int(value)


def _complaint(name: str, item: str) -> str:
    if name in _VALUES:
        return f"mount option {item!r} needs a value, as in {name}=..."
    if name in _FLAGS or name in _KERNEL or name in _IGNORED:
        return f"mount option {item!r} takes no value"
    near = difflib.get_close_matches(name, [*_FLAGS, *_VALUES, *_KERNEL, *_IGNORED], 1)
    return f"unknown mount option {item!r}" + (f"; did you mean {near[0]}?" if near else "")
