"""Files whose checksums are right and which nobody has written, and files that belong elsewhere: said, and left out.

Most of these were found by fuzzing.py: a traceback, all memory taken, or no end, where one line and one image was due.
"""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import xxhash
from crc32c import crc32c
from powercut import SimulatedDisk
from snapshots import attributes_of, snapshot
from stores import PATH, TINY, abandon_all, content, disk_of, names, new_store, open_store, put, reopened

from imgfs.errors import Damaged, MountFailed, StoreLimit
from imgfs.format import (
    CHECKSUM,
    INDEX_RECORD,
    INDEX_RECORD_BYTES,
    INDEX_STATE,
    NEEDLES_START,
    VOLUME_HEADER,
    IndexState,
    Kind,
    Needle,
    Tag,
    checksums,
    inode_of,
    pack_extras,
    pack_footer,
    pack_needle_header,
    pack_volume_header,
    unpack_volume_header,
    unpack_xattrs,
)
from imgfs.handover import Handover
from imgfs.layout import SLOTS_MAX, Word
from imgfs.mountpoint import mounts
from imgfs.options import BadOption, parse
from imgfs.plausible import NUMBER_MAX, SLOTS_AHEAD_MAX, plausible_header, plausible_needle
from imgfs.store import ROOT, Store
from imgfs.superblock import Superblock, pack_superblock, unpack_superblock
from imgfs.volume import Volume
from imgfs.volumes import volume_id_of

VOLUME = f"{PATH}/volumes/00000001.vol"
INDEX = VOLUME.replace(".vol", ".idx")
NAMES = VOLUME.replace(".vol", ".names")
SUPERBLOCK = f"{PATH}/imgfs.json"


@pytest.fixture(autouse=True)
def _no_store_stays_open() -> Iterator[None]:
    yield
    abandon_all()


def few_images() -> SimulatedDisk:
    """Return the disk of a store that was closed, with `a`, `b` with an attribute, `c` and a directory `d`."""
    store = new_store()
    put(store, ROOT, b"a", b"first")
    store.set_xattr(put(store, ROOT, b"b", b"second"), b"user.x", b"value")
    put(store, ROOT, b"c", b"third")
    put(store, store.mkdir(ROOT, b"d", 0o755, 0, 0), b"e", b"fourth")
    store.close()
    return disk_of(store)


def needles(disk: SimulatedDisk) -> list[tuple[int, Needle]]:
    volume = Volume.open(disk, VOLUME)
    found = [item for item in volume.scan(NEEDLES_START, volume.size()) if isinstance(item, tuple)]
    volume.close()
    return found


def rewrite(
    disk: SimulatedDisk, chosen: Callable[[Needle], bool], *, data: bytes | None = None, **changes: object
) -> int:
    """Change the needle that is *chosen* in its place, and fix its checksums; return where it lies."""
    offset, needle = next((offset, needle) for offset, needle in needles(disk) if chosen(needle))
    content_ = bytearray(disk.content(VOLUME))
    start = offset + needle.data_start
    body = bytes(content_[start : start + needle.data_size]) if data is None else data
    changed = replace(needle, data_size=len(body), **changes)  # type: ignore[arg-type]
    seed = unpack_volume_header(bytes(content_[:NEEDLES_START])).seed()
    packed = pack_needle_header(changed, seed, offset) + body
    packed += pack_footer(checksums(body), len(body), changed.checksum)
    content_[offset : offset + len(packed)] = packed
    disk.set_content(VOLUME, bytes(content_))
    return offset


def without_index(disk: SimulatedDisk) -> SimulatedDisk:
    for path in (INDEX, NAMES):
        disk.remove(path)
    return disk


def named(name: bytes) -> Callable[[Needle], bool]:
    return lambda needle: needle.name == name


# -- needles ------------------------------------------------------------------------------------------------------

FILE = Needle(Kind.FILE, 5, 1, b"name", 9, 0o644, sequence=9)
DIRECTORY = replace(FILE, kind=Kind.DIRECTORY, data_size=0)
LINK = replace(FILE, kind=Kind.LINK, data_size=0, mode=0, extras={Tag.TARGET: (4).to_bytes(8, "little")})
NAMELESS = replace(FILE, parent=0, name=b"")
BIG = 1 << 63


@pytest.mark.parametrize(
    "needle",
    [
        FILE,
        NAMELESS,
        DIRECTORY,
        LINK,
        Needle(Kind.DIRECTORY, 1, 1, sequence=2),
        Needle(Kind.ATTRIBUTES, 1, sequence=2, mode=0o777),
        Needle(Kind.XATTR, 1, sequence=2, data_size=9),
        Needle(Kind.SPECIAL, 5, 1, b"n", mode=0o020644, extras={Tag.DEVICE: bytes(4)}, sequence=2),
        Needle(Kind.DELETE, 5, sequence=1),
        Needle(Kind.OWNER, 0, owner=65535),
        Needle(Kind.CHECKPOINT, 0, extras={Tag.CHECKPOINT: b""}),
        Needle(200, 9, name=b"/", extras={Tag.TARGET: b"?"}),  # of a release to come
        replace(FILE, inode=inode_of(SLOTS_MAX - 1, 255), parent=SLOTS_MAX, sequence=SLOTS_MAX),
        replace(FILE, name=b"n" * 255, mtime_ns=-BIG, ctime_ns=BIG - 1, uid=2**32 - 1, owner=65535, flags=255),
        replace(FILE, extras={999: b"?"}, durable=8192),
    ],
)
def test_what_a_writer_writes(needle: Needle) -> None:
    assert plausible_needle(needle, 8192, 1)


@pytest.mark.parametrize(
    "needle",
    [
        replace(FILE, name=b"n" * 256),
        replace(FILE, extras={Tag.TARGET: b"\2"}),
        replace(FILE, extras={Tag.TARGET: (SLOTS_MAX + 1).to_bytes(8, "little")}),
        replace(FILE, extras={Tag.TARGET: (5 | 256 << 32).to_bytes(8, "little")}),
        replace(FILE, extras={Tag.REPLACED: (1).to_bytes(8, "little")}),
        replace(FILE, extras={Tag.DEVICE: bytes(8)}),
        replace(LINK, extras={999: b""}),
        Needle(Kind.XATTR, 5, data_size=(1 << 20) + 1),
        Needle(Kind.SYMLINK, 5, 1, b"n", 4096, 0o777),
        Needle(200, SLOTS_MAX + 1),
    ],
)
def test_what_no_writer_writes(needle: Needle) -> None:
    assert not plausible_needle(needle, 8192, 1)


HOSTILE = {
    "no kind": {"kind": Kind.FREE},
    "inode 0": {"inode": 0},
    "slot far ahead": {"inode": SLOTS_AHEAD_MAX + 10},
    "slot beyond the table": {"inode": SLOTS_MAX + 1, "sequence": 1 << 40},
    "generation": {"inode": 5 | 256 << 32},
    "the root as an image": {"inode": 1},
    "the root of another generation": {"inode": 1 | 1 << 32},
    "no parent": {"parent": 0},
    "parent beyond": {"parent": SLOTS_AHEAD_MAX + 10},
    "generation of the parent": {"parent": 1 | 256 << 32},
    "in itself": {"parent": 4},
    "no name": {"name": b""},
    "slash": {"name": b"/"},
    "NUL": {"name": b"\0"},
    "dot": {"name": b"."},
    "mode": {"mode": 0o100644},
    "sequence": {"sequence": BIG},
    "sequence far ahead": {"sequence": 1 << 50},
    "durable": {"durable": 1 << 40},
    "link without target": {"kind": Kind.LINK},
    "type of a special file": {"kind": Kind.SPECIAL, "mode": 0o100644},
    "owner with an inode": {"kind": Kind.OWNER},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_what_no_writer_writes_costs_that_needle(changes: dict[str, object]) -> None:
    disk = few_images()
    inode = next(needle.inode for _, needle in needles(disk) if needle.name == b"c")
    changes = {"inode": inode, **changes}
    if changes.get("parent") == 4:
        changes["parent"] = inode
    offset = rewrite(disk, named(b"c"), **changes)
    assert Volume.open(disk, VOLUME).unpack(disk.content(VOLUME)[offset:], offset) is None
    for each in (without_index(disk.after_kill()), disk.after_kill()):
        for writable in (False, True):
            with open_store(each, writable=writable) as store:
                seen = snapshot(store, damaged=True)
                assert {b"/a", b"/b", b"/d/e"} <= seen.keys()
                assert seen[b"/a"].data == b"first"
                assert INDEX in each.paths() or offset in [damage.offset for damage in store.report.damage]


def test_an_owner_number_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """65,535 owners that no needle defines are none to write down."""
    disk = without_index(few_images())
    rewrite(disk, lambda needle: needle.kind == Kind.OWNER, owner=65535)
    before = disk.steps
    store = open_store(disk)
    assert content(store, store.resolve(b"a")) == b"first"
    assert disk.steps - before < 100
    assert store._memory.words[Word.OWNERS] == 65536
    calls = []
    monkeypatch.setattr("imgfs.log.Log.define_owner", lambda *arguments: calls.append(arguments))
    reopened(store).close()
    assert len(calls) < 5


def test_what_is_no_attributes() -> None:
    disk = few_images()
    rewrite(disk, lambda needle: needle.kind == Kind.XATTR, data=b"\xff" * 17)
    with open_store(disk) as store:
        inode = store.resolve(b"b")
        assert content(store, inode) == b"second"
        with pytest.raises(Damaged, match="extended attributes"):
            attributes_of(store, inode)
        store.set_xattr(inode, b"user.y", b"new")
        assert attributes_of(store, inode) == ((b"user.y", b"new"),)


@pytest.mark.parametrize("data", [b"\1", b"\1\0\xff\xff\xff\xffa", b"\0\0\0\0\0\0", b"\1\0\0\0\0\0a\1\0\0"])
def test_attributes_that_end_too_early(data: bytes) -> None:
    with pytest.raises(Damaged):
        unpack_xattrs(data)


def test_a_directory_that_is_put_as_an_image_stays_one() -> None:
    """... for what lies in it would be found nowhere; the needle is reported, also where the index says the same."""
    store = new_store()
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    put(store, directory, b"in", b"inside")
    put(store, ROOT, b"other", b"other")
    store.sync()
    put(store, ROOT, b"last", b"last")
    disk = disk_of(store).after_kill()
    without_index(disk)
    offset = rewrite(disk, named(b"other"), inode=directory, name=b"other")
    with open_store(disk) as writer:
        assert content(writer, writer.resolve(b"d/in")) == b"inside"
        assert content(writer, writer.resolve(b"last")) == b"last"
        (damage,) = writer.report.damage
        assert (damage.offset, damage.inode) == (offset, directory)
        assert "cannot be both" in damage.text


def test_a_link_to_a_directory_is_no_name_of_it() -> None:
    store = new_store()
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    store.link(put(store, ROOT, b"a", b"first"), ROOT, b"link")
    store.sync()
    put(store, ROOT, b"last", b"last")
    disk = without_index(disk_of(store).after_kill())
    rewrite(disk, named(b"link"), extras={Tag.TARGET: directory.to_bytes(8, "little")})
    with open_store(disk) as writer:
        assert names(writer) == {b"d", b"a", b"last"}
        assert writer.attr(directory).nlink == 2
        assert "only one" in writer.report.damage[0].text


# -- the index ----------------------------------------------------------------------------------------------------


def lie_in_index(disk: SimulatedDisk, change: Callable[[bytearray, bytearray], None]) -> None:
    """Change records and names of the index, and what the last checkpoint says of them."""
    offset, needle = needles(disk)[-1]
    state = IndexState(*INDEX_STATE.unpack(needle.extras[Tag.CHECKPOINT]))
    records, index_names = bytearray(disk.content(INDEX)), bytearray(disk.content(NAMES))
    change(records, index_names)
    disk.set_content(INDEX, bytes(records))
    disk.set_content(NAMES, bytes(index_names))
    state = state._replace(
        records_crc=crc32c(bytes(records[: state.records * INDEX_RECORD_BYTES])),
        names_crc=crc32c(bytes(index_names[: state.names_bytes])),
    )
    extras = {Tag.CHECKPOINT: INDEX_STATE.pack(*state)}
    assert rewrite(disk, lambda each: each.sequence == needle.sequence, extras=extras) == offset


RECORD_FIELDS = (
    "kind",
    "slot",
    "parent",
    "name_offset",
    "offset8",
    "size",
    "mtime",
    "ctime",
    "owner",
    "hash_generation",
)
LIES = {
    "no kind": ("kind", 0),
    "slot 0": ("slot", 0),
    "slot without end": ("slot", 0xFFFF_FFFF),
    "slot far ahead": ("slot", SLOTS_AHEAD_MAX + 1000),
    "the root as an image": ("slot", 1),
    "parent without end": ("parent", 0xFFFF_FFFF),
    "no parent": ("parent", 0),
    "name beyond the end": ("name_offset", 0xFFFF_FFF0),
    "no name": ("name_offset", 0),
    "before the first needle": ("offset8", 0),
    "beyond the end": ("offset8", 0xFFFF_FFFF),
}


@pytest.mark.parametrize(("field", "value"), LIES.values(), ids=LIES)
def test_an_index_that_lies_is_made_anew(field: str, value: int) -> None:
    disk = few_images()
    with open_store(disk.after_kill()) as store:
        wanted = snapshot(store)

    def change(records: bytearray, _: bytearray) -> None:
        for row in range(0, len(records), INDEX_RECORD_BYTES):
            fields = list(INDEX_RECORD.unpack_from(records, row))
            if fields[0] == Kind.FILE:
                fields[RECORD_FIELDS.index(field)] = value
                INDEX_RECORD.pack_into(records, row, *fields)
                return

    lie_in_index(disk, change)
    for writable in (False, True):
        with open_store(disk.after_kill(), writable=writable) as store:
            assert store.report.rebuilt == [INDEX]
            assert snapshot(store).keys() == wanted.keys()
            assert store._memory.resident_bytes() < 32 << 20


@pytest.mark.parametrize("byte", [b"/", b"\0"])
def test_names_that_are_none(byte: bytes) -> None:
    """The kernel would refuse the whole listing; to look at one is EIO, and rebuild-index helps."""
    disk = few_images()

    def change(_: bytearray, index_names: bytearray) -> None:
        at = index_names.index(b"\1c")
        index_names[at + 1 : at + 2] = byte

    lie_in_index(disk, change)
    with open_store(disk.after_kill(), writable=False) as store:
        with pytest.raises(Damaged, match="rebuild-index"):
            list(store.list(ROOT))
        assert content(store, store.resolve(b"a")) == b"first"
    with open_store(without_index(disk), writable=False) as store:
        assert names(store) == {b"a", b"b", b"c", b"d"}


# -- volumes ------------------------------------------------------------------------------------------------------


def test_what_ends_within_its_header_is_damage() -> None:
    """The last volume was cut within the second copy of its header: a store that can be written, and says so."""
    for size in (4096, 5000, NEEDLES_START - 1):
        disk = few_images()
        disk.set_content(VOLUME, disk.content(VOLUME)[:size])
        for writable in (False, True):
            with open_store(disk, writable=writable) as store:
                assert (1, size) in [(damage.volume, damage.offset) for damage in store.report.damage]
                assert not names(store)
                if writable:
                    put(store, ROOT, b"new", b"new")
        with open_store(disk) as store:
            assert content(store, store.resolve(b"new")) == b"new"


@pytest.mark.parametrize(
    ("name", "volume_id"),
    [
        ("00000012.vol", 12),
        ("00000012.vol.new", 12),
        ("12.idx", 12),
        ("\u00b2.vol", 0),
        ("\u0663.vol", 0),
        ("x.vol", 0),
        (".vol", 0),
        ("-1.vol", 0),
        ("922337203685477580.vol", 922337203685477580),
        ("9223372036854775808.vol", 0),
        ("9" * 200, 0),
    ],
)
def test_names_of_files_among_the_volumes(name: str, volume_id: int) -> None:
    assert volume_id_of(name) == volume_id
    disk = few_images()
    disk.set_content(f"{PATH}/volumes/{name}", b"no volume")
    store = open_store(disk)
    for number in range(20):  # into the next volumes
        put(store, ROOT, b"%d" % number, bytes(9000))
    reader = reopened(store, writable=False)
    assert content(reader, reader.resolve(b"a")) == b"first"
    assert content(reader, reader.resolve(b"19")) == bytes(9000)


def test_a_file_with_the_highest_number_is_an_error_before_anything_is_lost() -> None:
    """No reader would believe the header of a volume with a higher one."""
    store = open_store(few_images())
    disk_of(store).set_content(f"{PATH}/volumes/{NUMBER_MAX}.vol", b"no volume")
    with pytest.raises(StoreLimit, match="highest number"):
        for number in range(20):
            put(store, ROOT, b"%d" % number, bytes(9000))
    written = names(store)
    assert len(written) > 5
    disk_of(store).remove(f"{PATH}/volumes/{NUMBER_MAX}.vol")
    assert names(reopened(store)) == written


def test_the_last_sequence_number_is_an_error_before_anything_is_lost() -> None:
    store = new_store()
    put(store, ROOT, b"a", b"first")
    store._memory.words[Word.NEXT_SEQUENCE] = NUMBER_MAX
    with pytest.raises(StoreLimit, match="sequence numbers"):
        put(store, ROOT, b"new")
    assert names(store) == {b"a"}


def test_volumes_that_belong_elsewhere_are_left_out() -> None:
    disk, other = few_images(), few_images()
    disk.set_content(f"{PATH}/volumes/00000002.vol", other.content(VOLUME))
    disk.set_content(f"{PATH}/volumes/00000003.vol", disk.content(VOLUME))
    for writable in (False, True):
        with open_store(disk, writable=writable) as store:
            assert [(damage.volume, damage.text) for damage in store.report.damage] == [
                (2, "this is a volume of another store"),
                (3, "this is volume 1 under another name; give it back its own"),
            ]
            assert names(store) == {b"a", b"b", b"c", b"d"}
    assert disk.content(f"{PATH}/volumes/00000002.vol") == other.content(VOLUME)


def test_the_superblock_of_another_store_is_an_error() -> None:
    """Else the store would begin anew, empty."""
    disk = few_images()
    disk.set_content(SUPERBLOCK, few_images().content(SUPERBLOCK))
    for writable in (False, True):
        with pytest.raises(Damaged, match="remove it, and it is made again"):
            open_store(disk, writable=writable)
    disk.remove(SUPERBLOCK)
    with open_store(disk) as store:
        assert content(store, store.resolve(b"a")) == b"first"


def test_a_volume_cannot_say_where_itself_ends() -> None:
    disk = few_images()
    data = bytearray(disk.content(VOLUME))
    extras = pack_extras({Tag.PREVIOUS_END: struct.pack("<QQ", 1, 8) + INDEX_STATE.pack(NEEDLES_START, 0, 0, 16, 0)})
    fields = list(VOLUME_HEADER.unpack_from(data))
    fields[2] = VOLUME_HEADER.size + 8 + len(extras)
    fixed = VOLUME_HEADER.pack(*fields)
    copy = fixed + CHECKSUM.pack(xxhash.xxh3_64_intdigest(fixed + extras)) + extras
    data[: len(copy)] = copy
    disk.set_content(VOLUME, bytes(data))
    with open_store(disk) as store:
        assert names(store) == {b"a", b"b", b"c", b"d"}


def test_a_header_with_half_a_field_is_not_whole() -> None:
    header = unpack_volume_header(few_images().content(VOLUME))
    data = bytearray(pack_volume_header(header))
    extras = pack_extras({Tag.PREVIOUS_END: bytes(40)})
    fields = list(VOLUME_HEADER.unpack_from(data))
    fields[2] = VOLUME_HEADER.size + 8 + len(extras)
    fixed = VOLUME_HEADER.pack(*fields)
    copy = fixed + CHECKSUM.pack(xxhash.xxh3_64_intdigest(fixed + extras)) + extras
    data[: len(copy)] = copy
    assert unpack_volume_header(bytes(data)) == header  # the other copy
    data[4096 : 4096 + len(copy)] = copy
    with pytest.raises(Damaged):
        unpack_volume_header(bytes(data))


@pytest.mark.parametrize(
    "changes",
    [{"volume_id": 0}, {"volume_id": BIG}, {"first_sequence": BIG}, {"volume_bytes_max": 0}, {"volume_bytes_max": BIG}],
)
def test_a_header_that_no_release_writes(changes: dict[str, int]) -> None:
    disk = few_images()
    header = unpack_volume_header(disk.content(VOLUME))
    assert plausible_header(header)
    disk.set_content(VOLUME, pack_volume_header(replace(header, **changes)) + disk.content(VOLUME)[NEEDLES_START:])
    with open_store(disk) as store:
        assert "no release" in store.report.damage[0].text
        put(store, ROOT, b"new")


def test_a_store_without_volumes_has_a_root() -> None:
    disk = few_images()
    disk.remove(VOLUME)
    without_index(disk)
    for writable in (False, True):
        with open_store(disk, writable=writable) as store:
            assert snapshot(store).keys() == {b""}
            assert store.name(ROOT) == b""


def test_links_before_what_they_name() -> None:
    """The volume with the first put is gone, without a trace: what is left is counted right."""
    store = new_store()
    inode = put(store, ROOT, b"a", bytes(50_000))
    put(store, ROOT, b"filler", bytes(20_000))
    store.link(inode, ROOT, b"link")
    store.put(ROOT, b"a", b"again", 5, mode=0o600, uid=0, gid=0, mtime_ns=1)
    store.close()
    disk = disk_of(store)
    disk.remove(VOLUME)
    without_index(disk)
    for path in [path for path in disk.paths() if path.endswith((".idx", ".names"))]:
        disk.remove(path)
    with open_store(disk) as writer:
        seen = snapshot(writer)
        assert seen[b"/link"].nlink == 2
        assert seen[b"/a"].data == b"again"


# -- the superblock and what else is text -------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [-1, 0, NEEDLES_START, 1 << 36, 1 << 80])
def test_a_volume_size_that_cannot_be(limit: int) -> None:
    """It would be found out only when the next volume is begun."""
    disk = few_images()
    store_id = unpack_superblock(disk.content(SUPERBLOCK)).store_id
    disk.set_content(SUPERBLOCK, pack_superblock(Superblock(store_id, limit)))
    with open_store(disk) as store:
        assert store.settings.volume_bytes_max == TINY.volume_bytes_max
        assert store.report.rebuilt == [SUPERBLOCK]


@pytest.mark.parametrize("option", ["workers=" + "9" * 5000, "workers=\u0663", "sync_interval=1e10", "grace=1e300"])
def test_numbers_without_end_are_no_options(option: str) -> None:
    with pytest.raises(BadOption):
        parse([option])


def descriptor_of(data: bytes) -> int:
    descriptor = os.memfd_create("hostile", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    return descriptor


def test_lines_of_the_mount_table_that_are_unlike_others() -> None:
    descriptor = descriptor_of(
        b"36 35 98:0 / /mnt rw - ext3 /dev/root rw,a b=c\n"
        b"nothing\n"
        b"41 36 0:45 / /run/\\040x ro - fuse.imgfs\n"
        b"42 36 0:46 / /last rw - fuse.imgfs /store rw\n"
    )
    found = mounts(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)
    assert [(mount.point, mount.source) for mount in found] == [
        ("/mnt", "/dev/root"),
        ("/run/ x", ""),
        ("/last", "/store"),
    ]


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"{}", b'{"version": 1}', b'{"version": 1, "options": 7}', b"[" * 99999]
)
def test_a_handover_that_is_none(text: bytes) -> None:
    descriptor = descriptor_of(text)
    with pytest.raises(MountFailed):
        Handover.read(descriptor)
    os.close(descriptor)


def test_any_inode_and_any_handle_is_answered() -> None:
    """As a file handle of NFS may hold any number."""
    store = new_store()
    inode = put(store, ROOT, b"a")
    for number in (0, inode + 1, inode | 1 << 32, 1 << 28, 0xFFFF_FFFF, 1 << 40, (1 << 64) - 1):
        for ask in (Store.attr, Store.name, Store.parent, Store.open_image, Store.readlink, Store.list_xattrs):
            with pytest.raises(Exception, match="is gone"):
                ask(store, number)
        with pytest.raises(Exception, match="is not open"):
            store.read(number, 0, 1)
