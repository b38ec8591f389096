"""`imgfs ls`, `imgfs stat` and `imgfs info`: what a store holds, and where.

Owns how a store is shown. Must not change it: each opens the store for reading, also beside a mount.
"""

import json
import os
import stat
import uuid
from collections.abc import Collection, Iterator
from itertools import chain, islice

import click

from imgfs.cli.opening import open_store
from imgfs.cli.text import (
    binary_size,
    counted,
    echo,
    escape,
    group_name,
    is_terminal,
    local_time,
    moment,
    name_for,
    not_empty,
    path_argument,
    user_name,
)
from imgfs.errors import InvalidArgument, NameTooLong, NotADirectory, NotFound
from imgfs.format import FORMAT_VERSION, IMAGE_BYTES_MAX, NAME_BYTES_MAX, Kind
from imgfs.mountpoint import of_store
from imgfs.opening import owner
from imgfs.recover import RecoveryReport
from imgfs.store import Attr, Entry, Store

# A directory of more entries than this is listed in the order of the store: sorting needs all names in memory.
_SORTED_MAX = 100_000
# Of an extended attribute, people are shown so much; JSON has all of it.
_VALUE_SHOWN_BYTES = 256

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command("ls")
@path_argument("store_path", "STORE")
@click.argument("path", metavar="[PATH]", required=False, callback=not_empty)
@click.option("-l", "long", is_flag=True, help="Show mode, links, owner, group, size and time too.")
@click.option("-R", "recursive", is_flag=True, help="List what is in directories below, too.")
@click.option("--as-of", "as_of_ns", metavar="TIME", type=moment, help="List what was there then.")
def ls_command(store_path: str, path: str | None, long: bool, recursive: bool, as_of_ns: int | None) -> None:
    """List what is in STORE, or in the directory PATH of it; paths start at the top of the store.

    Names are sorted by their bytes; a directory of more than 100,000 entries comes in the order of the store. With
    -l, an @ behind the mode marks what has extended attributes; a device shows its two numbers in place of a size.

    TIME is local, as 2026-11-22T14:00, or ends in a zone; or it is @ and seconds since 1970; or an age, as 2h.

    \b
    Examples:
      imgfs ls -l /srv/photos.imgfs 2024/06
      imgfs ls -l --as-of 2h /srv/photos.imgfs 2024/06
    """
    with open_store(store_path, as_of_ns=as_of_ns) as store:
        wanted = os.fsencode(path or "")
        attr = store.attr(resolve(store, wanted))
        listing = _Listing(store, long=long, terminal=is_terminal())
        if attr.kind == Kind.DIRECTORY:
            listing.directory(wanted, attr.inode, recursive=recursive)
        else:
            listing.line(wanted, attr)


@click.command("stat")
@path_argument("store_path", "STORE")
@path_argument("path", "PATH")
@json_option
def stat_command(store_path: str, path: str, as_json: bool) -> None:
    """Show what STORE knows of PATH: all its attributes, and the volume, offset, size and checksum of its data.

    \b
    Example:
      imgfs stat /srv/photos.imgfs 2024/06/beach.jpg
    """
    with open_store(store_path) as store:
        wanted = os.fsencode(path)
        inode = resolve(store, wanted)
        attr = store.attr(inode)
        target = store.readlink(inode) if attr.kind == Kind.SYMLINK else None
        place = store.locate(inode) if attr.kind == Kind.FILE else None
        attributes = {name: store.get_xattr(inode, name) for name in store.list_xattrs(inode)}
    mode, kind, device = stat.S_IMODE(attr.mode), _kind(attr), _device(attr)
    if as_json:
        facts: dict[str, object] = {
            "path": path,
            "kind": kind,
            "inode": attr.inode,
            "generation": attr.inode >> 32,
            "mode": f"{mode:04o}",
            "uid": attr.uid,
            "gid": attr.gid,
            "links": attr.nlink,
            "size": attr.size,
            "mtime_ns": attr.mtime_ns,
            "ctime_ns": attr.ctime_ns,
        }
        if target is not None:
            facts["target"] = os.fsdecode(target)
        if device is not None:
            facts["device"] = {"major": device[0], "minor": device[1]}
        if attributes:
            facts["attributes"] = {os.fsdecode(name): os.fsdecode(value) for name, value in attributes.items()}
        if place is not None:
            facts |= {"volume": place.volume, "offset": place.offset, "data_offset": place.data_offset}
            facts["checksum"] = f"{place.checksum:08x}"
        echo(json.dumps(facts, indent=2))
        return
    rows = {
        "path": name_for(wanted, terminal=is_terminal()),
        "kind": kind,
        "inode": f"{attr.inode}, generation {attr.inode >> 32}",
        "links": f"{attr.nlink:,}",
        "mode": f"{mode:04o} ({_mode_text(attr)})",
        "owner": f"{attr.uid} ({user_name(attr.uid)})",
        "group": f"{attr.gid} ({group_name(attr.gid)})",
        "size": f"{attr.size:,} bytes",
        "modified": local_time(attr.mtime_ns, nanoseconds=True),
        "changed": local_time(attr.ctime_ns, nanoseconds=True),
    }
    if target is not None:
        rows["target"] = name_for(target, terminal=is_terminal())
    if device is not None:
        rows["device"] = f"major {device[0]}, minor {device[1]}"
    if place is not None:
        rows |= {
            "volume": str(place.volume),
            "offset": str(place.offset),
            "checksum": f"{place.checksum:08x} (CRC-32C)",
        }
    set_by_people = [("attribute", f"{escape(os.fsdecode(name))}: {_shown(attributes[name])}") for name in attributes]
    print_rows([*rows.items(), *set_by_people])


@click.command("info")
@path_argument("store_path", "STORE")
@json_option
def info_command(store_path: str, as_json: bool) -> None:
    """Show how much STORE holds, how much of its volumes is dead, its limits, and whether it is mounted.

    Live bytes are the data of images that are there. What else is on the disk are the headers that go with them, and
    what was deleted or replaced since and is not given back yet.

    \b
    Example:
      imgfs info --json /srv/photos.imgfs
    """
    with open_store(store_path) as store:
        counts, space, report = store.counts(), store.space(), store.report
        store_id, volume_bytes_max = uuid.UUID(bytes=store.superblock.store_id), store.superblock.volume_bytes_max
    # Data that has just been written may have no blocks yet.
    other_bytes = max(0, counts.disk_bytes - counts.live_bytes)
    pid = owner(store_path)
    mountpoints = [mount.point for mount in of_store(store_path)]
    if as_json:
        facts = {
            "path": os.path.abspath(store_path),
            "format": FORMAT_VERSION,
            "store_id": str(store_id),
            "images": counts.images,
            "directories": counts.directories,
            "symlinks": counts.symlinks,
            "volumes": counts.volumes,
            "volume_bytes": counts.volume_bytes,
            "disk_bytes": counts.disk_bytes,
            "live_bytes": counts.live_bytes,
            "other_bytes": other_bytes,
            "memory_bytes": counts.memory_bytes,
            "volume_bytes_max": volume_bytes_max,
            "entries_max": space.images_max,
            "image_bytes_max": IMAGE_BYTES_MAX,
            "name_bytes_max": NAME_BYTES_MAX,
            "free_bytes": space.available * space.block_size,
            "pid": pid,
            "mountpoints": mountpoints,
            "torn_bytes": report.torn_bytes,
            "damaged_places": len(report.damage),
        }
        echo(json.dumps(facts, indent=2))
        return
    rows = {
        "store": f"{store_id}, format {FORMAT_VERSION}",
        "images": f"{counts.images:,}",
        "directories": f"{counts.directories:,}",
        "symbolic links": f"{counts.symlinks:,}",
        "volumes": f"{counts.volumes:,} of up to {binary_size(volume_bytes_max)} each",
        "on disk": binary_size(counts.disk_bytes),
        "holes": f"{binary_size(max(0, counts.volume_bytes - counts.disk_bytes))}, given back already",
        "live": f"{binary_size(counts.live_bytes)} of data",
        "other": f"{binary_size(other_bytes)} of headers, and of what was deleted or replaced",
        "free": binary_size(space.available * space.block_size),
        "table": f"{binary_size(counts.memory_bytes)} of memory",
        "limits": f"{counted(space.images_max, 'entry')}; images up to 4 GiB - 1; names up to {NAME_BYTES_MAX} bytes",
        "state": _state(pid, mountpoints, report),
    }
    print_rows(rows.items())


def _state(pid: int | None, mountpoints: list[str], report: RecoveryReport) -> str:
    if pid is not None:
        where = f"mounted at {', '.join(mountpoints)}" if mountpoints else "in use"
        return f"{where} by process {pid or '?'}"
    parts = ["not mounted"]
    if report.torn_bytes:
        parts.append(f"{report.torn_bytes:,} bytes were torn by a crash")
    if report.rebuilt:
        parts.append(f"{counted(len(report.rebuilt), 'index file')} to be made anew")
    if report.damage:
        parts.append(f"{counted(len(report.damage), 'damaged place')}")
    return "; ".join(parts)


def resolve(store: Store, path: bytes) -> int:
    """Return the inode of *path* in *store*.

    Raises:
        NotFound: nothing has that path; the text says so.
    """
    try:
        return store.resolve(path)
    except (NotFound, NotADirectory, NameTooLong, InvalidArgument):
        text = f"{os.fsdecode(path)} is not in the store; imgfs ls {store.path} lists what is"
        raise NotFound(text) from None


def print_rows(rows: Collection[tuple[str, str]]) -> None:
    """Print names and values below each other."""
    width = max(len(name) for name, _ in rows) + 1
    for name, value in rows:
        echo(f"{name + ':':{width}} {value}")


class _Listing:
    """One run of `imgfs ls`."""

    def __init__(self, store: Store, *, long: bool, terminal: bool) -> None:
        self._store = store
        self._long = long
        self._terminal = terminal

    def directory(self, path: bytes, inode: int, *, recursive: bool) -> None:
        """Print the entries of a directory; with *recursive* those of the directories below it too."""
        pending = [(path, inode)]
        while pending:
            path, inode = pending.pop()
            if recursive:
                echo(name_for(path or b".", terminal=self._terminal) + ":")
            below = []
            for entry in self._entries(inode):
                attr = self._store.attr(entry.inode)
                self.line(entry.name, attr)
                if recursive and attr.kind == Kind.DIRECTORY:
                    below.append((os.path.join(path, entry.name), entry.inode))
            pending.extend(reversed(below))
            if recursive and pending:
                echo("")

    def line(self, name: bytes, attr: Attr) -> None:
        """Print the line of one entry."""
        shown = name_for(name, terminal=self._terminal)
        if not self._long:
            echo(shown)
            return
        if attr.kind == Kind.SYMLINK:
            shown += " -> " + name_for(self._store.readlink(attr.inode), terminal=self._terminal)
        mark = "@" if self._store.has_xattrs(attr.inode) else " "
        device = _device(attr)
        size = f"{attr.size}" if device is None else f"{device[0]}, {device[1]}"
        owner, group, time = user_name(attr.uid), group_name(attr.gid), local_time(attr.mtime_ns)
        echo(f"{_mode_text(attr)}{mark}{attr.nlink:>3} {owner:<8} {group:<8} {size:>12} {time} {shown}")

    def _entries(self, inode: int) -> Iterator[Entry]:
        entries = self._store.list(inode)
        first = list(islice(entries, _SORTED_MAX + 1))
        if len(first) > _SORTED_MAX:
            return chain(first, entries)
        return iter(sorted(first, key=lambda entry: entry.name))


_TYPES = {Kind.FILE: stat.S_IFREG, Kind.DIRECTORY: stat.S_IFDIR, Kind.SYMLINK: stat.S_IFLNK}
_SPECIAL = {
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def _kind(attr: Attr) -> str:
    """Return what it is, in words."""
    if attr.kind == Kind.SPECIAL:
        return _SPECIAL.get(stat.S_IFMT(attr.mode), "special")
    return attr.kind.name.lower()


def _device(attr: Attr) -> tuple[int, int] | None:
    """Return the two numbers of a device, None if it is none."""
    if attr.kind == Kind.SPECIAL and stat.S_IFMT(attr.mode) in (stat.S_IFCHR, stat.S_IFBLK):
        return os.major(attr.device), os.minor(attr.device)
    return None


def _mode_text(attr: Attr) -> str:
    # The mode of a special file says its type itself.
    return stat.filemode(_TYPES.get(attr.kind, 0) | attr.mode)


def _shown(value: bytes) -> str:
    """Return the value of an extended attribute on one line, cut if it is long."""
    shown = escape(os.fsdecode(value[:_VALUE_SHOWN_BYTES]))
    return shown if len(value) <= _VALUE_SHOWN_BYTES else f"{shown}... ({len(value):,} bytes)"
