"""A sync that failed is never forgotten: not by the store that saw it, and not by the one that is opened next."""

import errno

import pytest
from powercut import SimulatedDisk
from survivors import NOTHING_UNSYNCED

from imgfs.errors import DiskFailure
from imgfs.store import ROOT, Store, make_store


def put(store: Store, name: bytes) -> None:
    store.put(ROOT, name, b"bytes of " + name, 9 + len(name), mode=0o644, uid=0, gid=0, mtime_ns=1)


def names(store: Store) -> list[bytes]:
    return sorted(entry.name for entry in store.list(ROOT))


@pytest.fixture
def failed() -> SimulatedDisk:
    """A disk whose store saw a sync fail after `a` was put, and was closed."""
    disk = SimulatedDisk()
    make_store("/store", disk=disk, uid=0, gid=0)
    store = Store.open("/store", disk=disk)
    put(store, b"a")
    disk.fail_next("sync", errno.EIO)
    with pytest.raises(DiskFailure, match="Input/output error"):
        store.sync()
    with pytest.raises(DiskFailure, match="mount again"):
        put(store, b"b")
    with pytest.raises(DiskFailure):
        store.sync()
    with pytest.raises(DiskFailure):
        store.close()
    return disk


def test_the_next_opening_writes_what_the_failed_sync_lost(failed: SimulatedDisk) -> None:
    """The kernel holds the lost pages for clean: a sync alone would call them durable, and they would be gone."""
    disk = failed.after_kill()
    with Store.open("/store", disk=disk) as store:
        put(store, b"c")
        store.sync()
        disk = disk.after_power_cut(NOTHING_UNSYNCED)
    with Store.open("/store", disk=disk) as store:
        assert names(store) == [b"a", b"c"]
        assert not store.report.damage
        assert not store.report.torn_bytes
