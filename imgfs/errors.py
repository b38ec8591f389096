"""What can go wrong, by name: each error has an errno for FUSE and an exit code for the command line.

Owns the numbers that leave the program. Knows nothing of the store or of FUSE.
"""

import errno
from typing import ClassVar

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_DAMAGED = 3
EXIT_REPAIRED = 4
EXIT_BUSY = 5
EXIT_NO_STORE = 6
EXIT_NEWER_FORMAT = 7
EXIT_NO_SPACE = 8
EXIT_MOUNT = 9
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
# What a shell shows for a program that these signals ended: SIGINT and SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

EXIT_CODES = {
    EXIT_OK: "done; for check and scrub: the store is clean",
    EXIT_FAILURE: "failed, or a copy or repair left something out, for the reason it printed",
    EXIT_USAGE: "the command line was wrong",
    EXIT_DAMAGED: "damage was found; what is whole is still served",
    EXIT_REPAIRED: "check: something was rebuilt or repaired, or is to be; nothing is damaged",
    EXIT_BUSY: "the store or the mountpoint is in use",
    EXIT_NO_STORE: "there is no store at that path",
    EXIT_NEWER_FORMAT: "the store needs a newer release of imgfs",
    EXIT_NO_SPACE: "the disk is full",
    EXIT_MOUNT: "the mount failed",
    EXIT_BUG: "a bug in imgfs; the lines above the last one say where",
    EXIT_INTERRUPTED: "interrupted",
    EXIT_BROKEN_PIPE: "whoever read the output is gone",
}


class ImgfsError(Exception):
    """Base of all errors raised on purpose; its text is one line that says what to do."""

    errno: ClassVar[int] = errno.EIO
    exit_code: ClassVar[int] = EXIT_FAILURE


class NotFound(ImgfsError):
    """No entry of that name."""

    errno = errno.ENOENT


class Exists(ImgfsError):
    """The name is taken."""

    errno = errno.EEXIST


class NotADirectory(ImgfsError):
    """A directory was needed."""

    errno = errno.ENOTDIR


class IsADirectory(ImgfsError):
    """Anything but a directory was needed."""

    errno = errno.EISDIR


class NotEmpty(ImgfsError):
    """The directory still has entries."""

    errno = errno.ENOTEMPTY


class NameTooLong(ImgfsError):
    """A name has at most 255 bytes."""

    errno = errno.ENAMETOOLONG


class InvalidArgument(ImgfsError):
    """The call makes no sense, such as moving a directory into itself."""

    errno = errno.EINVAL


class Stale(ImgfsError):
    """The inode number belongs to an image that is gone; look its name up again."""

    errno = errno.ESTALE


class BadHandle(ImgfsError):
    """The file handle is not open, or not for this."""

    errno = errno.EBADF


class TooLarge(ImgfsError):
    """An image has at most 4 GiB - 1 bytes."""

    errno = errno.EFBIG


class TooManyLinks(ImgfsError):
    """An image has as many names as it can have."""

    errno = errno.EMLINK


class NoAttribute(ImgfsError):
    """There is no extended attribute of that name."""

    errno = errno.ENODATA


class NotSupported(ImgfsError):
    """Nothing of this kind is kept."""

    errno = errno.EOPNOTSUPP


class TooManyOpen(ImgfsError):
    """Every slot for open images, or for images being written, is taken."""

    errno = errno.ENFILE


class ReadOnly(ImgfsError):
    """The store was opened for reading only."""

    errno = errno.EROFS


class StoreFull(ImgfsError):
    """No room on the disk; the store is as it was before the call."""

    errno = errno.ENOSPC
    exit_code = EXIT_NO_SPACE


class Spoiled(StoreFull):
    """A write to this image found no room; it cannot be closed as whole, and no room that comes later helps it."""


class StoreLimit(ImgfsError):
    """A limit of the format is reached (images, owners, or volumes); the store is as it was before the call."""

    errno = errno.EOVERFLOW


class Damaged(ImgfsError):
    """Bytes on the disk are not those that were written."""

    errno = errno.EIO
    exit_code = EXIT_DAMAGED


class DiskFailure(ImgfsError):
    """The disk refused a call; the text names the file and the reason."""

    errno = errno.EIO


class NoStore(ImgfsError):
    """There is no store at that path."""

    errno = errno.ENOENT
    exit_code = EXIT_NO_STORE


class NewerFormat(ImgfsError):
    """The store was written by a newer release."""

    errno = errno.EPROTO
    exit_code = EXIT_NEWER_FORMAT


class OtherLayout(ImgfsError):
    """The table in memory was made by another release; the store has to be opened anew."""

    errno = errno.EPROTO
    exit_code = EXIT_NEWER_FORMAT


class Busy(ImgfsError):
    """Another process has the store or the mountpoint."""

    errno = errno.EBUSY
    exit_code = EXIT_BUSY


class MountFailed(ImgfsError):
    """The kernel or fusermount3 refused the mount."""

    errno = errno.EIO
    exit_code = EXIT_MOUNT


def disk_error(error: OSError, path: str) -> ImgfsError:
    """Return the error that says what the disk said about the file at *path*."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull("the disk is full: delete images or add space")
    return DiskFailure(f"{path}: {error.strerror or error}")
