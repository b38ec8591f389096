"""`imgfs compact`: rewrites volumes that hold little of what is needed, by itself or through the daemon of a mount.

Owns what is printed about it. Must not know what makes a volume worth it.
"""

import sys

import click

from imgfs import control
from imgfs.cli.copying import quiet_option
from imgfs.cli.progress import Progress
from imgfs.cli.text import binary_size, complain, counted, echo, path_argument
from imgfs.compact import Share
from imgfs.errors import EXIT_FAILURE, Busy
from imgfs.options import MountOptions
from imgfs.reclaim import Reclaimer
from imgfs.store import Store


@click.command("compact")
@path_argument("store_path", "STORE")
@click.option(
    "--live-share",
    metavar="PERCENT",
    type=click.FloatRange(0, 100),
    default=70.0,
    help="Rewrite volumes of which less is needed. [70]",
)
@click.option(
    "--retention",
    "retention_s",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=MountOptions().retention_s,
    help="Keep what was deleted since, where the store is not mounted. [86400]",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be gained.")
@quiet_option
def compact_command(store_path: str, live_share: float, retention_s: float, dry_run: bool, quiet: bool) -> None:
    """Give back the space of what was deleted in STORE, by copying what is needed of the emptiest volumes.

    The daemon of a mounted store does this by itself, at the rate of its mount option compact_rate; this command
    lets it do it now, and keeps what the mount option retention says.

    \b
    Example:
      imgfs compact --dry-run /srv/photos.imgfs
    """
    question = {"do": "compact", "live_share": live_share / 100, "dry_run": dry_run}
    with Progress("compacting", sys.stderr, "volume", quiet=quiet) as progress:
        show = _Shown(progress, quiet=quiet)
        try:
            with Store.open(store_path) as store:
                reclaimer = store.reclaimer(live_share=live_share / 100, retention_s=retention_s)
                answer: control.Message = {"freed": _compact(reclaimer, show, dry_run=dry_run)}
        except Busy:
            answer = control.ask(store_path, question, show.told)
    if "error" in answer:
        complain(answer["error"])
        raise click.exceptions.Exit(answer.get("code", EXIT_FAILURE))
    if not quiet:
        show.table()
        freed = show.gain if dry_run else answer["freed"]
        echo(f"{'would free' if dry_run else 'freed'} {binary_size(max(0, freed))}")


class _Shown:
    """What is known of a compaction."""

    def __init__(self, progress: Progress, *, quiet: bool) -> None:
        self._progress = progress
        self._quiet = quiet
        self._shares: list[tuple[Share, bool]] = []

    def told(self, message: control.Message) -> None:
        if "shares" in message:
            self._shares = [(Share(*values), chosen) for *values, chosen in message["shares"]]
        if "copied" in message:
            self._progress.show(0, message["copied"])

    @property
    def gain(self) -> int:
        return sum(share.gain_bytes for share, chosen in self._shares if chosen)

    def table(self) -> None:
        """Print a line for each volume."""
        if not self._shares:
            echo("no volume is full yet, so that there is nothing to compact")
            return
        echo(f"{'volume':>8}  {'length':>8}  {'on disk':>8}  {'needed':>8}  share")
        for share, chosen in self._shares:
            part = min(100, 100 * share.needed_bytes // max(1, share.disk_bytes))
            sizes = [binary_size(size) for size in (share.file_bytes, share.disk_bytes, share.needed_bytes)]
            row = f"{share.volume_id:>8}  {sizes[0]:>8}  {sizes[1]:>8}  {sizes[2]:>8}  {part:>4}%"
            echo(row + ("  worth it" if chosen else ""))
        echo(f"{counted(sum(chosen for _, chosen in self._shares), 'volume')} worth a compaction")


def _compact(reclaimer: Reclaimer, show: _Shown, *, dry_run: bool) -> int:
    if not dry_run:
        reclaimer.finish()
        reclaimer.punch(everything=True)
    shares = reclaimer.survey()
    groups = reclaimer.worthwhile(shares)
    chosen = {share.row for group in groups for share in group}
    show.told({"shares": [[*share, share.row in chosen] for share in shares]})
    if dry_run:
        return 0

    def copied(size: int) -> None:
        show.told({"copied": size})

    return sum(reclaimer.compact(group, copied).volume_bytes for group in groups)
