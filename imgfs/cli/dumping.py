"""`imgfs dump`: any file of a store as text.

Owns how lines get to standard output. Must not know what is in a file.
"""

import os
import sys

import click

from imgfs.cli.text import complain, not_empty
from imgfs.disk import Disk
from imgfs.dump import dump
from imgfs.errors import EXIT_FAILURE, ImgfsError

# So much is written at once: a system call for each of a million lines takes longer than making them.
_WRITE_BYTES = 64 << 10


def _not_empty(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        not_empty(context, parameter, value)
    return values


@click.command("dump")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, callback=_not_empty)
@click.option("--data", is_flag=True, help="Print the bytes of images and attributes too, in hex.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def dump_command(files: tuple[str, ...], data: bool, as_json: bool) -> None:
    """Print what FILE holds, a file of a store: a volume, an index file, the superblock, the lock, a list in JSON.

    What it is is told by its content. A line is a word and named values, so that grep, sort and diff work on it;
    names are in quotes. What a checksum does not hold for is shown all the same, with BAD. The store may be mounted.

    \b
    Example:
      imgfs dump /srv/photos.imgfs/volumes/00000001.vol | grep -w BAD
    """
    failed = False
    for path in files:
        try:
            _print(path, data=data, as_json=as_json)
        except ImgfsError as error:
            complain(str(error))
            failed = True
    if failed:
        raise click.exceptions.Exit(EXIT_FAILURE)


def _print(path: str, *, data: bool, as_json: bool) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise click.BadParameter(f"{path} is not a file; name one in a store, such as STORE/volumes/*.vol")
    out = sys.stdout.buffer
    buffer = bytearray()
    try:
        for line in dump(Disk(), path, data=data):
            buffer += (line.json() if as_json else line.text()).encode() + b"\n"
            if len(buffer) >= _WRITE_BYTES:
                out.write(buffer)
                buffer.clear()
    finally:
        # What was read before an error says where it stands.
        out.write(buffer)
        out.flush()
