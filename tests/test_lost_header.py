"""Both copies of a volume's header are damaged: its images are lost, and nothing else."""

from powercut import SimulatedDisk

from imgfs.settings import KIB, Settings
from imgfs.store import ROOT, Store, make_store

SETTINGS = Settings(volume_bytes_max=64 * KIB, headroom_bytes=0)
PATH = "/store"


def filled() -> SimulatedDisk:
    """A disk with a store of several volumes."""
    disk = SimulatedDisk()
    make_store(PATH, SETTINGS, disk, uid=0, gid=0)
    with Store.open(PATH, disk=disk, settings=SETTINGS) as store:
        for number in range(20):
            data = bytes([number]) * 10_000
            store.put(ROOT, b"%02d" % number, data, len(data), mode=0o644, uid=0, gid=0, mtime_ns=1)
    return disk


def volumes(disk: SimulatedDisk) -> list[str]:
    return [path for path in disk.paths() if path.endswith(".vol")]


def readable(store: Store) -> set[bytes]:
    found = set()
    for entry in store.list(ROOT):
        handle = store.open_image(entry.inode)
        assert bytes(store.read(handle, 0, 20_000)) == bytes([int(entry.name)]) * 10_000
        store.release(handle)
        found.add(entry.name)
    return found


def test_the_images_of_all_other_volumes_are_there() -> None:
    whole = filled()
    paths = volumes(whole)
    assert len(paths) > 3
    seen: list[set[bytes]] = []
    for lost in paths:
        disk = whole.after_kill()
        for offset in (20, 4096 + 20):
            disk.flip(lost, offset)
        before = disk.content(lost)
        with Store.open(PATH, disk=disk, settings=SETTINGS) as store:
            assert [damage.volume for damage in store.report.damage if damage.offset == 0] == [int(lost[-12:-4])]
            seen.append(readable(store))
            store.put(ROOT, b"99", b"c" * 10_000, 10_000, mode=0o644, uid=0, gid=0, mtime_ns=1)
            assert b"99" in readable(store)
        assert disk.content(lost) == before, "what cannot be read is kept as it is"
        assert len(volumes(disk)) >= len(paths)
    everything = {b"%02d" % number for number in range(20)}
    gone = [everything - names for names in seen]
    assert sum(map(len, gone)) == len(everything)
    assert set().union(*gone) == everything
