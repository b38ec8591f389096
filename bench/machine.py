"""Names the machine and the software that a result was measured with."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import imgfs

_PACKAGES = ("pyfuse3", "trio", "numpy", "xxhash", "crc32c")


def describe(directory: Path) -> dict[str, str]:
    """Return what matters of this machine, and of the file system that *directory* lies on."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": f"{_cpu()} x {os.cpu_count()}",
        "memory": f"{memory_bytes / (1 << 30):.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "below": f"scratch on {_file_system(directory)}",
        "python": f"Python {platform.python_version()} ({_build()})",
        "imgfs": f"imgfs {imgfs.__version__}",
        "libfuse": f"libfuse {_output('pkg-config', '--modversion', 'fuse3') or 'of unknown version'}",
    } | {name: f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES}


def _build() -> str:
    """Return whether this Python was built with profile-guided optimisation, which makes it up to 1.4 times as fast."""
    if "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS")):
        return "built with PGO"
    # Debian takes the flags of its profile-guided build out of what it ships.
    if sys.base_prefix == "/usr" and Path("/etc/debian_version").exists():
        return "Debian's, built with PGO"
    return "built without PGO"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _file_system(directory: Path) -> str:
    return _output("stat", "--file-system", "--format", "%T", str(directory)) or "an unknown file system"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
