"""`imgfs scrub`, `imgfs salvage` and `imgfs metrics`: finding damage in time, and living with it.

Owns what is printed about them. Must not know how a store is read.
"""

import os
import sys
from contextlib import suppress
from itertools import chain

import click
import psutil

from imgfs.cli.copying import quiet_option
from imgfs.cli.looking import resolve
from imgfs.cli.opening import damage_text, open_store
from imgfs.cli.progress import Progress, rate
from imgfs.cli.text import counted, echo, not_empty, parse_size, path_argument
from imgfs.errors import EXIT_DAMAGED, Exists, NotFound
from imgfs.lost_image import find_inode, find_path
from imgfs.salvage import salvage
from imgfs.scrub import DEFAULT_RATE_BYTES_S, Scrub
from imgfs.settings import MIB
from imgfs.store import Store
from imgfs.survey import Damage

_LOWEST_NICE = 19


@click.command("scrub")
@path_argument("store_path", "STORE")
@click.option(
    "--rate",
    "rate_bytes_s",
    metavar="SIZE",
    type=parse_size,
    default=str(DEFAULT_RATE_BYTES_S),
    help="Read no more than this in a second; 0: as fast as it goes. [50M]",
)
@quiet_option
def scrub_command(store_path: str, rate_bytes_s: int, quiet: bool) -> None:
    """Read every byte of STORE from the disk and verify it, while it is mounted or not; nothing of it is changed.

    Damage is told, and kept in STORE/damage.json until it is found whole or no image needs the place any more. A scrub
    that was stopped or killed goes on where it was; one that was finished starts anew. It gives way to all others:
    lowest priority, idle I/O, no use of the page cache. The exit code is 0 for a clean store, 3 for a damaged one.

    \b
    Example:
      imgfs scrub --rate 100M /srv/photos.imgfs
    """
    _give_way()
    scrub = Scrub(store_path, rate_bytes_s)
    began = (0, 0)
    needles = volume_bytes = 0
    with Progress("scrubbing", sys.stderr, "needle", data_bytes=scrub.total_bytes, quiet=quiet) as progress:
        for step in scrub.run():
            if isinstance(step, Damage):
                progress.message(f"imgfs: damaged: {damage_text(step, scrub.path(step))}")
                continue
            needles, volume_bytes = step
            began = began if any(began) else (needles, volume_bytes)
            progress.show(needles, volume_bytes)
        seconds = progress.seconds
    result = scrub.result
    if not quiet:
        found = counted(result.damaged_places, "damaged place") if result.damaged_places else "nothing is damaged"
        amount = f"{counted(result.needles, 'needle')} ({result.read_bytes / 1e6:,.1f} MB)"
        speed = rate(needles - began[0], "needle", volume_bytes - began[1], seconds)
        echo(f"{found}: scrubbed {amount}; the last {seconds:,.1f} s: {speed}")
    if result.damaged_places:
        raise click.exceptions.Exit(EXIT_DAMAGED)


def _give_way() -> None:
    """Let everybody else have processor and disk first."""
    process = psutil.Process()
    # Neither needs a right that anybody lacks; a container may forbid them all the same.
    with suppress(psutil.Error, OSError):
        process.nice(_LOWEST_NICE)
    with suppress(psutil.Error, OSError):
        process.ionice(psutil.IOPRIO_CLASS_IDLE)


@click.command("salvage")
@path_argument("store_path", "STORE")
@click.argument("image", metavar="PATH|INODE", callback=not_empty)
@path_argument("out", "OUT")
@click.option("--zero", is_flag=True, help="Write zeros in place of damaged bytes, not what is left of them.")
def salvage_command(store_path: str, image: str, out: str, zero: bool) -> None:
    """Copy what is left of a damaged image into the new file OUT, and say which bytes of it are damaged.

    An image above 1 MiB has a checksum for each MiB: all that are whole come out. Where the header of an image is
    damaged, it is found by what the index says. The image is named by its path, or by its inode number. STORE may be
    mounted. The exit code is 0 if all bytes are right, 3 if some are not known to be.

    \b
    Example:
      imgfs salvage --zero /srv/photos.imgfs 2024/06/beach.jpg /tmp/beach.jpg
    """
    done = damaged = 0
    with open_store(store_path) as store:
        inode = _inode(store, image)
        pieces = iter(salvage(store, inode))
        first = next(pieces, None)  # whatever cannot be read at all must not leave a file behind
        if os.path.lexists(out):
            raise Exists(f"{out} exists; name a new file")
        with open(out, "xb") as file, Progress("salvaging", sys.stderr, "piece") as progress:
            for piece in chain([first] if first is not None else [], pieces):
                end = piece.offset + len(piece.data)
                if not piece.good:
                    damaged += len(piece.data)
                    progress.message(f"imgfs: damaged: {image}, bytes {piece.offset} to {end - 1}")
                file.write(bytes(len(piece.data)) if zero and not piece.good else piece.data)
                done += len(piece.data)
                progress.show(done // MIB, done)
    left = "zeros in their place" if zero else "as they are"
    echo(f"salvaged {out}: {done:,} bytes, " + (f"{damaged:,} of them damaged ({left})" if damaged else "all right"))
    if damaged:
        raise click.exceptions.Exit(EXIT_DAMAGED)


def _inode(store: Store, image: str) -> int:
    """Return the inode that *image* names: a path, or else a number."""
    try:
        return resolve(store, os.fsencode(image))
    except NotFound:
        lost = find_path(store, os.fsencode(image))
        if lost is not None:
            return lost.inode
        inode = _number(image)
        if not (store.is_there(inode) or find_inode(store, inode)):
            raise
        return inode


def _number(text: str) -> int:
    try:
        return max(int(text, 0), 0)
    except ValueError:
        return 0


@click.command("metrics")
@path_argument("store_path", "STORE")
@click.option("-o", "--output", metavar="FILE", help="Replace FILE by them in one step, for node_exporter.")
def metrics_command(store_path: str, output: str | None) -> None:
    """Print how much STORE holds, what is damaged, and when it was scrubbed, in the text format of Prometheus.

    \b
    Example:
      imgfs metrics -o /var/lib/prometheus/node-exporter/photos.prom /srv/photos.imgfs
    """
    # Here, so that a scrub does not wait for what it does not use.
    from imgfs.metrics import as_text, collect, write

    with Store.open(store_path, writable=False) as store:
        figures = collect(store)
    if output is None:
        click.echo(as_text(figures), nl=False)
    else:
        write(figures, output)
