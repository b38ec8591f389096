"""How a process that the supervisor forks begins and ends.

Owns what it must not inherit: signals, and a life longer than its parent's. Must not know what it does.

*Concurrency:* forks only while the parent has one thread.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import time
from collections.abc import Callable

from imgfs.errors import EXIT_BUG, EXIT_OK, ImgfsError

log = logging.getLogger(__name__)

# Interrupts a system call, and does nothing else.
NUDGE = signal.SIGUSR2
DUMP = signal.SIGUSR1
# Writing the stacks of all threads takes a process less.
_DUMP_S = 0.05
_DUMP_BYTES_MAX = 1 << 20

_POLL_S = 0.0005
# So long a killed process may take to be gone, where it does not wait for a disk.
_DEATH_S = 5.0

_PR_SET_NAME = 15
_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
# They reach a whole process group, such as that of a terminal; what is to be done is for the supervisor to say.
_FOR_THE_SUPERVISOR = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_TIMER_SLACK_NS = 1_000

# Loaded before the first fork: afterwards there is no time.
_libc = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """Have this process, a child of *parent*, killed when that dies; if it is dead by now, end here."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_OK)  # it died before this could be said


def fork(name: str, work: Callable[[], None], dump_file: int = 2, said: int | None = None) -> int:
    """Run *work* in a child that dies with this process; return its pid.

    It exits with 0, or with the code of the ImgfsError that it raised, having written it to the file *said*, or else
    logged it. *name*: as `ps` shows it. On `DUMP` it writes the stacks of its threads to *dump_file*.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = EXIT_BUG
    try:
        die_with(parent)
        # A wait of some microseconds shall not become one of fifty more.
        _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_TIMER_SLACK_NS))
        _libc.prctl(_PR_SET_NAME, f"imgfs: {name}".encode()[:15])
        for number in _FOR_THE_SUPERVISOR:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(NUDGE, lambda *_: None)
        faulthandler.register(DUMP, file=dump_file, all_threads=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        work()
        code = EXIT_OK
    except ImgfsError as error:
        code = error.exit_code
        if said is None:
            log.error("%s", error)
        else:
            os.pwrite(said, str(error).encode(errors="backslashreplace"), 0)
    except BaseException:
        log.exception("the %s ends", name)
    finally:
        logging.shutdown()
        os._exit(code)


def wait(pid: int, patience_s: float = _DEATH_S) -> int:
    """Wait for the child *pid*; return its exit code, or kill it if it takes too long."""
    deadline = time.monotonic() + patience_s
    killed = False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            if killed:
                return -signal.SIGKILL  # it waits for a disk; init will bury it
            os.kill(pid, signal.SIGKILL)
            killed, deadline = True, time.monotonic() + _DEATH_S
        time.sleep(_POLL_S)


def stacks(pid: int, dump_file: int) -> list[str]:
    """Return what all threads of the child *pid*, forked with that *dump_file*, are doing, in lines."""
    os.ftruncate(dump_file, 0)
    os.lseek(dump_file, 0, os.SEEK_SET)
    os.kill(pid, DUMP)
    time.sleep(_DUMP_S)
    return os.pread(dump_file, _DUMP_BYTES_MAX, 0).decode(errors="replace").splitlines()


def is_stopped(pid: int) -> bool:
    """Return whether the process *pid* was stopped, as by SIGSTOP."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except OSError:
        return False


def died(code: int) -> str:
    """Return how a process ended that exited with *code*, negative for a signal, as a part of a sentence."""
    if code >= 0:
        return f"ended with code {code}"
    return f"died of {signal.Signals(-code).name}"


def oom_kills() -> int:
    """Return how many processes the kernel has killed because there was no memory."""
    try:
        with open("/proc/vmstat", encoding="utf-8") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0
