"""Brings things back from the trash: which ones somebody means, where to, and the directories they need.

Owns that choice and its order. Must not know how anything is written, nor how a failure is shown.

*Concurrency:* none.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from imgfs.errors import Damaged, Exists, ImgfsError, NotADirectory, NotFound, StoreFull, disk_error
from imgfs.format import Kind
from imgfs.history import Attributes, History
from imgfs.restore_targets import Content, Target
from imgfs.trash import Gone

_ID = re.compile(r"\d+:\d+")


@dataclass(frozen=True)
class Wanted:
    """One thing to bring back, to *path* of the store, whose last *depth* directories are those it lay in."""

    gone: Gone
    path: bytes
    depth: int
    among_others: bool = False
    """Whether all below a directory was asked for, and not this by itself."""


@dataclass
class Restored:
    """What came of it."""

    images: int = 0
    data_bytes: int = 0
    directories: int = 0
    left: int = 0
    """Below directories that were asked for: names that something else has now."""
    failed: int = 0


def choose(trash: Sequence[Gone], what: Iterable[str], into: bytes | None) -> list[Wanted]:
    """Return what of the *trash* is meant by *what*, each the id or path of something, or the path of a directory.

    Of several with one path the latest counts. *into* is the directory to bring them to in place of their own.

    Raises:
        NotFound: one of *what* means nothing.
    """
    by_id = {gone.id: gone for gone in trash}
    wanted: dict[bytes, Wanted] = {}
    for text in what:
        if _ID.fullmatch(text) and text in by_id:
            chosen = [_wanted(by_id[text], by_id[text].path.count(b"/"), into)]
        else:
            chosen = _at(trash, _normal(text), into)
        if not chosen:
            raise NotFound(f"{text} is not in the trash; imgfs trash list shows what is")
        for each in chosen:
            wanted[each.path] = each
    return sorted(wanted.values(), key=lambda each: each.path)


def _normal(text: str) -> bytes:
    return b"/".join(name for name in os.fsencode(text).split(b"/") if name not in (b"", b"."))


def _at(trash: Sequence[Gone], path: bytes, into: bytes | None) -> list[Wanted]:
    """Return the latest of what had *path*, or lay below it."""
    latest: dict[bytes, Gone] = {}
    for gone in trash:
        if not path or gone.path == path or gone.path.startswith(path + b"/"):
            latest[gone.path] = gone
    itself = latest.get(path)
    if itself is not None and itself.kind != Kind.DIRECTORY:
        if itself is max(latest.values(), key=lambda gone: gone.moment):
            return [_wanted(itself, path.count(b"/"), into)]
        del latest[path]  # there was a directory of that name later
    above = path.count(b"/")
    return [_wanted(gone, above, into, among_others=gone.path != path) for gone in latest.values()]


def _wanted(gone: Gone, above: int, into: bytes | None, *, among_others: bool = False) -> Wanted:
    """Return *gone*, to be brought *into* a directory without the first directories of its path, so many *above*."""
    names = gone.path.split(b"/")
    if into is None:
        return Wanted(gone, gone.path, len(names) - 1, among_others)
    kept = names[above:]
    return Wanted(gone, b"/".join([into, *kept] if into else kept), len(kept) - 1, among_others)


@dataclass
class Restore:
    """One run: puts what is wanted into *target*; *complain* is told of a path and what is wrong with it."""

    history: History
    target: Target
    complain: Callable[[bytes, str], object]
    force: bool = False
    default: Attributes = field(default_factory=lambda: Attributes(os.geteuid(), os.getegid(), 0o755, 0))
    """Of directories that the trash knows nothing of."""
    _restored: Restored = field(init=False, default_factory=Restored)
    # The directories that were made, and how old they were.
    _made: dict[bytes, int] = field(init=False, default_factory=dict)
    # By path, the moment at which the first of what is wanted went from there: the times that a directory had
    # before tell more than those in between.
    _first: dict[bytes, int] = field(init=False, default_factory=dict)

    def run(self, wanted: Sequence[Wanted]) -> Restored:
        """Bring back all that is *wanted*, which is sorted by path; durable when this returns.

        What cannot be brought back is complained of, and left out.

        Raises:
            StoreFull: the disk is full; what was brought back is whole.
        """
        for each in wanted:
            path = each.path
            while path:
                self._first[path] = min(self._first.get(path, each.gone.moment), each.gone.moment)
                path = path.rpartition(b"/")[0]
        for each in wanted:
            try:
                self._bring_back(each)
            except StoreFull:
                raise
            except ImgfsError as error:
                self._fail(each, error)
            except OSError as error:
                failure = disk_error(error, os.fsdecode(each.path))
                if isinstance(failure, StoreFull):
                    raise failure from error
                self._fail(each, error.strerror or error)
        for path, mtime_ns in sorted(self._made.items(), reverse=True):
            if mtime_ns:
                self.target.set_time(path, mtime_ns)
        self.target.finish()
        return self._restored

    def _fail(self, each: Wanted, why: object) -> None:
        if isinstance(why, Exists) and each.among_others:
            self._restored.left += 1
            return
        text = f"{why}; bring it back in its place with --force, or elsewhere with --to"
        self.complain(each.path, text if isinstance(why, Exists) else str(why))
        self._restored.failed += 1

    def _bring_back(self, each: Wanted) -> None:
        gone = each.gone
        self._make_directories(each)
        if gone.kind == Kind.DIRECTORY:
            if not self._is_there(each.path):
                self._make_directory(each.path, gone.put, gone.moment)
            return
        lost = []
        try:
            xattrs = self.history.xattrs(gone.put, gone.moment)
        except Damaged as error:
            xattrs = {}
            lost.append(f"extended attributes: {error}")
        pieces = self.history.pieces(gone.put) if gone.kind != Kind.SPECIAL else ()
        content = Content(gone.kind, gone.attributes, gone.size, gone.device, pieces, xattrs)
        lost += self.target.put(each.path, content, replace=self.force)
        self._tell(each.path, lost)
        self._restored.images += 1
        self._restored.data_bytes += gone.size

    def _make_directories(self, each: Wanted) -> None:
        """Make the directories above *each* that are not there, as those were that it lay in."""
        names = each.path.split(b"/")[:-1]
        lay_in = self.history.ancestors(each.gone.naming, each.gone.moment)
        lay_in = lay_in[len(lay_in) - each.depth :] if each.depth else []
        for depth in range(1, len(names) + 1):
            path = b"/".join(names[:depth])
            if path in self._made or self._is_there(path):
                continue
            known = depth - 1 - (len(names) - len(lay_in))
            put = self.history.directory(lay_in[known], each.gone.moment) if known >= 0 else -1
            self._make_directory(path, put, each.gone.moment)

    def _is_there(self, path: bytes) -> bool:
        there = self.target.is_directory(path)
        if there is False:
            raise NotADirectory(f"/{os.fsdecode(path)} is no directory any more")
        return bool(there)

    def _make_directory(self, path: bytes, put: int, moment: int) -> None:
        """Make the directory at *path*, as the one was at *moment* that row *put* had put; -1: that is not known."""
        lost: list[str] = []
        attributes, xattrs = self.default, {}
        if put >= 0:
            first = self._first.get(path, moment)
            attributes = self.history.directory_attributes(put, first if first > put else moment)
            try:
                xattrs = self.history.xattrs(put, moment)
            except Damaged as error:
                lost.append(f"extended attributes: {error}")
        lost += self.target.make_directory(path, attributes, xattrs)
        self._tell(path, lost)
        self._made[path] = attributes.mtime_ns
        self._restored.directories += 1

    def _tell(self, path: bytes, lost: list[str]) -> None:
        if lost:
            self.complain(path, "restored without: " + "; ".join(lost))
