"""Needles whose checksums are right and which nobody has written: each costs no more than itself.

Most of these were found by fuzzing.py: a traceback, all memory taken, or no end, where one line and one image was due.
"""

from dataclasses import replace

import pytest
from hostile import BIG, INDEX, VOLUME, few_images, named, needles, rewrite, without_index
from snapshots import attributes_of, snapshot
from stores import content, disk_of, names, new_store, open_store, put, reopened

from imgfs.errors import Damaged
from imgfs.format import Kind, Needle, Tag, inode_of, unpack_xattrs
from imgfs.layout import SLOTS_MAX, Word
from imgfs.plausible import SLOTS_AHEAD_MAX, plausible_needle
from imgfs.store import ROOT
from imgfs.volume import Volume

FILE = Needle(Kind.FILE, 5, 1, b"name", 9, 0o644, sequence=9)
DIRECTORY = replace(FILE, kind=Kind.DIRECTORY, data_size=0)
LINK = replace(FILE, kind=Kind.LINK, data_size=0, mode=0, extras={Tag.TARGET: (4).to_bytes(8, "little")})
NAMELESS = replace(FILE, parent=0, name=b"")


pytestmark = pytest.mark.usefixtures("no_store_stays_open")


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
