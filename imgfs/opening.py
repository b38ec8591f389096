"""Making a store and opening one: the superblock, the lock, recovery, and the log that goes on where it ended.

Owns the files of a store other than volumes and staging. Must not know what the store is then used for.
"""

import logging
import os
import time
from dataclasses import dataclass, replace

from imgfs.asof import AsOf
from imgfs.disk import Disk
from imgfs.errors import Busy, Damaged, InvalidArgument, NoStore, disk_error
from imgfs.format import (
    Kind,
    Needle,
    PreviousEnd,
    hash_seed,
    inode_of,
    slot_of,
)
from imgfs.layout import Word
from imgfs.log import Log
from imgfs.memory import Memory
from imgfs.mend import Mender, lost_name
from imgfs.recover import Recovery, RecoveryReport, Tail
from imgfs.saved_format import SAVED_TABLE
from imgfs.saved_loading import load_table
from imgfs.saved_table import remove_saved, saved_damage
from imgfs.settings import KIB, Settings
from imgfs.superblock import Superblock, new_superblock, pack_superblock, unpack_superblock
from imgfs.survey import Damage
from imgfs.table import Table
from imgfs.volume import Volume
from imgfs.volumes import SUFFIX, VOLUMES, Volumes

log = logging.getLogger(__name__)

SUPERBLOCK = "imgfs.json"
LOCK = "lock"
STAGING = "staging"
ROOT = 1  # inode of the root directory
VOLUME_BYTES_MIN = 64 * KIB
_AS_TEXT = ("utf-8", "backslashreplace")
VOLUME_BYTES_MAX = 32 << 30
_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.01


@dataclass
class Opened:
    """What `open_parts` hands to the store."""

    superblock: Superblock
    settings: Settings
    table: Table
    volumes: Volumes
    report: RecoveryReport
    log: Log | None
    lock: int | None
    records: list[bytes] | None = None
    """The index records of each volume in order, if they were to be kept."""


def make_store(
    path: str, settings: Settings | None = None, disk: Disk | None = None, *, uid: int, gid: int, mode: int = 0o755
) -> None:
    """Make an empty store in the directory at *path*, whose root belongs to *uid* and *gid*.

    Raises:
        InvalidArgument: something is there already, or the volume size is out of range.
        DiskFailure, StoreFull: as the disk says.
    """
    settings, disk = settings or Settings(), disk or Disk()
    if not VOLUME_BYTES_MIN <= settings.volume_bytes_max <= VOLUME_BYTES_MAX:
        raise InvalidArgument(f"a volume has {VOLUME_BYTES_MIN} to {VOLUME_BYTES_MAX} bytes")
    try:
        if not disk.exists(path):
            disk.mkdir(path)
            disk.sync_directory(os.path.dirname(os.path.abspath(path)))
        elif [name for name in disk.names(path) if name != "lost+found"]:
            raise InvalidArgument(f"{path} is not empty; give a new or an empty directory")
        for directory in (VOLUMES, STAGING):
            disk.mkdir(f"{path}/{directory}")
        disk.sync_directory(path)
        superblock = new_superblock(settings.volume_bytes_max)
        table = Table(Memory(), hash_seed(superblock.store_id))
        writer = Log(disk, f"{path}/{VOLUMES}", superblock, settings, table)
        try:
            _begin(writer, uid, gid, mode)
        finally:
            writer.close()
            table.memory.close()
        # Last: a directory with a superblock is a store.
        disk.replace_file(f"{path}/{SUPERBLOCK}", pack_superblock(superblock))
    except OSError as error:
        raise disk_error(error, path) from error


def _begin(writer: Log, uid: int, gid: int, mode: int) -> None:
    """Make the first volume, with the root directory in it."""
    with writer.lock():
        writer.begin_volume()
        writer.append(Needle(Kind.DIRECTORY, ROOT, ROOT, mode=mode, uid=uid, gid=gid, mtime_ns=writer.now_ns()), [])
    writer.sync(final=True)


def open_parts(
    path: str,
    disk: Disk,
    settings: Settings | None,
    *,
    writable: bool,
    as_of_ns: int | None = None,
    keep_records: bool = False,
    thorough: bool = False,
    saved: bool = True,
) -> Opened:
    """Open the store at *path*; everything but the staging files is as the volumes say when this returns.

    With *as_of_ns*, in ns since 1970, it is as it was then, and cannot be *writable*. With *keep_records* the index
    records of the volumes, 39 bytes for each needle, are kept as well. *thorough*: contradictions are looked for, and
    mended, also where no bytes are damaged. Without *saved* the table is made from volumes and index, though the last
    stop has kept it.

    Raises:
        NoStore: there is none.
        NotFound: there was none then.
        NewerFormat: it needs a newer release.
        Busy: another process writes to it.
        Damaged: its superblock is that of another store.
        DiskFailure, StoreFull: as the disk says.
    """
    try:
        superblock, rebuilt = find_store(path, disk)
        if settings is None:
            settings = Settings(volume_bytes_max=superblock.volume_bytes_max)
        else:
            settings = replace(settings, volume_bytes_max=superblock.volume_bytes_max)
        assert not writable or (as_of_ns is None and not keep_records), "the past cannot be changed"
        lock = _take_lock(path, disk) if writable else None
        memory = Memory()
        try:
            if writable:
                opened = _open_locked(
                    path, disk, superblock, settings, memory, lock, thorough=thorough, saved=saved and not thorough
                )
            else:
                opened = _open_to_read(
                    path,
                    disk,
                    superblock,
                    settings,
                    memory,
                    as_of_ns,
                    keep_records=keep_records,
                    thorough=thorough,
                    saved=saved,
                )
        except BaseException:
            memory.close()
            if lock is not None:
                disk.close(lock)
            raise
        if rebuilt:
            opened.report.rebuilt.append(f"{path}/{SUPERBLOCK}")
            if writable:
                disk.replace_file(f"{path}/{SUPERBLOCK}", pack_superblock(superblock))
        return opened
    except OSError as error:
        raise disk_error(error, path) from error


def attach_parts(
    path: str, disk: Disk, settings: Settings | None, memory: Memory, lock: int | None, *, writable: bool
) -> Opened:
    """Go on with a store whose table is in *memory*, as another process has left it; *lock* holds its lock.

    Raises:
        NoStore, NewerFormat: as `open_parts`.
        DiskFailure: as the disk says.
    """
    try:
        superblock, _ = find_store(path, disk)
        settings = replace(settings or Settings(), volume_bytes_max=superblock.volume_bytes_max)
        table = Table(memory, hash_seed(superblock.store_id))
        directory = f"{path}/{VOLUMES}"
        writer = Log(disk, directory, superblock, settings, table) if writable else None
        return Opened(superblock, settings, table, Volumes(disk, directory, table), RecoveryReport(), writer, lock)
    except OSError as error:
        raise disk_error(error, path) from error


def _open_locked(
    path: str,
    disk: Disk,
    superblock: Superblock,
    settings: Settings,
    memory: Memory,
    lock: int | None,
    *,
    thorough: bool,
    saved: bool,
) -> Opened:
    table = Table(memory, hash_seed(superblock.store_id))
    writer = Log(disk, f"{path}/{VOLUMES}", superblock, settings, table)
    loaded = load_table(disk, path, table, superblock.store_id, writable=True) if saved else None
    doubted = [] if saved or thorough else _doubt(disk, path)
    # Before the first change: whatever happens from here on, a later start must not take it for what is so then.
    remove_saved(disk, path)
    if loaded is not None:
        memory.words[Word.SOUND] = 1
        _resume(writer, loaded.tail, None, table)
        report = RecoveryReport(log_end=loaded.tail.state.end)
        return Opened(superblock, settings, table, loaded.volumes, report, writer, lock)
    recovery = Recovery(disk, path, table, superblock.store_id, writable=True, thorough=thorough)
    recovery.run()
    report = recovery.report
    memory.words[Word.SOUND] = not (thorough or report.damage or report.mended)
    report.damage += doubted
    _resume(writer, recovery.tail, recovery, table)
    return Opened(superblock, settings, table, recovery.volumes, report, writer, lock)


def _open_to_read(
    path: str,
    disk: Disk,
    superblock: Superblock,
    settings: Settings,
    memory: Memory,
    as_of_ns: int | None,
    *,
    keep_records: bool,
    thorough: bool,
    saved: bool,
) -> Opened:
    table = Table(memory, hash_seed(superblock.store_id))
    live_writer = owner(path, disk) is not None
    if saved and as_of_ns is None and not (live_writer or keep_records or thorough):
        loaded = load_table(disk, path, table, superblock.store_id, writable=False)
        if loaded is not None:
            report = RecoveryReport(log_end=loaded.tail.state.end)
            return Opened(superblock, settings, table, loaded.volumes, report, log=None, lock=None)
    if as_of_ns is None:
        recovery = Recovery(
            disk, path, table, superblock.store_id, writable=False, live_writer=live_writer, thorough=thorough
        )
    else:
        recovery = AsOf(disk, path, table, superblock.store_id, as_of_ns, live_writer=live_writer)
    recovery.kept = [] if keep_records else None
    recovery.run()
    if not saved and not thorough:
        recovery.report.damage += _doubt(disk, path)
    return Opened(
        superblock, settings, table, recovery.volumes, recovery.report, log=None, lock=None, records=recovery.kept
    )


def _doubt(disk: Disk, path: str) -> list[Damage]:
    """Return what is wrong with the bytes of the kept table of the store at *path*, which nobody has to believe."""
    wrong = saved_damage(disk, path)
    if not wrong:
        return []
    text = f"the kept table is damaged: {wrong}; the next start makes it again"
    return [Damage(0, 0, 0, text, suffix=SAVED_TABLE, readable=True, needed=False)]


def _resume(writer: Log, tail: Tail | None, recovery: Recovery | None, table: Table) -> None:
    """Go on writing where the log ends, and write down what only *recovery* knows, if there had to be one."""
    with writer.lock():
        if tail is not None:
            writer.make_durable(tail.path, tail.durable, tail.state.end, cut=not tail.torn_bytes)
        if tail is None or tail.sealed:
            writer.begin_volume()
        elif tail.torn_bytes:
            volume_id = table.volume(tail.entry).volume_id
            with table.memory.change():
                table.set_volume(tail.entry, table.volume(tail.entry)._replace(end=tail.state.end))
            writer.begin_volume(PreviousEnd(volume_id, tail.torn_bytes, tail.state))
        else:
            writer.resume(
                tail.path,
                tail.entry,
                tail.state,
                table.memory.words[Word.NEXT_SEQUENCE],
                checkpointed=tail.checkpointed,
            )
        if not table.is_directory(0):
            # No volume is left, but the store is one: it begins anew.
            writer.append(Needle(Kind.DIRECTORY, ROOT, ROOT, mode=0o755, mtime_ns=writer.now_ns()), [])
        for index in range(table.memory.words[Word.OWNERS]):
            if table.owner_volume(index) < 0 and table.owner(index) != (0, 0, 0):
                writer.define_owner(*table.owner(index))
        if recovery is not None:
            recovery.report.renamed += _write_down(writer, recovery.mender, recovery.volumes, table)


def _write_down(writer: Log, mender: Mender, volumes: Volumes, table: Table) -> list[str]:
    """Append the needles that say what recovery did about damage: it gave entries new names, and directories.

    Returns:
        A sentence for each entry that has a new name.
    """
    renamed = []
    for inode in mender.lost_directories:
        record = table.record(slot_of(inode))
        if not table.is_directory(slot_of(inode)) or record.generation != inode >> 32:
            continue
        name = b"" if inode == ROOT else lost_name(inode)
        if record.name_offset:  # renamed since, by a needle that is whole
            name = volumes.get(record.name_volume).names.get(record.name_offset)
        parent = inode_of(record.parent - 1, table.record(record.parent - 1).generation)
        uid, gid, mode = table.owner(record.owner)
        needle = Needle(Kind.DIRECTORY, inode, parent, name, 0, mode or 0o755, uid, gid, mtime_ns=writer.now_ns())
        writer.append(needle, [])
        text = name.decode(*_AS_TEXT)
        renamed.append(f"the directory with inode {inode} was damaged: its entries are in /{text}")
    for inode in mender.gone:
        if not table.record(slot_of(inode)).live:
            writer.append(Needle(Kind.DELETE, inode, ctime_ns=writer.now_ns()), [])
    for inode in mender.rescued:
        record = table.record(slot_of(inode))
        if record.live and record.generation == inode >> 32:
            name = lost_name(inode)
            writer.append(Needle(Kind.RENAME, inode, ROOT, name, ctime_ns=record.ctime_s * 1_000_000_000), [])
            renamed.append(f"the name of inode {inode} is damaged or taken: it is /{name.decode()} now")
    return renamed


def find_store(path: str, disk: Disk) -> tuple[Superblock, bool]:
    """Return the superblock of the store at *path*, and whether it had to be made again from a volume's header.

    Raises:
        NoStore: there is none.
        NewerFormat: it needs a newer release.
        OSError: as the disk says.
    """
    if not disk.exists(f"{path}/{VOLUMES}"):
        if disk.exists(f"{path}/{SUPERBLOCK}"):
            raise NoStore(f"{path}/{VOLUMES} is missing, which held all images of this store; put it back")
        raise NoStore(f"there is no store at {path}; make one with: imgfs mkfs {path}")
    if disk.exists(f"{path}/{SUPERBLOCK}"):
        try:
            return unpack_superblock(disk.read_file(f"{path}/{SUPERBLOCK}")), False
        except Damaged as error:
            log.warning("%s: %s", path, error)
    for name in disk.names(f"{path}/{VOLUMES}"):
        if not name.endswith(SUFFIX):
            continue
        try:
            volume = Volume.open(disk, f"{path}/{VOLUMES}/{name}")
        except Damaged:
            continue
        volume.close()
        return Superblock(volume.header.store_id, volume.header.volume_bytes_max), True
    raise NoStore(
        f"{path} has neither a whole {SUPERBLOCK} nor a volume: if mkfs was cut off, remove it and make it anew"
    )


def try_lock(path: str, disk: Disk) -> int | None:
    """Return a descriptor that holds the lock of the store at *path* while it is open; None if another has it."""
    lock = disk.lock(f"{path}/{LOCK}")
    for _ in range(_LOCK_TRIES):
        if lock is not None:
            break
        # Who asks whether the store is in use holds the lock for a moment.
        time.sleep(_LOCK_PAUSE_S)
        lock = disk.lock(f"{path}/{LOCK}")
    return lock


def _take_lock(path: str, disk: Disk) -> int:
    if not disk.exists(f"{path}/{STAGING}"):
        disk.mkdir(f"{path}/{STAGING}")
    lock = try_lock(path, disk)
    if lock is None:
        raise Busy(f"{path} is in use by process {owner(path, disk) or '?'}; stop it first, or work through its mount")
    disk.truncate(lock, 0)
    disk.write(lock, 0, [f"{os.getpid()}\n".encode()])
    return lock


def owner(path: str, disk: Disk | None = None) -> int | None:
    """Return the pid of the process that has the store at *path* open for writing; 0: unknown, None: none has."""
    disk = disk or Disk()
    if not disk.exists(f"{path}/{LOCK}"):
        return None
    file = disk.open(f"{path}/{LOCK}")
    try:
        if not disk.is_locked(file):
            return None
        text = disk.read(file, 0, 20).strip()
        return int(text) if text.isdigit() else 0
    finally:
        disk.close(file)
