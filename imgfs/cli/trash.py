"""`imgfs trash list`, `restore` and `empty`: what was deleted, replaced or overwritten.

Owns how the trash is shown, and what is asked before it is given up. Must not know how it is found or brought back.
"""

import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from imgfs.cli.opening import open_store
from imgfs.cli.text import (
    age,
    binary_size,
    complain,
    counted,
    echo,
    group_name,
    is_terminal,
    local_time,
    moment,
    name_for,
    not_empty,
    path_argument,
    user_name,
)
from imgfs.disk import Disk
from imgfs.errors import EXIT_FAILURE, Busy
from imgfs.format import Kind
from imgfs.history import History
from imgfs.mountpoint import of_store
from imgfs.opening import open_parts, owner
from imgfs.restore import Restore, Restored, choose
from imgfs.restore_targets import MountTarget, StoreTarget, Target
from imgfs.retention import emptied_ns, empty
from imgfs.trash import Gone, find

_TYPES = {Kind.FILE: stat.S_IFREG, Kind.SYMLINK: stat.S_IFLNK}


def _none_empty(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for each in value:
        not_empty(context, parameter, each)
    return value


@click.group("trash")
def trash_command() -> None:
    """Show, bring back, or give up what was deleted, replaced or overwritten and is still there.

    It stays for the time that the mount option retention says, less when space runs short.

    \b
    Examples:
      imgfs trash list /srv/photos.imgfs --since 2h
      imgfs trash restore /srv/photos.imgfs 2024/06
      imgfs trash empty /srv/photos.imgfs --older-than 2d
    """


@trash_command.command("list")
@path_argument("store_path", "STORE")
@click.option("--since", "since_ns", metavar="TIME", type=moment, help="Only what went after that.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, with all times in ns.")
def list_command(store_path: str, since_ns: int | None, as_json: bool) -> None:
    """List what went from STORE and can be brought back, the latest last.

    Each line has the id, when it went and how, mode, owner, group, size, time, and the path it had then.
    """
    with _open_trash(store_path, since_ns) as (_, trash):
        images = [gone for gone in trash if gone.kind != Kind.DIRECTORY]
    if as_json:
        echo(json.dumps([_facts(gone) for gone in images], indent=2))
        return
    width = max((len(gone.id) for gone in images), default=0)
    for gone in images:
        uid, gid, _, mtime_ns = gone.attributes
        owners = f"{user_name(uid):<8} {group_name(gid):<8}"
        went = f"{local_time(gone.went_ns, to_the_second=True)} {gone.cause.value:<11}"
        shown = name_for(gone.path, terminal=is_terminal())
        echo(f"{gone.id:<{width}} {went} {_mode(gone)} {owners} {gone.size:>12} {local_time(mtime_ns)} {shown}")


def _mode(gone: Gone) -> str:
    return stat.filemode(_TYPES.get(gone.kind, 0) | gone.attributes.mode)


def _facts(gone: Gone) -> dict[str, object]:
    uid, gid, mode, mtime_ns = gone.attributes
    return {
        "id": gone.id,
        "path": os.fsdecode(gone.path),
        "kind": gone.kind.name.lower(),
        "inode": gone.inode,
        "mode": f"{stat.S_IMODE(mode):04o}",
        "uid": uid,
        "gid": gid,
        "size": gone.size,
        "mtime_ns": mtime_ns,
        "went_ns": gone.went_ns,
        "by": gone.cause.value,
    }


@trash_command.command("restore")
@path_argument("store_path", "STORE")
@click.argument("what", metavar="(PATH | ID)...", nargs=-1, required=True, callback=_none_empty)
@click.option("--to", "into", metavar="DIR", callback=not_empty, help="The directory of the store to bring it to.")
@click.option("--force", is_flag=True, help="Replace what has the name now; that goes to the trash.")
def restore_command(store_path: str, what: tuple[str, ...], into: str | None, force: bool) -> None:
    """Bring back from the trash of STORE what had PATH, or all that lay below it, or the one with that ID.

    With its bytes come name, mode, owner, modification time and extended attributes; directories that are gone are
    made again. Of several with one path the latest comes back. DIR is made if it is missing. If the store is mounted,
    it is written through the mountpoint.
    """
    directory = None if into is None else b"/".join(part for part in os.fsencode(into).split(b"/") if part)
    with _open_trash(store_path, None) as (history, trash):
        wanted = choose(trash, what, directory)
        with _open_target(store_path) as target:
            restored = Restore(history, target, _complain, force).run(wanted)
    _summarize(restored)


def _complain(path: bytes, why: str) -> None:
    complain(f"{os.fsdecode(path)}: {why}")


def _summarize(restored: Restored) -> None:
    text = f"restored {counted(restored.images, 'image')} ({binary_size(restored.data_bytes)})"
    if restored.directories:
        text += f" and {counted(restored.directories, 'directory')}"
    if restored.left:
        names = "1 name was" if restored.left == 1 else f"{restored.left:,} names were"
        text += f"; {names} left alone, which something else has now"
    echo(text)
    if restored.failed:
        raise click.exceptions.Exit(EXIT_FAILURE)


@contextmanager
def _open_target(store_path: str) -> Iterator[Target]:
    """Give what can be written to: the store itself, or where it is mounted.

    Raises:
        Busy: another process has the store open, and there is no mountpoint that can be written.
    """
    pid = owner(store_path)
    if pid is None:
        with open_store(store_path, writable=True) as store:
            yield StoreTarget(store)
        return
    point = next((mount.point for mount in reversed(of_store(store_path)) if mount.writable), None)
    if point is None:
        raise Busy(f"{store_path} is in use by process {pid or '?'}, which has it mounted nowhere here; stop it first")
    target = MountTarget(point)
    try:
        yield target
    finally:
        target.close()


@trash_command.command("empty")
@path_argument("store_path", "STORE")
@click.option("--older-than", "age_ns", metavar="AGE", type=age, default="0s", help="Only what went longer ago, as 2d.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def empty_command(store_path: str, age_ns: int, yes: bool) -> None:
    """Give up what went from STORE: it is not kept any longer, and its space comes back with the next maintenance.

    What that is, is said and asked about first.
    """
    until_ns = time.time_ns() - age_ns
    with _open_trash(store_path, None) as (_, trash):
        images = [gone for gone in trash if gone.kind != Kind.DIRECTORY and gone.went_ns <= until_ns]
    size = binary_size(sum(gone.size for gone in images))
    if not yes and not click.confirm(f"Give up {counted(len(images), 'image')} ({size}) for good?", err=True):
        echo("nothing was given up")
        click.get_current_context().exit(EXIT_FAILURE)
    empty(Disk(), store_path, until_ns)
    echo(f"gave up {counted(len(images), 'image')} ({size})")


@contextmanager
def _open_trash(store_path: str, since_ns: int | None) -> Iterator[tuple[History, list[Gone]]]:
    """Give the history of the store, and what went after *since_ns* and after the trash was emptied."""
    disk = Disk()
    parts = open_parts(store_path, disk, None, writable=False, keep_records=True)
    try:
        volumes = [parts.volumes.get(entry) for entry in range(len(parts.records or ()))]
        history = History(volumes, parts.records or ())
        yield history, find(history, max(since_ns or 0, emptied_ns(disk, store_path)))
    finally:
        parts.volumes.close()
        parts.table.memory.close()
