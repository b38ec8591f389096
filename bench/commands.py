"""Programs that a bench runs to their end, in an environment of their own."""

import os
import subprocess
import sys
from pathlib import Path

from bench.result import PROJECT


class Failed(Exception):
    """A bench cannot run here, or what it ran failed."""


def environment() -> dict[str, str]:
    """Return the environment of what benches start: nothing of the user's, and this project's code."""
    # Debian keeps mkfs and losetup where a user's PATH does not look.
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    return {"PATH": path, "PYTHONPATH": str(PROJECT), "LC_ALL": "C.UTF-8"}


def run(*command: str | Path, deadline_s: float = 3600.0, quietly: bool = False) -> str:
    """Run *command* to its end and return its standard output, nothing if *quietly*. Failed if it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quietly else subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=deadline_s,
        check=False,
        env=environment(),
        cwd="/",
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise Failed(f"{' '.join(map(str, command))} ended with {done.returncode}: {said}")
    return (done.stdout or b"").decode(errors="replace")


def status(*command: str | Path) -> int:
    """Run *command* to its end, whatever that is; return its exit status, negative after a signal."""
    null = subprocess.DEVNULL
    return subprocess.run(
        command, stdin=null, stdout=null, stderr=null, check=False, env=environment(), cwd="/"
    ).returncode


def python(module: str, *arguments: str | Path) -> str:
    """Run a module of this project in a process of its own and return its standard output."""
    return run(sys.executable, "-m", module, *arguments)


def imgfs(*arguments: str | Path) -> str:
    """Run the command line of imgfs."""
    return python("imgfs", *arguments)
