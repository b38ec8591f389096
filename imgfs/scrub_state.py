"""How far a scrub is, and what the last one found: `scrub.json`.

Owns the file. Must not know how a store is scrubbed.

*Concurrency:* written by whoever holds the scrub's lock, in one durable step; anybody may read it.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from imgfs.disk import Disk
from imgfs.format import IndexState
from imgfs.state_file import read_state_file, write_state_file

PROGRESS = "scrub.json"
_FORMAT = 1


@dataclass(frozen=True)
class Round:
    """What one reading of the whole store came to, or has come to so far."""

    started_ns: int
    finished_ns: int = 0
    read_bytes: int = 0
    needles: int = 0
    damaged_places: int = 0


@dataclass
class State:
    """Where the round in hand is, and what the last one that was finished came to."""

    now: Round | None = None
    last: Round | None = None
    volume: int = 0
    position: IndexState = field(default_factory=lambda: IndexState(0, 0, 0, 0, 0))
    """How far *volume* was read, and its index with it; the end is 0 where all of it was."""


def read_state(store_path: str, disk: Disk) -> State:
    """Return what the file of that store says; one that says nothing sensible is as good as none."""
    path = f"{store_path}/{PROGRESS}"
    return read_state_file(disk, path, _FORMAT, _state, "the next scrub begins anew") or State()


def _state(content: dict[str, Any]) -> State:
    position = IndexState(**content["position"])
    if not all(isinstance(value, int) and value >= 0 for value in (content["volume"], *position)):
        raise TypeError("position")
    return State(_round(content["now"]), _round(content["last"]), content["volume"], position)


def write_state(store_path: str, disk: Disk, state: State) -> None:
    """Make *state* durable. OSError as the disk says."""
    content = {
        "now": asdict(state.now) if state.now is not None else None,
        "last": asdict(state.last) if state.last is not None else None,
        "volume": state.volume,
        "position": state.position._asdict(),
    }
    write_state_file(disk, f"{store_path}/{PROGRESS}", _FORMAT, content)


def _round(fields: dict[str, int] | None) -> Round | None:
    if fields is None:
        return None
    found = Round(**fields)
    if not all(isinstance(value, int) and value >= 0 for value in asdict(found).values()):
        raise TypeError("round")
    return found
