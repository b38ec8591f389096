"""A store that contradicts itself is repaired: what came later counts, and all that was whole is there."""

from itertools import pairwise

import pytest
from crafted import PATH, SETTINGS
from repairs import D, E, F, G, H, clean, data, found_before, repaired

from imgfs.errors import Busy
from imgfs.format import FLAG_BARE, Kind, Needle, Tag, inode_of
from imgfs.repair import Repair
from imgfs.store import ROOT, Store

ENDINGS = pytest.mark.parametrize("ending", ["replayed", "checkpointed", "loaded"])


# -- nothing to do -------------------------------------------------------------------------------------------------


@ENDINGS
def test_nothing_is_done_to_a_clean_store(ending: str) -> None:
    disk = clean().finish(ending)
    assert found_before(disk) == []
    done, seen = repaired(disk)
    assert done == []
    assert data(seen) == {b"/d/one": b"1" * 900, b"/two": b"2" * 800, b"/d/link": b"2" * 800}


def test_a_store_in_use_is_left_alone() -> None:
    disk = clean().finish("checkpointed")
    with Store.open(PATH, disk=disk, settings=SETTINGS):
        for dry_run in (True, False):
            with pytest.raises(Busy):
                Repair(PATH, disk, SETTINGS, dry_run=dry_run).run()


# -- orphans -------------------------------------------------------------------------------------------------------


@ENDINGS
def test_an_entry_of_a_directory_that_does_not_exist(ending: str) -> None:
    craft = clean()
    craft.file(H, inode_of(77, 0), b"orphan", b"orphan")
    disk = craft.finish(ending)
    done, seen = repaired(disk)
    lost = inode_of(77, 0)
    assert done == [f"inode {lost}: the directory is lost, what lay in it is not; it is lost+found/#{lost} now"]
    assert data(seen)[b"/lost+found/#%d/orphan" % lost] == b"orphan"
    assert seen[b"/lost+found"].mode == 0o700


@ENDINGS
@pytest.mark.parametrize("how", ["put", "renamed", "exchanged names"])
def test_an_entry_of_what_is_no_directory(ending: str, how: str) -> None:
    """It has its old name in lost+found; what was taken for a directory is what it was."""
    craft = clean()
    if how == "put":
        craft.file(H, F, b"orphan", b"orphan")
    else:
        craft.file(H, ROOT, b"orphan", b"orphan")
        other = inode_of(9, 0)
        craft.file(other, ROOT, b"replaced", b"")
        craft.rename(H, F, b"orphan", replaced=other if how == "renamed" else 0)
    disk = craft.finish(ending)
    done, seen = repaired(disk)
    assert len(done) == 1
    assert "its directory is none" in done[0] or "it had no name left" in done[0]
    here = {path: each for path, each in data(seen).items() if path.startswith(b"/lost+found/")}
    assert list(here.values()) == [b"orphan"]
    assert data(seen)[b"/two"] == b"2" * 800
    assert seen[b"/two"].kind == Kind.FILE
    assert (b"/replaced" in seen) == (how == "exchanged names")


@ENDINGS
@pytest.mark.parametrize("length", [2, 3])
def test_directories_that_lie_in_themselves(ending: str, length: int) -> None:
    craft = clean()
    ring = [inode_of(20 + number, 0) for number in range(length)]
    for number, inode in enumerate(ring):
        craft.directory(inode, ROOT, b"r%d" % number)
    craft.file(H, ring[0], b"inside", b"inside")
    for inode, above in pairwise([*ring, ring[0]]):
        craft.rename(inode, above, b"r")
    disk = craft.finish(ending)
    assert found_before(disk) == ["1 directories that lie in themselves"]
    done, seen = repaired(disk)
    assert done == [f"inode {ring[0]}, r: it lay in itself; it is lost+found/r now"]
    assert b"inside" in data(seen).values()
    assert sum(path.endswith(b"/inside") for path in seen) == 1


@ENDINGS
def test_a_link_whose_target_is_gone(ending: str) -> None:
    craft = clean()
    craft.delete(F)  # as if that did not know of the link
    disk = craft.finish(ending)
    done, seen = repaired(disk)
    assert done == [f"inode {G}, link, a further name of what is gone: removed"]
    assert data(seen) == {b"/d/one": b"1" * 900}


@ENDINGS
def test_a_link_to_a_directory_or_to_a_link(ending: str) -> None:
    craft = clean()
    craft.link(H, ROOT, b"directory", D)
    craft.link(inode_of(9, 0), ROOT, b"link", G)
    disk = craft.finish(ending)
    done, seen = repaired(disk)
    assert sorted(line.split(",")[1] for line in done) == [" directory", " link"]
    assert data(seen) == {b"/d/one": b"1" * 900, b"/two": b"2" * 800, b"/d/link": b"2" * 800}


@ENDINGS
def test_an_image_without_any_name(ending: str) -> None:
    craft = clean()
    craft.delete(E, FLAG_BARE)  # though no link names it
    disk = craft.finish(ending)
    assert found_before(disk) in ([], ["1 entries without a name, or without a directory"])
    done, seen = repaired(disk)
    assert done == [f"inode {E}: it had no name left; it is lost+found/#{E} now"]
    assert data(seen)[b"/lost+found/#%d" % E] == b"1" * 900


@ENDINGS
def test_nothing_in_lost_and_found_is_clobbered(ending: str) -> None:
    craft = clean()
    place = inode_of(30, 0)
    craft.directory(place, ROOT, b"lost+found")
    craft.file(inode_of(31, 0), place, b"again", b"was there")
    craft.file(inode_of(32, 0), place, b"#%d" % H, b"was there, too")
    for inode, text in ((H, b"first"), (inode_of(6, 0), b"second")):
        craft.file(inode, F, b"again", text)
    disk = craft.finish(ending)
    _, seen = repaired(disk)
    here = sorted(each for path, each in data(seen).items() if path.startswith(b"/lost+found/"))
    assert here == [b"first", b"second", b"was there", b"was there, too"]
    assert data(seen)[b"/lost+found/again"] == b"was there"


def test_lost_and_found_is_a_file() -> None:
    craft = clean()
    craft.file(inode_of(30, 0), ROOT, b"lost+found", b"a file")
    craft.delete(E, FLAG_BARE)
    _, seen = repaired(craft.finish("checkpointed"))
    assert data(seen)[b"/lost+found"] == b"a file"
    assert data(seen)[b"/lost+found.1/#%d" % E] == b"1" * 900


# -- used twice ----------------------------------------------------------------------------------------------------


@ENDINGS
def test_two_entries_with_the_same_name(ending: str) -> None:
    craft = clean()
    craft.file(H, ROOT, b"two", b"later")
    disk = craft.finish(ending)
    assert found_before(disk) == ["1 entries whose name another has too"]
    done, seen = repaired(disk)
    assert done == [f"inode {F}, two: another has its name; it is lost+found/two now"]
    assert data(seen)[b"/two"] == b"later"
    assert data(seen)[b"/lost+found/two"] == data(seen)[b"/d/link"] == b"2" * 800


@ENDINGS
@pytest.mark.parametrize("later", [Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.LINK])
@pytest.mark.parametrize("generation", [0, 1])
def test_a_slot_that_two_needles_put(ending: str, later: Kind, generation: int) -> None:
    craft = clean()
    craft.file(H, D, b"first", b"first")
    again = H | generation << 32
    extras: dict[int, bytes] = {Tag.TARGET: E.to_bytes(8, "little")} if later == Kind.LINK else {}
    target = b"d/one" if later == Kind.SYMLINK else b"later" if later == Kind.FILE else b""
    craft.add(Needle(later, again, ROOT, b"later", mode=0o700, extras=extras), target)
    disk = craft.finish(ending)
    if (ending, later, generation) == ("replayed", Kind.DIRECTORY, 0):
        assert "cannot be both a directory and none" in found_before(disk)[-1]
    else:
        assert found_before(disk) == ["1 images whose slot was used again while they were there"]
    done, seen = repaired(disk)
    assert len(done) == 1
    assert done[0].endswith(f"is in its slot, as inode {again}, later; copied to lost+found/first")
    node = seen[b"/lost+found/first"]
    assert (node.data, node.mode, node.uid, node.gid) == (b"first", 0o640, 3, 4)
    assert b"/d/first" not in seen
    assert seen[b"/later"].inode == (E if later == Kind.LINK else again)


@ENDINGS
def test_a_directory_whose_slot_an_image_took(ending: str) -> None:
    craft = clean()
    craft.file(D, ROOT, b"image", b"image")
    disk = craft.finish(ending)
    _, seen = repaired(disk)
    assert data(seen)[b"/image"] == b"image"
    here = {path: each for path, each in data(seen).items() if path.startswith(b"/lost+found")}
    assert sorted(here.values()) == [b"1" * 900, b"2" * 800]


@ENDINGS
def test_what_was_renamed_overwritten_or_deleted_was_not_put_twice(ending: str) -> None:
    """Nor is it told of what lost needles, whose numbers are missing, would explain."""
    craft = clean()
    craft.rename(E, ROOT, b"renamed")
    craft.file(E, ROOT, b"renamed", b"again")
    craft.delete(F, FLAG_BARE)
    craft.file(F, 0, b"", b"without a name of its own")
    craft.file(H, ROOT, b"goes", b"")
    craft.delete(H)
    craft.file(H, ROOT, b"comes", b"the same number after 256 generations")
    craft.sequence += 1
    craft.file(H, ROOT, b"was renamed", b"by a needle that is lost")
    craft.sequence += 1
    craft.file(H | 1 << 32, ROOT, b"new", b"the other was deleted")
    disk = craft.finish(ending)
    assert found_before(disk) == []
    done, seen = repaired(disk)
    assert done == []
    assert b"/lost+found" not in seen


def test_what_was_rescued_can_be_deleted() -> None:
    """... and does not come back with the next repair."""
    craft = clean()
    craft.file(H, D, b"first", b"first")
    craft.file(H, ROOT, b"later", b"later")
    disk = craft.finish("checkpointed")
    repaired(disk)
    with Store.open(PATH, disk=disk, settings=SETTINGS) as store:
        store.unlink(store.resolve(b"lost+found"), b"first")
    done, seen = repaired(disk)
    assert done == []
    assert b"first" not in data(seen).values()


def test_a_first_one_that_is_damaged_is_not_copied() -> None:
    craft = clean()
    offset = craft.file(H, D, b"first", b"first")
    craft.file(H, ROOT, b"later", b"later")
    disk = craft.finish("checkpointed")
    disk.flip(craft.path, offset + 96 + 6)
    done, seen = repaired(disk, damaged=1)
    assert done == []
    assert b"/lost+found" not in seen
