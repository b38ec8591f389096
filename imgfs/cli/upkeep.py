"""`imgfs mkfs`, `imgfs check` and `imgfs rebuild-index`: a store's beginning and its health.

Owns what is printed about them. Must not know how a store is checked or opened.
"""

import errno
import os
import shlex
import sys
import time
from contextlib import suppress

import click

from imgfs.check import Checked
from imgfs.cli.copying import quiet_option
from imgfs.cli.opening import damage_line
from imgfs.cli.progress import Progress, rate
from imgfs.cli.text import binary_size, complain, counted, echo, one_line, parse_size, path_argument
from imgfs.disk import Disk
from imgfs.errors import EXIT_DAMAGED, EXIT_FAILURE, EXIT_REPAIRED, Busy, DiskFailure, InvalidArgument
from imgfs.known_damage import note_check
from imgfs.mountpoint import FILESYSTEM_TYPE, canonical, find
from imgfs.opening import VOLUME_BYTES_MAX, VOLUME_BYTES_MIN
from imgfs.rebuild import remove_index
from imgfs.repair import Repair
from imgfs.settings import Settings
from imgfs.store import Store, make_store
from imgfs.survey import Damage


def _volume_size(text: str) -> int:
    size = parse_size(text)
    if not VOLUME_BYTES_MIN <= size <= VOLUME_BYTES_MAX:
        limits = f"{binary_size(VOLUME_BYTES_MIN)} to {binary_size(VOLUME_BYTES_MAX)}"
        raise click.BadParameter(f"'{text}' is out of range: a volume has {limits}")
    return size


@click.command("mkfs")
@path_argument("store_path", "STORE")
@click.option("--volume-size", metavar="SIZE", type=_volume_size, help="Seal a volume before it grows past this. [1G]")
def mkfs_command(store_path: str, volume_size: int | None) -> None:
    """Make a new, empty store in the directory STORE, which must be empty or missing.

    Best is a directory on XFS. SIZE may be written as 64K, 512M or 1G.

    \b
    Example:
      imgfs mkfs /srv/photos.imgfs
    """
    settings = Settings() if volume_size is None else Settings(volume_bytes_max=volume_size)
    _check_place(store_path)
    make_store(store_path, settings, uid=os.geteuid(), gid=os.getegid())
    shown = shlex.quote(store_path)
    echo(f"made a store in {store_path} (volumes of {binary_size(settings.volume_bytes_max)})")
    echo(f"next: imgfs mount --daemon {shown} MOUNTPOINT, or imgfs import DIR {shown}")


def _check_place(path: str) -> None:
    """Make sure that no file is at *path*, and no store mounted there; `make_store` sees to the rest."""
    mount = find(canonical(path))
    if mount is not None and mount.type == FILESYSTEM_TYPE:
        raise InvalidArgument(f"{path} is where the store {mount.source} is mounted; name another directory")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InvalidArgument(f"{path} is not a directory; name an empty or a new one")


@click.command("check")
@path_argument("store_path", "STORE")
@quiet_option
@click.option("--repair", is_flag=True, help="Put right what can be, and say what was done.")
@click.option("-n", "--dry-run", is_flag=True, help="With --repair: say what is to be done, and change nothing.")
@click.option("-y", "--yes", is_flag=True, help="With --repair: do not ask before bytes are cut away.")
def check_command(store_path: str, quiet: bool, repair: bool, dry_run: bool, yes: bool) -> None:
    """Read all of STORE and verify every checksum, and that every image is where the store looks for it.

    Index files that are missing or wrong are made anew. A store that is mounted is read beside its daemon, and not
    repaired. The exit code is 0 for a clean store, 4 if something was repaired, 3 if something is damaged; then a
    line names each damaged place and its image.

    With --repair, names, directories and slots that contradict each other are put right too, in favour of what came
    later: what has no place any more goes to lost+found in the top directory. Damaged copies of headers are written
    again, and what lies behind the end of a volume is cut away. The store must not be mounted. Nothing that is whole
    is lost, and you are asked before other bytes are.

    \b
    Examples:
      imgfs check /srv/photos.imgfs
      imgfs check --repair --dry-run /srv/photos.imgfs
    """
    if (dry_run or yes) and not repair:
        raise click.UsageError("--dry-run and --yes belong to --repair")
    if repair:
        _repair(store_path, quiet=quiet, dry_run=dry_run, yes=yes)
        return
    with _open_to_check(store_path) as store:
        report = store.report
        for path in report.rebuilt:
            complain(f"{'made anew' if store.writable else 'wrong, to be made anew at the next mount'}: {path}")
        if report.torn_bytes:
            complain(f"{report.torn_bytes:,} bytes were torn by a crash before they were durable, and are left out")
        for text in report.renamed:
            complain(text)
        damaged = _check(store, quiet=quiet)
        contradictions = store.contradictions()
        for text in contradictions:
            complain(f"contradictory: {text}; imgfs check --repair puts that right")
    if damaged or contradictions:
        raise click.exceptions.Exit(EXIT_DAMAGED)
    if report.rebuilt:
        raise click.exceptions.Exit(EXIT_REPAIRED)


def _repair(path: str, *, quiet: bool, dry_run: bool, yes: bool) -> None:
    """Repair the store at *path*, show what was done, check what is there then, and end with an exit code."""

    def tell(text: str) -> None:
        echo(one_line(f"{'to do' if dry_run else 'done'}: {text}"))

    repair = Repair(path, dry_run=dry_run, agree=lambda text: yes or _agreed(text), tell=tell)
    with repair.run() as store:
        damaged = _check(store, quiet=quiet, note=not dry_run)
    for text in repair.left:
        echo(one_line(f"left as it is: {text}"))
    if not repair.done and not repair.left and not quiet:
        echo("there is nothing to repair")
    if damaged:
        raise click.exceptions.Exit(EXIT_DAMAGED)
    if repair.left:
        raise click.exceptions.Exit(EXIT_FAILURE)
    if repair.done:
        raise click.exceptions.Exit(EXIT_REPAIRED)


def _agreed(text: str) -> bool:
    """Ask whether to do what *text* says; who cannot answer says no."""
    click.echo(one_line(f"imgfs: {text}? [y/N] "), err=True, nl=False)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _open_to_check(path: str) -> Store:
    """Open the store for writing, so that it can be repaired; for reading where that cannot be."""
    try:
        return Store.open(path, saved=False)
    except Busy:
        pass
    except DiskFailure as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return Store.open(path, writable=False, saved=False)


def _check(store: Store, *, quiet: bool, note: bool = True) -> int:
    """Check the open store, show it, and return how many places are damaged; *note*: they become the known ones."""
    needles = volume_bytes = 0
    began_ns = time.time_ns()
    found: dict[tuple[str, int], Damage] = {}
    with Progress("checking", sys.stderr, "needle", data_bytes=store.counts().volume_bytes, quiet=quiet) as progress:

        def tell(damage: Damage) -> None:
            # What opening the store has met, the check meets again.
            if (damage.file, damage.offset) not in found:
                found[damage.file, damage.offset] = damage
                progress.message(f"imgfs: damaged: {damage_line(store, damage)}")

        for step in store.check():
            if isinstance(step, Checked):
                needles, volume_bytes = step
                progress.show(needles, volume_bytes)
            else:
                tell(step)
        for damage in store.report.damage:
            tell(damage)
        seconds = progress.seconds
    if note:
        with suppress(OSError):  # a store that may only be read keeps no list
            note_check(store, found.values(), began_ns, Disk())
    if not quiet:
        result = f"{counted(len(found), 'damaged place')}" if found else "nothing is damaged"
        speed = rate(needles, "needle", volume_bytes, seconds)
        amount = f"{counted(needles, 'needle')} ({volume_bytes / 1e6:,.1f} MB)"
        echo(f"{result}: checked {amount} in {seconds:,.1f} s: {speed}")
    return len(found)


@click.command("rebuild-index")
@path_argument("store_path", "STORE")
def rebuild_index_command(store_path: str) -> None:
    """Remove the index files of STORE and make them anew from the volumes.

    A store does this by itself where it finds an index file wrong; by hand it is needed only where the files are
    wrong in a way that their checksums do not show. The store must not be mounted.

    \b
    Example:
      imgfs rebuild-index /srv/photos.imgfs
    """
    removed = remove_index(store_path)
    with Store.open(store_path) as store:
        for damage in store.report.damage:
            complain(f"damaged: {damage_line(store, damage)}")
        for text in store.report.renamed:
            complain(text)
        counts = store.counts()
    entries = counts.images + counts.directories + counts.symlinks
    echo(f"made {counted(len(removed), 'index file')} anew for {counted(entries, 'entry')}")
    if store.report.damage:
        raise click.exceptions.Exit(EXIT_DAMAGED)
