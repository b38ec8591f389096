"""A store whose files are damaged, cut, or gone is repaired; and so is one whose repair was cut off itself."""

from random import Random

import pytest
from crafted import PATH, SETTINGS, VOLUMES, Crafted
from powercut import PowerCut, SimulatedDisk
from repairs import D, F, H, clean, data, found_before, repaired, yes
from survivors import NOTHING_UNSYNCED

from imgfs.format import Kind, Needle, inode_of
from imgfs.repair import Repair
from imgfs.store import ROOT, Store

# -- what lies behind the end --------------------------------------------------------------------------------------


def torn(tail: bytes, ending: str = "checkpointed") -> tuple[SimulatedDisk, str, int]:
    """Return a store with *tail* behind the end of its last volume, whose path and end come with it."""
    craft = clean()
    if ending == "loaded":
        craft.roll()
    disk = craft.finish("checkpointed")
    disk.set_content(craft.path, disk.content(craft.path) + tail)
    return disk, craft.path, craft.end


@pytest.mark.parametrize("ending", ["checkpointed", "loaded"])
def test_a_torn_tail_is_cut_away(ending: str) -> None:
    disk, path, end = torn(b"half a needle" * 10, ending)
    asked: list[str] = []
    repair = Repair(PATH, disk.after_kill(), SETTINGS, agree=lambda text: bool(asked.append(text)))
    with repair.run() as store:
        assert store.writable
    number = int(path[-12:-4])
    text = f"130 bytes behind the end of volume {number}, at {end:,}"
    assert (asked, repair.left, repair.done) == ([f"cut away {text}"], [f"cut away {text}"], [])
    done, seen = repaired(disk)
    assert done == [f"{text}: cut away"]
    assert len(disk.content(path)) == end
    assert len(data(seen)) == 3


def test_who_does_not_agree_keeps_the_tail() -> None:
    disk, path, end = torn(b"half a needle" * 10)
    done, _ = repaired(disk, lambda _: False)
    assert done == []
    assert len(disk.content(path)) == end + 130
    done, _ = repaired(disk)
    assert len(done) == 1


def test_zeros_are_cut_away_by_opening() -> None:
    """They are what a log has written ahead of itself."""
    disk, path, end = torn(bytes(5000))

    def refuse(text: str) -> bool:
        raise AssertionError(text)

    done, _ = repaired(disk, refuse)
    assert done == []
    assert len(disk.content(path)) == end


def test_zeros_behind_an_older_volume_are_cut_away_without_asking() -> None:
    disk, path, end = torn(b"half a needle")
    Store.open(PATH, disk=disk, settings=SETTINGS).close()
    disk.set_content(path, disk.content(path)[:end] + bytes(5000))

    def refuse(text: str) -> bool:
        raise AssertionError(text)

    done, _ = repaired(disk, refuse)
    assert done == [f"5,000 bytes behind the end of volume 1, at {end:,}: cut away"]
    assert len(disk.content(path)) == end


def test_whole_images_behind_a_torn_needle_are_kept() -> None:
    """Power loss took one needle of several; those behind it that nothing takes away are in lost+found."""
    craft = clean()
    craft.checkpoint(seal=False)
    end = craft.durable = craft.end
    made = []
    for number in range(5):
        needle = Needle(Kind.FILE, inode_of(40 + number, 0), ROOT, b"n%d" % number, mode=0o600)
        made.append(craft.add(needle, b"%d" % number * 700))
    craft.delete(inode_of(43, 0))
    craft.file(inode_of(44, 0), ROOT, b"n4", b"again")
    disk = craft.finish("replayed")
    content = bytearray(disk.content(craft.path))
    content[made[0] : made[0] + 512] = bytes(512)
    disk.set_content(craft.path, bytes(content))
    done, seen = repaired(disk)
    here = {path: each for path, each in data(seen).items() if path.startswith(b"/lost+found/")}
    assert here == {
        b"/lost+found/n1": b"1" * 700,
        b"/lost+found/n2": b"2" * 700,
        b"/lost+found/n4": b"again",
    }
    assert len([line for line in done if "it lies behind the end of its volume; copied" in line]) == 3
    assert done[-1].endswith(f"bytes behind the end of volume 1, at {end:,}: cut away")
    assert len(disk.content(craft.path)) == end


def test_bytes_behind_a_seal_are_cut_away() -> None:
    craft = clean()
    craft.roll()
    first = f"{VOLUMES}/00000001.vol"
    craft.file(H, ROOT, b"more", b"more")
    disk = craft.finish("checkpointed")
    disk.set_content(first, disk.content(first) + b"nobody's" * 20)
    assert len(found_before(disk)) == 1
    done, seen = repaired(disk)
    assert len(done) == 1
    assert done[0].startswith("160 bytes behind the end of volume 1")
    assert len(data(seen)) == 4


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("volume", [1, 2])
def test_a_damaged_copy_of_a_header_is_written_again(which: int, volume: int) -> None:
    disk = clean().finish("loaded")
    path = f"{VOLUMES}/0000000{volume}.vol"
    whole = disk.content(path)
    disk.set_content(path, whole[: 4096 * which] + bytes(4096) + whole[4096 * (which + 1) :])
    done, _ = repaired(disk)
    assert done == [
        f"volume {volume}: the {'second' if which else 'first'} copy of its header was damaged: written again"
    ]
    assert disk.content(path) == whole


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_everything_derived_is_made_anew(how: str) -> None:
    disk = clean().finish("loaded")
    names = ["imgfs.json", "volumes/00000001.idx", "volumes/00000001.names", "volumes/00000002.idx"]
    before = {name: disk.content(f"{PATH}/{name}") for name in names}
    for name in names:
        if how == "missing":
            disk.remove(f"{PATH}/{name}")
        else:
            disk.flip(f"{PATH}/{name}", 20)
    done, seen = repaired(disk)
    assert sorted(done) == [
        "00000001.idx was missing or wrong: made anew from its volume",
        "00000002.idx was missing or wrong: made anew from its volume",
        f"imgfs.json was {how}: written again from the header of a volume",
    ]
    assert len(data(seen)) == 3
    after = {name: disk.content(f"{PATH}/{name}") for name in names}
    assert all(after[name].startswith(content) for name, content in before.items())


def three_volumes() -> Crafted:
    """A store of three volumes; a directory of the first has an image in each."""
    craft = clean()
    for number in (2, 3):
        craft.roll()
        craft.file(inode_of(50 + number, 0), D, b"in %d" % number, b"%d" % number * 600)
    return craft


@pytest.mark.parametrize("number", [1, 2])
def test_a_volume_that_is_missing_is_told(number: int) -> None:
    disk = three_volumes().finish("checkpointed")
    for suffix in ("vol", "idx", "names"):
        disk.remove(f"{VOLUMES}/0000000{number}.{suffix}")
    first, last = (1, 6) if number == 1 else (7, 8)
    text = f"missing: no volume has the needles with numbers {first} to {last}; put its file back"
    assert found_before(disk) == [f"volume {number}, offset 0, 0 bytes: {text}"]
    done, seen = repaired(disk, damaged=1)
    assert b"3" * 600 in data(seen).values()
    if number == 1:
        assert "the top directory was lost: made again" in done
        assert set(data(seen)) == {b"/lost+found/#%d/in %d" % (D, each) for each in (2, 3)}


def test_a_volume_that_was_cut_short_is_told() -> None:
    """Its images up to there are there."""
    craft = three_volumes()
    disk = craft.finish("checkpointed")
    path = f"{VOLUMES}/00000001.vol"
    whole = disk.content(path)
    disk.set_content(path, whole[: len(whole) - 800])
    _, seen = repaired(disk, damaged=1)
    assert data(seen).items() >= {b"/d/one": b"1" * 900, b"/d/in 3": b"3" * 600}.items()


def test_zeroed_blocks_cost_what_they_held_and_nothing_else() -> None:
    """Image by image is damaged; what is whole is there, with the index and without."""
    for index in (True, False):
        craft = clean()
        offsets = [craft.file(inode_of(60 + n, 0), D, b"%d" % n, b"%d" % n * 2000) for n in range(6)]
        disk = craft.finish("loaded")
        path = f"{VOLUMES}/00000001.vol"
        content = bytearray(disk.content(path))
        start = offsets[2] // 512 * 512
        content[start : start + 512] = bytes(512)
        disk.set_content(path, bytes(content))
        if not index:
            for name in ("1.idx", "1.names"):
                disk.remove(f"{VOLUMES}/0000000{name}")
        _, seen = repaired(disk, damaged=2 if start < offsets[2] else 1)
        whole = {b"%d" % n * 2000 for n in range(6) if n not in (1, 2)}
        assert set(data(seen).values()) >= whole | {b"1" * 900, b"2" * 800}


# -- a repair that does not get to its end -------------------------------------------------------------------------


def everything_wrong() -> SimulatedDisk:
    """A store that has something of everything."""
    craft = clean()
    craft.file(H, D, b"first", b"first")
    craft.file(H, ROOT, b"later", b"later")
    craft.file(inode_of(6, 0), ROOT, b"two", b"twin")
    craft.file(inode_of(7, 0), F, b"orphan", b"orphan")
    craft.file(inode_of(8, 0), inode_of(90, 0), b"lost", b"of a lost directory")
    craft.roll()
    one, other = inode_of(10, 0), inode_of(12, 0)
    craft.directory(one, other, b"ring")
    craft.directory(other, one, b"ring")
    craft.file(inode_of(11, 0), one, b"inside", b"inside")
    disk = craft.finish("checkpointed")
    first = f"{VOLUMES}/00000001.vol"
    disk.set_content(first, disk.content(first)[:4096] + bytes(4096) + disk.content(first)[8192:])
    disk.set_content(craft.path, disk.content(craft.path) + b"torn bytes")
    disk.remove(f"{VOLUMES}/00000001.idx")
    return disk


CONTENTS = sorted(
    [b"1" * 900, b"2" * 800, b"2" * 800, b"first", b"later", b"twin", b"orphan", b"of a lost directory", b"inside"]
)


def test_a_store_that_has_something_of_everything() -> None:
    disk = everything_wrong()
    done, seen = repaired(disk)
    assert len(done) == 8
    assert sorted(data(seen).values()) == CONTENTS


@pytest.mark.parametrize("left", ["killed", "all unsynced lost", "some of it lost"])
def test_what_cuts_a_repair_off_is_finished_by_the_next(left: str) -> None:
    """Before each step, and within each write: nothing is lost, and nothing is there twice."""
    step = 0
    while True:
        disk = everything_wrong()
        disk.cut_at, disk.cut_written = step, 7
        try:
            with Repair(PATH, disk, SETTINGS, agree=yes).run():
                pass
        except PowerCut:
            pass
        else:
            break
        if left == "killed":
            disk = disk.after_kill()
        else:
            disk = disk.after_power_cut(Random(step) if left == "some of it lost" else NOTHING_UNSYNCED)
        _, seen = repaired(disk)
        assert sorted(data(seen).values()) == CONTENTS, f"{left} at step {step}"
        step += 1
    assert step > 30
