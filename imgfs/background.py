"""Runs something as a daemon: away from the terminal, reporting to whoever waits whether it got under way.

Owns the two forks, the report, and where a daemon logs. Must not know what the daemon does.

*Concurrency:* forks before anything else is started.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from typing import NoReturn

from imgfs import errors, logs
from imgfs.errors import EXIT_FAILURE, EXIT_OK, ImgfsError, MountFailed

log = logging.getLogger(__name__)

_REPORT_BYTES_MAX = 65536


def in_background(serve: Callable[[Callable[[], None]], None], log_path: str | None) -> int:
    """Run *serve* in a daemon; return when it calls what it is given, raise what it raises before."""
    outcome, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(outcome)
        os.setsid()
        if os.fork() == 0:
            _be_daemon(serve, log_path, report)
        os._exit(EXIT_OK)
    os.close(report)
    os.waitpid(child, 0)
    # One message, or the end of the pipe: children of the daemon may have it open for longer.
    said = os.read(outcome, _REPORT_BYTES_MAX)
    os.close(outcome)
    if not said:
        raise MountFailed("the daemon died before the mount answered; its log may tell why")
    error = json.loads(said)
    if error is None:
        return EXIT_OK
    raise getattr(errors, error["name"])(error["text"])


def _be_daemon(serve: Callable[[Callable[[], None]], None], log_path: str | None, report: int) -> NoReturn:
    code = EXIT_FAILURE

    def tell(error: dict[str, str] | None) -> None:
        nonlocal report
        if report >= 0:
            with contextlib.suppress(BrokenPipeError):  # nobody waits any more
                os.write(report, json.dumps(error).encode())
            os.close(report)
            report = -1

    try:
        os.chdir("/")
        _leave_terminal(log_path)
        serve(lambda: tell(None))
        code = EXIT_OK
    except ImgfsError as error:
        code = error.exit_code
        log.error("%s", error)
        tell({"name": type(error).__name__, "text": str(error)})
    except BaseException as error:
        log.exception("the daemon ends")
        tell({"name": "MountFailed", "text": f"the daemon failed, which is a bug: {error!r}"})
    finally:
        logging.shutdown()
        os._exit(code)


def _leave_terminal(log_path: str | None) -> None:
    """Give up the standard files; log to *log_path*, or else to the system log."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    logs.to_background(log_path)
