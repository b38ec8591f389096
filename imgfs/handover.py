"""What a running mount hands to the release that takes its place: descriptors, and what belongs to them.

Owns the form of it, how the other release is started, and where it is read what became of an upgrade. Must not know
what is done with it. A release that cannot read it says so when it is tried, and the old one goes on.

*Concurrency:* the descriptors are inherited over exec; whoever has them has the mount.
"""

import dataclasses
import json
import os
import sys
import time
from typing import Any, NoReturn, Self

from imgfs import mountpoint
from imgfs.errors import Busy, MountFailed
from imgfs.options import MountOptions

# Also of what board.py shares.
VERSION = 1
_MODULE = "imgfs.takeover"
_STATUS_NAME = "imgfs-status"
_STATUS_BYTES_MAX = 4096
_STATE_BYTES_MAX = 1 << 20
# Importing and trying take a second; a machine may be busy.
_UPGRADE_S = 120.0
_POLL_S = 0.02

TRY = "try"
GO = "go"


@dataclasses.dataclass(frozen=True)
class Handover:
    """Numbers are descriptors."""

    store_path: str
    path: str
    """The mountpoint."""
    options: MountOptions
    in_background: bool
    device: int
    memory: int
    lock: int | None
    status: int
    board: int
    workers: dict[int, int]
    """The workers of the old release, which serve until the new one is ready: number by pid."""
    maintenance: int
    init: bytes
    device_number: str
    """major:minor of the mount, by which it is known in the mount table."""

    def write(self) -> int:
        """Return a descriptor of a file from which `read` makes this again."""
        fields: dict[str, Any] = dataclasses.asdict(self)
        options = {**fields["options"], "kernel": sorted(self.options.kernel)}
        fields |= {"options": options, "init": self.init.hex()}
        descriptor = os.memfd_create("imgfs-handover", os.MFD_CLOEXEC)
        os.write(descriptor, json.dumps({"version": VERSION, **fields}).encode())
        return descriptor

    @classmethod
    def read(cls, descriptor: int) -> Self:
        """Return what another release has written.

        Raises:
            MountFailed: this release does not understand it.
        """
        try:
            fields = json.loads(os.pread(descriptor, _STATE_BYTES_MAX, 0))
            version = fields.pop("version")
            if version != VERSION:
                raise MountFailed(f"the running release hands over by version {version}, this one takes {VERSION}")
            options = MountOptions(**{**fields["options"], "kernel": frozenset(fields["options"]["kernel"])})
            workers = {int(pid): number for pid, number in fields["workers"].items()}
            return cls(**{**fields, "options": options, "workers": workers, "init": bytes.fromhex(fields["init"])})
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise MountFailed(f"the running release says something this one does not understand: {error!r}") from None

    def descriptors(self) -> list[int]:
        """Return those that the other release needs."""
        return [fd for fd in (self.device, self.memory, self.lock, self.status, self.board) if fd is not None]


def become(state: Handover, mode: str) -> NoReturn:
    """Put the installed release in the place of this process, to `TRY` *state*, or to `GO` on with it."""
    descriptor = state.write()
    for inherited in [*state.descriptors(), descriptor]:
        os.set_inheritable(inherited, True)
    os.execv(sys.executable, [sys.executable, "-m", _MODULE, mode, str(descriptor)])


# -- what became of it ------------------------------------------------------------------------------------------------


def make_status() -> int:
    """Return a descriptor of the file that says what became of upgrades; it can be found through /proc."""
    return os.memfd_create(_STATUS_NAME, os.MFD_CLOEXEC)


def tell(status: int, outcome: str) -> None:
    """Say that one more attempt has ended; *outcome* is nothing, or why it failed."""
    attempts, _, _ = os.pread(status, _STATUS_BYTES_MAX, 0).decode().partition("\n")
    os.pwrite(status, f"{int(attempts or 0) + 1}\n{outcome}\0".encode(errors="backslashreplace"), 0)


def ask(mountpoint_path: str) -> None:
    """Have the daemon that serves *mountpoint_path* put the installed release in its place; return when it has.

    Raises:
        MountFailed: there is no mount, or the new release failed its trial; the old one goes on serving.
        Busy: the daemon does not answer.
    """
    path = mountpoint.canonical(mountpoint_path)
    mount = mountpoint.find(path)
    if mount is None or mount.type != mountpoint.FILESYSTEM_TYPE:
        raise MountFailed(f"no store is mounted at {path}")
    daemon = mountpoint.daemon_of(mount)
    if daemon is None:
        raise MountFailed(f"the daemon that serves {path} cannot be found; ask as its user, or as root")
    before, _ = _status_of(daemon)
    os.kill(daemon, mountpoint.UPGRADE)
    deadline = time.monotonic() + _UPGRADE_S
    while True:
        attempts, outcome = _status_of(daemon)
        if attempts != before:
            break
        if time.monotonic() > deadline:
            raise Busy(f"process {daemon} has not said within {_UPGRADE_S:.0f} s what became of the upgrade")
        time.sleep(_POLL_S)
    if outcome:
        raise MountFailed(f"{path} is served by the old release: {outcome}")


def _status_of(daemon: int) -> tuple[int, str]:
    """Return how many attempts have ended, and how the last one did."""
    directory = f"/proc/{daemon}/fd"
    for name in os.listdir(directory):
        try:
            if not os.readlink(f"{directory}/{name}").startswith(f"/memfd:{_STATUS_NAME}"):
                continue
            with open(f"{directory}/{name}", "rb", buffering=0) as file:
                text = os.pread(file.fileno(), _STATUS_BYTES_MAX, 0).partition(b"\0")[0].decode()
        except FileNotFoundError:
            continue  # closed meanwhile
        attempts, _, outcome = text.partition("\n")
        return int(attempts or 0), outcome
    raise MountFailed(f"process {daemon} is not a daemon that can be upgraded")
