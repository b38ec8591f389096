"""`imgfs import` and `imgfs export`: whole trees in and out, past the mount.

Owns what is printed about a copy, and how an interrupt reaches it. Must not copy anything itself.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from imgfs.cli.opening import open_store
from imgfs.cli.progress import Progress, rate
from imgfs.cli.text import complain, counted, echo, not_empty, one_line, path_argument
from imgfs.errors import EXIT_DAMAGED, EXIT_FAILURE, InvalidArgument, NotEmpty
from imgfs.export_tree import export_tree
from imgfs.import_tree import import_tree, measure_tree
from imgfs.mountpoint import FILESYSTEM_TYPE, mounts
from imgfs.transfer import Tally, Totals


def _inside(text: str) -> str:
    if ".." in text.split("/"):
        raise click.BadParameter(f"'{text}' leads out of the store; paths there start at its top")
    return text


quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress and no summary, only what failed.")


@click.command("import")
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False), callback=not_empty)
@path_argument("store_path", "STORE")
@click.option(
    "--into",
    metavar="PATH",
    callback=not_empty,
    type=_inside,
    help="The directory of the store to copy into; made if missing.",
)
@click.option("--resume", is_flag=True, help="Leave out images that are there with the same size and time.")
@quiet_option
def import_command(directory: str, store_path: str, into: str | None, resume: bool, quiet: bool) -> None:
    """Copy what is in DIR into STORE: all kinds of files, with their hard links, as `cp -a DIR/. STORE/` would.

    Modes, times to the nanosecond, extended attributes and, for root, owners are kept. An image of the same name is
    replaced. The store must not be mounted; into a mounted one, copy with `cp -a`. After Ctrl-C all that was
    imported is whole.

    \b
    Example:
      imgfs import ~/Pictures /srv/photos.imgfs --into 2024
    """
    source = os.fsencode(directory)
    if is_in_mount_of(store_path, directory):
        raise InvalidArgument(f"{directory} lies in a mount of {store_path}, which cannot be imported into itself")
    with open_store(store_path, writable=True) as store, _deferred_interrupt() as interrupt:
        totals = Totals(0, 0)
        with Progress("counting", sys.stderr, quiet=quiet) as progress:
            # Only who is shown how far it is needs to know how far it goes.
            for totals in () if quiet else measure_tree(source):
                progress.show(*totals)
                interrupt.check()
        copy = _Copy("import", totals, interrupt, quiet=quiet)
        with copy.watched("in the store"):
            import_tree(store, source, copy, into=os.fsencode(into or ""), resume=resume)
    copy.finish()


@click.command("export")
@path_argument("store_path", "STORE")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False), callback=not_empty)
@click.option("--force", is_flag=True, help="Export into a DIR that is not empty; files of the same name are replaced.")
@quiet_option
def export_command(store_path: str, directory: str, force: bool, quiet: bool) -> None:
    """Copy all of STORE into DIR, which is made if it is missing.

    Hard links, modes, times, extended attributes and, for root, owners come out as they went in. A damaged image is
    left out and named, and the exit code is 3; the rest is exported. The store may be mounted meanwhile.

    \b
    Example:
      imgfs export /srv/photos.imgfs /backup/photos
    """
    if not force and os.path.isdir(directory) and os.listdir(directory):
        raise NotEmpty(f"{directory} is not empty; name another directory, or export into this one with --force")
    with open_store(store_path) as store, _deferred_interrupt() as interrupt:
        counts = store.counts()
        copy = _Copy("export", Totals(counts.images, counts.live_bytes), interrupt, quiet=quiet)
        with copy.watched(f"in {directory}"):
            export_tree(store, os.fsencode(directory), copy)
    copy.finish()


def is_in_mount_of(store_path: str, directory: str) -> bool:
    """Return whether *directory* shows what is in the store, which would be copied over itself."""
    device = os.stat(directory).st_dev
    shown = {mount.source for mount in mounts() if mount.type == FILESYSTEM_TYPE and mount.device == _device(device)}
    return os.path.realpath(store_path) in map(os.path.realpath, shown)


def _device(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


class _Interrupt:
    """Whether Ctrl-C was pressed; the copy asks where nothing is half done."""

    def __init__(self) -> None:
        self._pressed = False

    def press(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self._pressed:
            raise KeyboardInterrupt


@contextmanager
def _deferred_interrupt() -> Iterator[_Interrupt]:
    """Let SIGINT wait until somebody checks for it, so that it never falls into the middle of an append."""
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt.press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class _Copy:
    """Watches one copy, an `Observer`: shows it, and says at the end what became of it."""

    def __init__(self, verb: str, totals: Totals, interrupt: _Interrupt, *, quiet: bool) -> None:
        self._verb = verb
        self._interrupt = interrupt
        self._quiet = quiet
        self._tally = Tally()
        images, data_bytes = totals
        self._progress = Progress(f"{verb}ing", sys.stderr, count=images, data_bytes=data_bytes, quiet=quiet)
        self._seconds = 0.0

    @contextmanager
    def watched(self, place: str) -> Iterator[None]:
        """Show progress for the length of the copy; if it ends early, say what is in *place* all the same."""
        try:
            with self._progress:
                yield
        except BaseException:
            if self._tally != Tally():
                complain(f"{self._verb} ended early: {self._what()} are {place}, whole")
            raise
        self._seconds = self._progress.seconds

    def advanced(self, tally: Tally) -> None:
        self._tally = tally
        self._progress.show(tally.images + tally.resumed, tally.data_bytes)
        self._interrupt.check()

    def skipped(self, path: bytes, reason: str) -> None:
        self._progress.message(f"imgfs: skipped {one_line(os.fsdecode(path))}: {reason}")

    def incomplete(self, path: bytes, reason: str) -> None:
        self._progress.message(f"imgfs: incomplete {one_line(os.fsdecode(path))}: {reason}")

    def finish(self) -> None:
        """Print the summary, and end the command with the exit code that belongs to it."""
        tally = self._tally
        if not self._quiet:
            if tally.separated:
                complain(f"{counted(tally.separated, 'further name')} (hard links) could only become copies")
            speed = rate(tally.images, "image", tally.data_bytes, self._seconds)
            echo(f"{self._verb}ed {self._what()} in {self._seconds:,.1f} s: {speed}")
        if tally.skipped:
            complain(f"{counted(tally.skipped, 'entry')} skipped, named above")
        if tally.incomplete:
            complain(f"{counted(tally.incomplete, 'entry')} copied without some extended attributes")
        if tally.skipped or tally.incomplete:
            raise click.exceptions.Exit(EXIT_DAMAGED if tally.damaged else EXIT_FAILURE)

    def _what(self) -> str:
        tally = self._tally
        parts = [f"{counted(tally.images, 'image')} ({tally.data_bytes / 1e6:,.1f} MB)"]
        parts.append(counted(tally.directories, "directory"))
        if tally.symlinks:
            parts.append(counted(tally.symlinks, "symbolic link"))
        if tally.special_files:
            parts.append(counted(tally.special_files, "special file"))
        if tally.hard_links:
            parts.append(counted(tally.hard_links, "hard link"))
        if tally.resumed:
            parts.append(f"{counted(tally.resumed, 'image')} there before")
        return ", ".join(parts)
