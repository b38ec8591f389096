"""Where lines of the log go: standard error, the journal, a file, or the system log; each with its priority.

Owns their form. Must not know what is logged.

*Concurrency:* children inherit what is set here, and write whole lines.
"""

import logging
import logging.handlers
import os
import sys
from typing import TextIO

from imgfs.errors import MountFailed

SYSTEM_LOG = "/dev/log"

# The priorities of syslog(3), which the journal takes in angle brackets before a line.
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class _JournalFormatter(logging.Formatter):
    """Each line with its priority; the journal itself adds time, program and process."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is now, not to what it was when this was made."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def to_stderr(level: int = logging.INFO) -> None:
    """Log what is as important as *level* to standard error, with priorities if the journal reads it."""
    handler = _StderrHandler()
    if sys.stderr is not None and _is_journal(sys.stderr.fileno()):  # None where it is closed
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("imgfs: %(message)s"))
    _install(handler, level)


def to_background(path: str | None) -> None:
    """Log to the file at *path*, or else to the system log if there is one; standard error goes to the file too.

    Raises:
        MountFailed: the file cannot be written.
    """
    handler: logging.Handler
    if path is not None:
        try:
            with open(path, "ab") as file:
                os.dup2(file.fileno(), 2)  # for what Python itself says when it crashes
        except OSError as error:
            raise MountFailed(f"cannot write the log {path}: {error.strerror}") from None
        handler = logging.handlers.WatchedFileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s imgfs[%(process)d]: %(message)s"))
    elif os.path.exists(SYSTEM_LOG):
        handler = logging.handlers.SysLogHandler(SYSTEM_LOG, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter("imgfs[%(process)d]: %(message)s"))
    else:
        handler = logging.NullHandler()
    _install(handler)


def _is_journal(descriptor: int) -> bool:
    """Return whether the journal reads what is written to *descriptor*; it says which file that is."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    if not (device.isdigit() and inode.isdigit()):
        return False
    status = os.fstat(descriptor)
    return (status.st_dev, status.st_ino) == (int(device), int(inode))


def _install(handler: logging.Handler, level: int = logging.INFO) -> None:
    logging.basicConfig(level=level, handlers=[handler], force=True)
