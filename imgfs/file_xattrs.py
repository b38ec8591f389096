"""Carries extended attributes between files and a store: which of them go along, and what to say of those that cannot.

Owns that choice. Must not know what else a copy takes along.

*Concurrency:* see `transfer`.
"""

import errno
import os

from imgfs.errors import Damaged, InvalidArgument, NameTooLong, StoreLimit
from imgfs.format import pack_xattrs
from imgfs.store import Store
from imgfs.transfer import Observer, Tally, reason
from imgfs.xattrs import ALL_BYTES_MAX

_USER = b"user."
# As with owners, what only root may set goes along only for root.
_SPACES_OF_ROOT = (_USER, b"trusted.", b"security.")
# What XFS also calls its access control lists, and what only the kernel may write.
_NEVER = (b"trusted.SGI_ACL_", b"security.evm")
_UNKNOWN = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


class FileXattrs:
    """The extended attributes of one copy, in one direction or the other."""

    def __init__(self, store: Store, tally: Tally, observer: Observer) -> None:
        self._store = store
        self._tally = tally
        self._observer = observer
        self._spaces = _SPACES_OF_ROOT if os.geteuid() == 0 else (_USER,)
        self._refused: set[bytes] = set()

    def has_none(self, file: int) -> bool:
        """Return whether the open *file* surely has none that `bring_in` would bring in, or complain of."""
        try:
            found = os.listxattr(file)
        except OSError as error:
            return error.errno in _UNKNOWN
        return not any(map(self._goes_along, map(os.fsencode, found)))

    def bring_in(self, file: int | bytes, path: bytes, inode: int, *, fresh: bool) -> None:
        """Give *inode* those of *file*, open or a path, and unless it is *fresh* take away others it has."""
        try:
            found = os.listxattr(file) if isinstance(file, int) else os.listxattr(file, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                self._incomplete(path, f"extended attributes: {reason(error)}")
                return
            found = []
        if not found and (fresh or not self._store.has_xattrs(inode)):
            return
        wanted: dict[bytes, bytes] = {}
        problems: dict[bytes, str] = {}
        for name in filter(self._goes_along, map(os.fsencode, found)):
            try:
                wanted[name] = _get(file, name)
            except OSError as error:
                problems[name] = reason(error)
        if len(pack_xattrs(wanted)) > ALL_BYTES_MAX:
            problems |= dict.fromkeys(wanted, "together they have more than 1 MiB")
            wanted = {}
        try:
            for name in [] if fresh else self._store.list_xattrs(inode):
                if self._goes_along(name) and name not in wanted and name not in problems:
                    self._store.remove_xattr(inode, name)
            for name, value in wanted.items():
                try:
                    self._store.set_xattr(inode, name, value)
                except (InvalidArgument, NameTooLong, StoreLimit) as error:
                    problems[name] = str(error)
        except Damaged as error:
            # Those that the inode has are in the way of new ones.
            problems |= dict.fromkeys(wanted, str(error))
        self._complain(path, problems)

    def take_out(self, inode: int, file: int | bytes, path: bytes) -> None:
        """Give *file*, open or a path, those of *inode*; others that it has stay."""
        if not self._store.has_xattrs(inode):
            return
        problems: dict[bytes, str] = {}
        try:
            for name in filter(self._goes_along, self._store.list_xattrs(inode)):
                space = name.partition(b".")[0]
                try:
                    _set(file, name, self._store.get_xattr(inode, name))
                except OSError as error:
                    if error.errno in _UNKNOWN or (error.errno == errno.EPERM and space + b"." != _USER):
                        # It will be so for all: say it once.
                        if space not in self._refused:
                            problems[name] = f"{reason(error)}, nor any of {os.fsdecode(space)} on others"
                            self._refused.add(space)
                        else:
                            self._tally.incomplete += 1
                        continue
                    problems[name] = reason(error)
        except Damaged as error:
            self._tally.damaged += 1
            self._incomplete(path, f"extended attributes: {error}")
        self._complain(path, problems)

    def _goes_along(self, name: bytes) -> bool:
        return name.startswith(self._spaces) and not name.startswith(_NEVER)

    def _complain(self, path: bytes, problems: dict[bytes, str]) -> None:
        if problems:
            listed = "; ".join(f"{os.fsdecode(name)}: {why}" for name, why in problems.items())
            self._incomplete(path, f"extended attribute {listed}")

    def _incomplete(self, path: bytes, why: str) -> None:
        self._tally.incomplete += 1
        self._observer.incomplete(path, why)


def _get(file: int | bytes, name: bytes) -> bytes:
    return os.getxattr(file, name) if isinstance(file, int) else os.getxattr(file, name, follow_symlinks=False)


def _set(file: int | bytes, name: bytes, value: bytes) -> None:
    if isinstance(file, int):
        os.setxattr(file, name, value)
    else:
        os.setxattr(file, name, value, follow_symlinks=False)
