"""`imgfs snapshot`: a copy of a store as it is at one moment.

Owns what is printed about it. Must not copy anything itself.
"""

import os
import sys

import click

from imgfs.cli.copying import is_in_mount_of, quiet_option
from imgfs.cli.opening import tell_damage
from imgfs.cli.progress import Progress
from imgfs.cli.text import counted, echo, path_argument
from imgfs.cloning import Reflink
from imgfs.errors import EXIT_DAMAGED, InvalidArgument
from imgfs.snapshot import Taken, take_snapshot
from imgfs.store import Counts, Store


@click.command("snapshot")
@path_argument("store_path", "STORE")
@path_argument("target", "DEST")
@click.option(
    "--reflink",
    type=click.Choice([each.value for each in Reflink]),
    default=Reflink.AUTO.value,
    help="Share blocks with STORE: where that can be, always (or fail), or never. [auto]",
)
@quiet_option
def snapshot_command(store_path: str, target: str, reflink: str, quiet: bool) -> None:
    """Copy STORE, which may be mounted and in use, to the new directory DEST, as it is at one moment.

    DEST is a store of its own. On one XFS it shares its blocks with STORE: made in about a second, it takes room only
    for what changes later. Elsewhere all bytes are copied. What was closed is in it; what is being written is not.

    \b
    Example:
      imgfs snapshot /srv/photos.imgfs /srv/photos.monday
    """
    parent = os.path.dirname(os.path.abspath(target))
    if os.path.isdir(parent) and is_in_mount_of(store_path, parent):
        raise InvalidArgument(f"{target} lies in a mount of {store_path}; name a directory outside of it")
    watched = _Watched(target, quiet=quiet)
    try:
        taken = take_snapshot(store_path, target, watched, reflink=Reflink(reflink))
    finally:
        watched.close()
    if not quiet:
        echo(watched.summary(taken))
    if watched.damaged:
        raise click.exceptions.Exit(EXIT_DAMAGED)


class _Watched:
    """Watches one snapshot, a `Watcher`: shows how far it is, and what it holds."""

    def __init__(self, target: str, *, quiet: bool) -> None:
        self.damaged = False
        self._target = target
        self._quiet = quiet
        self._progress = Progress("copying", sys.stderr, "volume", quiet=True)
        self._counts: Counts | None = None
        self._sequence = 0

    def started(self, volumes: int, volume_bytes: int) -> None:
        self._progress = Progress(
            "copying", sys.stderr, "volume", count=volumes, data_bytes=volume_bytes, quiet=self._quiet
        )

    def advanced(self, volumes: int, volume_bytes: int) -> None:
        self._progress.show(volumes, volume_bytes)

    def opened(self, store: Store) -> None:
        self._progress.close()
        self._counts, self._sequence = store.counts(), store.last_sequence
        self.damaged = bool(store.report.damage)
        tell_damage(store, self._target)

    def close(self) -> None:
        self._progress.close()

    def summary(self, taken: Taken) -> str:
        assert self._counts is not None, "it was opened"
        size = f"{counted(taken.volumes, 'volume')} ({taken.volume_bytes / 1e6:,.1f} MB)"
        how = f"{taken.shared:,} of them shared" if taken.shared else "copied"
        images = counted(self._counts.images, "image")
        seconds = f"{self._progress.seconds:,.1f} s"
        return f"snapshot of {images}, up to change {self._sequence:,}: {size}, {how}, in {seconds}"
