"""Programs that run beside a bench until it is done with them: daemons, servers, whatever serves a mount.

Owns their processes, from the start to the last one of them. Must not know what they are.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.commands import Failed, environment, run
from imgfs import mountpoint

LOOPBACK = "127.0.0.1"
DEADLINE_S = 60.0
_POLL_S = 0.005
_PATIENCE_S = 5.0


class Server:
    """A program in the foreground of a session of its own, its words in a file."""

    def __init__(self, log: Path, *command: str | Path, mortal: bool = True) -> None:
        """Start *command*. If it is *mortal*, it dies with this process, however that ends."""
        self._log = log
        self._command = command
        # ^C is for the bench alone, which ends what it started in its own order.
        options: dict[str, Any] = {"env": environment(), "cwd": "/", "start_new_session": True}
        prefix = ("setpriv", "--pdeathsig", "KILL") if mortal else ()
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                (*prefix, *command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, ready: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        """Wait until *ready*. Failed if the program ends before, or it takes too long."""
        deadline = time.monotonic() + deadline_s
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"{self._command[0]} does not start: {self.said()}")
            time.sleep(_POLL_S)

    def said(self) -> str:
        """Return the last of what the program has printed."""
        return self._log.read_text(errors="replace").strip()[-600:]

    def has_said(self, text: str) -> bool:
        return text.encode() in self._log.read_bytes()

    def wait(self) -> int:
        """Wait until it ends by itself; return its exit status."""
        return self._process.wait(DEADLINE_S)

    def kill(self) -> None:
        """Kill it and whatever it has started, without waiting: `stop` has to follow."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self, *, gently: bool = True) -> None:
        """End it, and whatever it has started."""
        if self._process.poll() is None and gently:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DEADLINE_S)
        self.kill()
        self._process.wait()


class MountServer(Server):
    """A program that serves a mount, and ends when that is unmounted."""

    def __init__(self, point: Path, *command: str | Path, mortal: bool = True) -> None:
        """Start *command*; `wait_until` with `mounted` tells when its mount is there."""
        point.mkdir()
        self.point = point
        super().__init__(point.with_suffix(".log"), *command, mortal=mortal)

    def mounted(self) -> bool:
        return self.point.is_mount()

    def unmount(self) -> None:
        """Unmount it and wait for its end. Failed if it ends with an error."""
        unmount(self.point)
        if status := self.wait():
            raise Failed(f"{self._command[0]} ended with {status}: {self.said()}")

    def stop(self, *, gently: bool = True) -> None:
        """End it, and take the mount away."""
        while mountpoint.find(str(self.point)):
            run("umount", "-l", self.point)
            if gently:
                # Most end by that, sooner than by a signal.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_PATIENCE_S)
        super().stop(gently=gently)
        if self.point.exists():
            self.point.rmdir()


def unmount(point: Path) -> None:
    """Unmount; whoever looks at every new mount, as a desktop does, gets a moment to finish."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            run("umount", point)
            return
        except Failed:
            if time.monotonic() > deadline or not os.path.ismount(point):
                raise
            time.sleep(_POLL_S * 20)


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback that nobody has."""
    probes = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def listens(port: int) -> bool:
    """Return whether somebody answers at *port* of the loopback."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0
