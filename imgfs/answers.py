"""What a handler may raise: errors become errnos here, and nowhere else.

Owns that translation. Must not know any handler.
"""

import errno
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from pyfuse3 import FUSEError

from imgfs.errors import ImgfsError, Spoiled

log = logging.getLogger(__name__)

T = TypeVar("T")

_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class Operations(Protocol):
    """What has the handlers."""

    find_room: Callable[[], Awaitable[bool]]
    """Have space given back; tell whether it is worth another try."""


def answered(handler: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Let *handler* raise nothing but FUSEError: any other exception would end pyfuse3's loop, and the mount."""

    async def handle(operations: Operations, *args: Any) -> T:
        try:
            return await handler(operations, *args)
        except ImgfsError as error:
            helps = error.errno in _OUT_OF_SPACE and not isinstance(error, Spoiled)
            if not helps or not await operations.find_room():
                raise
            return await handler(operations, *args)

    @functools.wraps(handler)
    async def answer(*args: Any) -> T:
        try:
            return await handle(*args)
        except FUSEError:
            raise
        except Exception as error:
            raise FUSEError(errno_of(error, handler.__name__)) from None

    return answer


def errno_of(error: Exception, what: str) -> int:
    """Return the errno that the request *what*, which raised *error*, is answered with; what is grave is logged."""
    if isinstance(error, ImgfsError):
        if error.errno == errno.EIO:
            log.error("%s: %s", what, error)
        return error.errno
    if isinstance(error, OSError):
        log.error("%s: %s", what, error)
        return errno.ENOSPC if error.errno in _OUT_OF_SPACE else errno.EIO
    log.error("%s failed; this is a bug in imgfs, the request was answered with EIO", what, exc_info=error)
    return errno.EIO


def all_answered(operations: type[T]) -> type[T]:
    """Wrap every handler of the class *operations* with `answered`."""
    for name, handler in list(vars(operations).items()):
        if inspect.iscoroutinefunction(handler) and not name.startswith("_"):
            setattr(operations, name, answered(handler))
    return operations
