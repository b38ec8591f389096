"""A scrub finds any bit that is not what was written, says whose it is, and goes on where it was killed.

Here a store at rest; beside a daemon, and past the page cache, in test_scrub_online.py.
"""

import json
import os
import random
from pathlib import Path

import pytest
from command_line import Run
from store_parts import FailingDisk, Part, flip, parts_of, put

from imgfs.check import Checked
from imgfs.direct import BLOCK_BYTES, DirectDisk, RateLimit
from imgfs.errors import EXIT_DAMAGED, EXIT_REPAIRED, Busy, NoStore
from imgfs.scrub import Scrub
from imgfs.scrub_state import PROGRESS, read_state
from imgfs.store import ROOT, Store
from imgfs.survey import Damage

FLIPS = 40 * int(os.environ.get("IMGFS_SOAK", "1"))


def scrub(path: Path) -> list[Damage]:
    """Scrub the store at *path*, all of it, and return the damage."""
    return [step for step in Scrub(str(path)).run() if isinstance(step, Damage)]


def known(path: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((path / "damage.json").read_text())["damage"]
    return rows


def part_of(path: Path, kind: str, *, needed: bool = True) -> Part:
    """Return the largest part of that *kind*."""
    parts = [part for part in parts_of(path) if part.kind == kind and bool(part.inode) == needed]
    return max(parts, key=lambda part: part.end - part.start)


# -- any bit ----------------------------------------------------------------------------------------------------------


def test_a_clean_store_is_clean(small_store: Path) -> None:
    one = Scrub(str(small_store))
    steps = list(one.run())
    assert not [step for step in steps if isinstance(step, Damage)]
    assert one.result.damaged_places == 0
    assert isinstance(steps[-1], Checked)
    sizes = sum(path.stat().st_size for path in (small_store / "volumes").glob("*.vol"))
    # All but the last checkpoint, which no mark vouches for.
    assert sizes - 200 <= one.result.read_bytes + 8192 * len(list((small_store / "volumes").glob("*.vol"))) <= sizes
    assert not (small_store / "damage.json").exists()


def check_flip(store: Path, part: Part, offset: int, bit: int) -> None:
    """Flip a bit, and check that it is found, where it is, and that nobody else is said to be concerned."""
    where = f"bit {bit} of byte {offset} of {part}"
    flip(store / part.file, offset, bit)
    found = scrub(store)
    assert found, f"not found: {where}"
    assert {item.file for item in found} == {part.file}, f"{where}: {found}"
    assert {item.inode for item in found} == {part.inode}, f"{where}: {found}"
    (item,) = found
    if part.kind not in ("superblock", "volume header"):
        at = part.start if part.file.endswith((".idx", ".names")) else part.needle
        assert item.offset in (at, part.start), f"{where}: {item}"
    flip(store / part.file, offset, bit)


def test_every_kind_of_byte(small_store: Path) -> None:
    """One bit of each kind of part: found, in its place, and no other image is named."""
    chance = random.Random(1)
    parts = parts_of(small_store)
    kinds = {part.kind: part for part in chance.sample(parts, len(parts))}
    assert len(kinds) > 30
    for part in kinds.values():
        check_flip(small_store, part, chance.randrange(part.start, part.end), chance.randrange(8))


def test_any_bit(small_store: Path) -> None:
    """Bits anywhere, by the number of bytes."""
    seed = random.getrandbits(32)
    print("seed", seed)
    chance = random.Random(seed)
    parts = parts_of(small_store)
    small = [part for part in parts if part.end - part.start < 4096]
    for number in range(FLIPS):
        part = chance.choice(small if number % 2 else parts)
        check_flip(small_store, part, chance.randrange(part.start, part.end), chance.randrange(8))
    assert scrub(small_store) == []
    assert known(small_store) == []


def test_all_files_are_covered(small_store: Path) -> None:
    """What `parts_of` leaves out is what no durable mark vouches for: the last checkpoint, and its record."""
    left = {}
    for path in [small_store / "imgfs.json", *(small_store / "volumes").iterdir()]:
        parts = [part for part in parts_of(small_store) if small_store / part.file == path]
        covered = {byte for part in parts for byte in range(part.start, part.end)}
        left[path.name] = path.stat().st_size - len(covered)
    last = max(name for name in left if name.endswith(".vol"))
    assert {name for name, count in left.items() if count} == {last, last.replace(".vol", ".idx")}
    assert left[last] < 200
    assert left[last.replace(".vol", ".idx")] == 39


# -- what is damage, and what is not ----------------------------------------------------------------------------------


def zero(path: Path, start: int, end: int) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), bytes(end - start), start)


def test_zeros_are_damage_to_an_image_that_is_there_and_none_to_one_that_is_not(small_store: Path) -> None:
    """A block of zeros may have been freed; who still needs it knows better."""
    for needed in (True, False):
        part = part_of(small_store, "data of FILE", needed=needed)
        path = small_store / part.file
        before = path.read_bytes()
        first = -(-part.start // BLOCK_BYTES) * BLOCK_BYTES
        assert first + BLOCK_BYTES <= part.end
        # A freed needle keeps its header, or loses it too if it lies behind another one.
        for start in (first, part.needle):
            zero(path, start, part.end // BLOCK_BYTES * BLOCK_BYTES)
            if start == first:
                assert [item.inode for item in scrub(small_store)] == ([part.inode] if needed else [])
            elif needed:
                assert part.inode in {item.inode for item in scrub(small_store)}
        path.write_bytes(before)


def test_a_volume_that_was_cut_short(small_store: Path) -> None:
    volume = small_store / "volumes" / "00000002.vol"
    sealed = part_of(small_store, "header of CHECKPOINT", needed=False)
    last = max(part.needle for part in parts_of(small_store) if part.file == f"volumes/{volume.name}")
    assert sealed
    with open(volume, "r+b") as file:
        file.truncate(last)
    (item,) = scrub(small_store)
    assert (item.volume, item.offset, item.inode) == (2, last, 0)
    assert "it does not end with a seal" in item.text


def test_a_volume_without_a_header(small_store: Path) -> None:
    for start in (0, 4096):
        flip(small_store / "volumes" / "00000002.vol", start + 20)
    (item,) = [item for item in scrub(small_store) if item.suffix == ".vol"]
    assert (item.volume, item.offset, item.text) == (2, 0, "neither copy of the volume header is whole")


@pytest.mark.parametrize("name", ["imgfs.json", "volumes/00000002.idx", "volumes/00000002.names"])
def test_a_file_that_is_missing(name: str, small_store: Path) -> None:
    (small_store / name).unlink()
    (item,) = scrub(small_store)
    assert "is missing; it is made anew" in item.text
    with Store.open(str(small_store)):
        pass
    assert scrub(small_store) == []
    assert known(small_store) == []


def test_what_a_crash_leaves_is_no_damage(small_store: Path) -> None:
    """A torn needle at the end of the log, an index that lacks the last records: the next start sees to them."""
    child = os.fork()
    if child == 0:
        store = Store.open(str(small_store))
        for number in range(5):
            put(store, ROOT, b"synced %d" % number, b"s" * 100)
        store.sync()
        put(store, ROOT, b"a mark above them", b"s" * 100)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    last = max((small_store / "volumes").glob("*.vol"))
    with last.open("ab") as volume:
        volume.write(b"half a needle" * 10)
    index = last.with_suffix(".idx")
    os.truncate(index, index.stat().st_size - 39 * 2)
    data = index.read_bytes()
    index.write_bytes(data[:-39] + bytes(39))
    assert scrub(small_store) == []


def test_what_the_disk_cannot_read_costs_what_lies_there(small_store: Path) -> None:
    part = part_of(small_store, "data of FILE")
    block = (part.start + part.end) // 2 // BLOCK_BYTES * BLOCK_BYTES
    one = Scrub(str(small_store), direct=FailingDisk(part.file, {block}))
    (item,) = [step for step in one.run() if isinstance(step, Damage)]
    assert item.inode == part.inode
    assert item.text.endswith("; the disk cannot read it")
    assert scrub(small_store) == []


# -- the list of what is known ----------------------------------------------------------------------------------------


def test_the_list_keeps_damage_until_it_is_whole(small_store: Path) -> None:
    first, second = part_of(small_store, "data of FILE"), part_of(small_store, "name of FILE")
    for part in (first, second):
        flip(small_store / part.file, part.start)
    assert len(scrub(small_store)) == 2
    rows = {row["inode"]: row for row in known(small_store)}
    with Store.open(str(small_store), writable=False) as store:
        assert rows[first.inode]["path"] == os.fsdecode(store.path_of(first.inode))
    assert rows[first.inode]["file"] == first.file
    assert rows[first.inode]["offset"] == first.needle
    assert rows[first.inode]["first_seen_ns"] == rows[first.inode]["last_seen_ns"]

    flip(small_store / second.file, second.start)
    scrub(small_store)
    (row,) = known(small_store)
    assert row["first_seen_ns"] == rows[first.inode]["first_seen_ns"]
    assert row["last_seen_ns"] > rows[first.inode]["last_seen_ns"]  # type: ignore[operator]

    flip(small_store / first.file, first.start)
    scrub(small_store)
    assert known(small_store) == []


@pytest.mark.parametrize("how", ["deleted", "overwritten"])
def test_the_list_forgets_an_image_that_is_gone(how: str, small_store: Path, run: Run) -> None:
    part = part_of(small_store, "data of FILE")
    flip(small_store / part.file, part.start)
    scrub(small_store)
    assert "imgfs_damaged_images{" in (text := run("metrics", small_store).out)
    assert f'imgfs_damaged_images{{store="{small_store}"}} 1.0\n' in text
    with Store.open(str(small_store)) as store:
        (name,) = [entry.name for entry in store.list(ROOT) if entry.name == b"large"]
        if how == "deleted":
            store.unlink(ROOT, name)
            store.unlink(ROOT, b"large too")
        else:
            put(store, ROOT, name, b"a good copy")
    # At once for who asks for it; on the list with the next scrub, which also tells what is in the way of nobody.
    assert f'imgfs_damaged_images{{store="{small_store}"}} 0.0\n' in run("metrics", small_store).out
    assert [item.needed for item in scrub(small_store)] == [False]
    assert known(small_store) == []


def test_a_check_keeps_the_list_too(small_store: Path, run: Run) -> None:
    part = part_of(small_store, "data of FILE")
    flip(small_store / part.file, part.start)
    assert run("check", "-q", small_store).code == EXIT_DAMAGED
    assert [row["inode"] for row in known(small_store)] == [part.inode]
    flip(small_store / part.file, part.start)
    assert run("check", "-q", small_store).code == 0
    assert known(small_store) == []


def test_a_check_finds_what_a_scrub_finds(small_store: Path, run: Run) -> None:
    """Both are the same reading; of the index a check has made what is wrong anew before."""
    chance = random.Random(3)
    parts = parts_of(small_store)
    for part in {part.kind: part for part in chance.sample(parts, len(parts))}.values():
        place = chance.randrange(part.start, part.end)
        flip(small_store / part.file, place)
        expected = EXIT_DAMAGED if part.file.endswith(".vol") else EXIT_REPAIRED
        assert run("check", "-q", small_store).code == expected, part
        if expected == EXIT_DAMAGED:
            flip(small_store / part.file, place)
        assert run("check", "-q", small_store).code == 0, part


@pytest.mark.parametrize("name", [PROGRESS, "damage.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 9}', '{"format": 1, "damage": [{}], "now": {"a": 1}}'])
def test_a_damaged_list_begins_anew(name: str, content: str, small_store: Path) -> None:
    (small_store / name).write_text(content)
    part = part_of(small_store, "data of FILE")
    flip(small_store / part.file, part.start)
    assert len(scrub(small_store)) == 1
    assert len(known(small_store)) == 1


# -- going on ---------------------------------------------------------------------------------------------------------


def test_it_goes_on_wherever_it_was_killed(small_store: Path) -> None:
    """Every needle is read once, whatever was done between; what was found before is on the list."""
    damaged = [part_of(small_store, kind) for kind in ("data of FILE", "name of LINK", "header of SYMLINK")]
    for part in damaged:
        flip(small_store / part.file, part.start)
    reference = Scrub(str(small_store))
    places = {(step.file, step.offset) for step in reference.run() if isinstance(step, Damage)}
    whole, rows = reference.result, known(small_store)
    assert len(places) == 3
    # Saves whenever it may, which the clock of seconds would let it do now and then.
    seen: set[tuple[str, int]] = set()
    for _ in range(1000):
        ticks = iter(range(10**9))
        one = Scrub(str(small_store), clock=lambda ticks=ticks: 1000.0 * next(ticks))  # type: ignore[misc]
        steps = one.run()
        for count, step in enumerate(steps):
            if isinstance(step, Damage):
                seen.add((step.file, step.offset))
            if count == 6:
                break
        else:
            break
        steps.close()  # as a kill: nothing is written by this
    else:
        raise AssertionError("it never ends")
    assert seen == places
    result = one.result
    assert (result.read_bytes, result.needles, result.damaged_places) == (whole.read_bytes, whole.needles, 3)
    assert [row["inode"] for row in known(small_store)] == [row["inode"] for row in rows]
    assert read_state(str(small_store), one._disk).now is None


def test_the_volume_it_was_at_may_be_gone(small_store: Path) -> None:
    state = read_state(str(small_store), DirectDisk())
    assert state.now is None
    position = {"end": 9000, "records": 3, "records_crc": 0, "names_bytes": 20, "names_crc": 0}
    now = {"started_ns": 1, "finished_ns": 0, "read_bytes": 5, "needles": 2, "damaged_places": 0}
    content = {"format": 1, "now": now, "last": None, "volume": 999, "position": position}
    (small_store / PROGRESS).write_text(json.dumps(content))
    one = Scrub(str(small_store))
    assert list(one.run()) == []
    assert one.result.needles == 2


def test_one_scrub_at_a_time(small_store: Path, run: Run) -> None:
    first = Scrub(str(small_store)).run()
    next(first)
    with pytest.raises(Busy):
        next(Scrub(str(small_store)).run())
    first.close()
    assert scrub(small_store) == []


def test_there_must_be_a_store(tmp_path: Path) -> None:
    with pytest.raises(NoStore):
        list(Scrub(str(tmp_path)).run())


def test_the_rate_is_kept() -> None:
    now, slept = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(round(seconds, 6))
        now += seconds

    limit = RateLimit(1000, clock=lambda: now, sleep=sleep)
    for size in (500, 500, 2000):
        limit.take(size)
    assert slept == [0.5, 0.5, 2.0]
    now += 10
    limit.take(100)
    assert slept[-1] == 0.1, "what others took is not made up for"
    RateLimit(0, clock=lambda: now, sleep=lambda _: pytest.fail("no limit")).take(10**9)
