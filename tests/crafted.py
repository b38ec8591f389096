"""Stores whose volumes are written needle by needle, whatever they say: what no release would have written, too.

Owns sequence numbers and where needles lie. Must not know what a store makes of them.

*Concurrency:* none.
"""

from powercut import SimulatedDisk

from imgfs.format import NEEDLES_START, OWNED_KINDS, Kind, Needle, Tag, VolumeHeader, hash_seed, name_hash
from imgfs.index import checkpoint, index_paths, names_a_name, names_header, pack_name, pack_record, state_of
from imgfs.opening import SUPERBLOCK
from imgfs.settings import KIB, Settings
from imgfs.store import ROOT, make_store
from imgfs.superblock import unpack_superblock
from imgfs.volume import Volume
from imgfs.volumes import volume_path

PATH = "/store"
VOLUMES = f"{PATH}/volumes"
SETTINGS = Settings(volume_bytes_max=64 * KIB, headroom_bytes=0, rest_slots=2)
_TIME_NS = 1_700_000_000_000_000_000


class Crafted:
    """A store in the making; its root directory is there already.

    Attributes:
        path: of the volume that needles are added to.
        end: where it ends.
        durable: the mark that the next needles get; None: all before each is durable.
    """

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        make_store(PATH, SETTINGS, self.disk, uid=0, gid=0)
        self._superblock = unpack_superblock(self.disk.content(f"{PATH}/{SUPERBLOCK}"))
        for path in self.disk.paths():
            if path.startswith(VOLUMES):
                self.disk.remove(path)
        self.sequence = 1
        self.durable: int | None = None
        self._owners: dict[tuple[int, int, int], int] = {}
        self._volume_id = 0
        self._begin()
        self.add(Needle(Kind.DIRECTORY, ROOT, ROOT, mode=0o755))

    def _begin(self) -> None:
        self._volume_id += 1
        self.path = volume_path(VOLUMES, self._volume_id)
        header = VolumeHeader(
            self._superblock.store_id,
            bytes([self._volume_id]) * 16,
            self._volume_id,
            self.sequence,
            _TIME_NS,
            self._superblock.volume_bytes_max,
        )
        self._volume = Volume.create(self.disk, self.path, header, 0)
        self.end = NEEDLES_START
        self._records, self._names = bytearray(), bytearray(names_header(self._volume_id))

    def add(self, needle: Needle, data: bytes = b"") -> int:
        """Append *needle* and return its offset."""
        offset = self.end
        needle.sequence = needle.sequence or self.sequence
        self.sequence = needle.sequence + 1
        needle.data_size = len(data)
        needle.ctime_ns = needle.commit_ns = needle.mtime_ns = _TIME_NS + needle.sequence
        if needle.kind in OWNED_KINDS:
            owner = needle.uid, needle.gid, needle.mode
            needle.owner = self._owners.setdefault(owner, len(self._owners))
        needle.durable = offset if self.durable is None else self.durable
        self._volume.write_needle(offset, needle, [data] if data else [], None)
        name_offset = len(self._names) if names_a_name(needle.kind) and needle.name else 0
        value = name_hash(needle.name, hash_seed(self._superblock.store_id)) if name_offset else 0
        self._records += pack_record(needle, offset, name_offset, value)
        if name_offset:
            self._names += pack_name(needle.name)
        self.end += needle.length
        return offset

    def file(self, inode: int, parent: int, name: bytes, data: bytes) -> int:
        return self.add(Needle(Kind.FILE, inode, parent, name, mode=0o640, uid=3, gid=4), data)

    def directory(self, inode: int, parent: int, name: bytes) -> int:
        return self.add(Needle(Kind.DIRECTORY, inode, parent, name, mode=0o750))

    def link(self, inode: int, parent: int, name: bytes, target: int) -> int:
        return self.add(Needle(Kind.LINK, inode, parent, name, extras={Tag.TARGET: target.to_bytes(8, "little")}))

    def rename(self, inode: int, parent: int, name: bytes, replaced: int = 0, flags: int = 0) -> int:
        extras: dict[int, bytes] = {Tag.REPLACED: replaced.to_bytes(8, "little")} if replaced else {}
        return self.add(Needle(Kind.RENAME, inode, parent, name, flags=flags, extras=extras))

    def delete(self, inode: int, flags: int = 0) -> int:
        return self.add(Needle(Kind.DELETE, inode, flags=flags))

    def checkpoint(self, *, seal: bool) -> None:
        """Append a checkpoint, and write the index files it vouches for."""
        self.add(checkpoint(state_of(self._records, self._names, self.end), seal=seal))
        self._write_index()

    def _write_index(self) -> None:
        paths = index_paths(self.path)
        self.disk.set_content(paths.records, bytes(self._records))
        self.disk.set_content(paths.names, bytes(self._names))

    def roll(self) -> None:
        """Seal the volume and begin the next."""
        self.checkpoint(seal=True)
        self._settle()
        self._begin()

    def _settle(self) -> None:
        self._volume.close()
        self.disk.set_content(self.path, self.disk.content(self.path)[: self.end])

    def finish(self, ending: str) -> SimulatedDisk:
        """Return the disk. *ending*: "loaded", what was said is in a sealed volume; "checkpointed"; or "replayed"."""
        if ending == "loaded":
            self.roll()
            self.checkpoint(seal=False)
        elif ending == "checkpointed":
            self.checkpoint(seal=False)
        else:
            self._write_index()
        self._settle()
        self.disk.trace.clear()
        return self.disk
