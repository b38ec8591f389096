"""A writer is killed between any two stores into the table, or in the middle of one; nobody ever sees half a change."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from mortal import DEADLINE_S, Killed, Life, in_process, mortal, status_of
from tables import Dump, Writer, attached, dump, new_table, raw

from imgfs.format import NEEDLES_START, Kind, Needle, seconds, slot_of
from imgfs.layout import Flag, Word
from imgfs.records import Record, VolumeEntry
from imgfs.table import Table

# -- the changes --------------------------------------------------------------------------------------------------


class Scene:
    """A table in some state, and the change that the writer dies in."""

    def __init__(self) -> None:
        self.writer = Writer(new_table())
        self.writer.root()
        with self.writer.table.memory.change():
            self.writer.table.add_volume(VolumeEntry(1, NEEDLES_START, 1, 0))

    def fill(self, directory: int, count: int) -> list[int]:
        return [self.writer.make(directory, b"%d" % number) for number in range(count)]

    def directory(self, name: bytes, count: int = 0) -> int:
        directory = self.writer.make(1, name, Kind.DIRECTORY)
        self.fill(directory, count)
        return directory


Change = Callable[[Writer], object]


def create(scene: Scene) -> Change:
    scene.fill(1, 3)
    return lambda writer: writer.make(1, b"new", size=10)


def create_in_a_freed_slot(scene: Scene) -> Change:
    images = scene.fill(1, 5)
    for inode in images[1:4]:
        scene.writer.delete(inode)
    return lambda writer: writer.make(1, b"new", size=10)


def create_in_the_last_freed_slot(scene: Scene) -> Change:
    scene.writer.delete(scene.fill(1, 2)[0])
    return lambda writer: writer.make(1, b"new", size=10)


def pass_over_a_slot_in_use(scene: Scene) -> Change:
    images = scene.fill(1, 4)
    for inode in images[:3]:
        scene.writer.delete(inode)
    used = slot_of(images[0])

    def change(writer: Writer) -> None:
        with writer.table.memory.lock():
            assert writer.table.next_slot(0, lambda slot: slot == used)[0] == slot_of(images[1])

    return change


def unborn(writer: Writer) -> None:
    slot = slot_of(writer.new_inode())
    value = writer.table.hash(b"unborn")
    record = Record(Kind.FILE | Flag.UNBORN | Flag.STAGED, 0, 0, 1, 0, 0, 0, 1, seconds(1), 0, value)
    with writer.table.memory.lock(), writer.table.memory.change():
        writer.table.add_unborn(slot, record, writer.now_ns)


def create_unborn(scene: Scene) -> Change:
    scene.fill(1, 7)
    return unborn


def first_needle_of_an_unborn(scene: Scene) -> Change:
    unborn(scene.writer)
    return lambda writer: writer.put(2, 1, b"unborn", size=5)


def delete_unborn(scene: Scene) -> Change:
    unborn(scene.writer)

    def change(writer: Writer) -> None:
        with writer.table.memory.lock(), writer.table.memory.change():
            writer.table.delete_unborn(1, writer.now_ns)

    return change


def overwrite(scene: Scene) -> Change:
    inode = scene.fill(1, 3)[1]
    return lambda writer: writer.put(inode, 1, b"1", size=77)


def overwrite_under_another_name(scene: Scene) -> Change:
    inode, directory = scene.fill(1, 3)[1], scene.directory(b"d", 3)
    return lambda writer: writer.put(inode, directory, b"other", size=77)


def delete(scene: Scene) -> Change:
    inode = scene.fill(1, 4)[2]
    return lambda writer: writer.delete(inode)


def rename(scene: Scene) -> Change:
    inode = scene.fill(1, 4)[2]
    return lambda writer: writer.rename(inode, 1, b"new")


def rename_across(scene: Scene) -> Change:
    inode, directory = scene.fill(1, 4)[2], scene.directory(b"d", 2)
    return lambda writer: writer.rename(inode, directory, b"new")


def rename_across_a_merge_and_a_split(scene: Scene) -> Change:
    inode, directory = scene.fill(1, 11)[3], scene.directory(b"d", 11)
    return lambda writer: writer.rename(inode, directory, b"new")


def rename_into_the_region_just_freed(scene: Scene) -> Change:
    one, other = scene.directory(b"one"), scene.directory(b"other", 19)
    inode = scene.fill(one, 20)[3]
    return lambda writer: writer.rename(inode, other, b"new")


def rename_past_the_region_just_freed(scene: Scene) -> Change:
    for inode in scene.fill(scene.directory(b"once"), 20):
        scene.writer.delete(inode)
    return rename_into_the_region_just_freed(scene)


def rename_over(scene: Scene) -> Change:
    images = scene.fill(1, 5)
    return lambda writer: writer.rename(images[0], 1, b"3", images[3])


def rename_over_across(scene: Scene) -> Change:
    inode, directory = scene.fill(1, 8)[0], scene.directory(b"d")
    target = scene.fill(directory, 8)[3]
    return lambda writer: writer.rename(inode, directory, b"3", target)


def rename_directory(scene: Scene) -> Change:
    one, other = scene.directory(b"one", 9), scene.directory(b"other", 2)
    return lambda writer: writer.rename(one, other, b"below")


def rename_directory_over(scene: Scene) -> Change:
    one, other = scene.directory(b"one", 9), scene.directory(b"other")
    return lambda writer: writer.rename(one, 1, b"other", other)


def rename_out_of_the_directory_above(scene: Scene) -> Change:
    above = scene.directory(b"above")
    below = scene.writer.make(above, b"below", Kind.DIRECTORY)
    return lambda writer: writer.rename(below, 1, b"beside")


def mkdir(scene: Scene) -> Change:
    scene.fill(1, 2)
    return lambda writer: writer.make(1, b"new", Kind.DIRECTORY)


def rmdir(scene: Scene) -> Change:
    directory = scene.directory(b"d", 1)
    scene.writer.delete(3)
    assert not scene.writer.table.buckets.children(slot_of(directory))
    return lambda writer: writer.delete(directory)


def symlink(scene: Scene) -> Change:
    return lambda writer: writer.make(1, b"link", Kind.SYMLINK)


def set_attributes(scene: Scene) -> Change:
    directory = scene.directory(b"d", 1)
    return lambda writer: writer.set_attributes(directory, 3, 99)


def define_owner(scene: Scene) -> Change:
    return lambda writer: writer.append(Needle(Kind.OWNER, 0, uid=1, gid=2, mode=0o644, owner=0))


def add_volume(scene: Scene) -> Change:
    def change(writer: Writer) -> None:
        memory = writer.table.memory
        with memory.lock(), memory.change():
            entry = writer.table.add_volume(VolumeEntry(2, NEEDLES_START, 5, 0))
            writer.table.set_volume(0, VolumeEntry(1, 9999, 1, 1))
            memory.put_word(Word.ACTIVE, entry)

    return change


def growing(count: int) -> Callable[[Scene], Change]:
    """Return the scene in which a directory of *count* children gets one more."""

    def scene_of(scene: Scene) -> Change:
        directory = scene.directory(b"d", count)
        return lambda writer: writer.make(directory, b"new")

    return scene_of


def shrinking(count: int) -> Callable[[Scene], Change]:
    """Return the scene in which a directory of *count* children, which had more, loses one."""

    def scene_of(scene: Scene) -> Change:
        directory = scene.directory(b"d")
        images = scene.fill(directory, count + 12)
        for inode in images[count:]:
            scene.writer.delete(inode)
        return lambda writer: writer.delete(images[0])

    return scene_of


def growing_into_a_freed_region(scene: Scene) -> Change:
    directory = scene.directory(b"one")
    for inode in scene.fill(directory, 20):
        scene.writer.delete(inode)
    other = scene.directory(b"other", 19)
    return lambda writer: writer.make(other, b"new")


CHANGES: dict[str, Callable[[Scene], Change]] = {
    scene.__name__: scene
    for scene in (
        create,
        create_in_a_freed_slot,
        create_in_the_last_freed_slot,
        pass_over_a_slot_in_use,
        create_unborn,
        first_needle_of_an_unborn,
        delete_unborn,
        overwrite,
        overwrite_under_another_name,
        delete,
        rename,
        rename_across,
        rename_across_a_merge_and_a_split,
        rename_into_the_region_just_freed,
        rename_past_the_region_just_freed,
        rename_over,
        rename_over_across,
        rename_directory,
        rename_directory_over,
        rename_out_of_the_directory_above,
        mkdir,
        rmdir,
        symlink,
        set_attributes,
        define_owner,
        add_volume,
        growing_into_a_freed_region,
    )
}
# Two buckets from 8 children on, a region twice as large from 20, 36 and 68 on.
CHANGES |= {f"growing from {count}": growing(count) for count in (7, 11, 19, 35, 67)}
CHANGES |= {f"shrinking from {count}": shrinking(count) for count in (8, 12, 20, 36, 68)}


def steps_of(change: Change, writer: Writer) -> list[Dump]:
    """Return what *change* makes of the table of *writer*, after each step that readers may see."""
    seen = [dump(writer.table)]
    memory = writer.table.memory
    leave = memory.change

    @contextmanager
    def observed() -> Iterator[None]:
        with leave():
            yield
        seen.append(dump(writer.table))

    memory.change = observed  # type: ignore[method-assign]
    change(writer)
    del memory.change  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("torn", [False, True], ids=["between stores", "within a store"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_killed_writer_leaves_all_or_nothing(name: str, torn: bool) -> None:
    scenes = Scene(), Scene()
    change, same_change = (CHANGES[name](scene) for scene in scenes)
    allowed = steps_of(same_change, scenes[1].writer)
    assert len(set(map(repr, allowed))) > 1, "the change changes something"
    table = scenes[0].writer.table
    before = dump(table)
    assert before == allowed[0]
    before_raw = raw(table)
    last = 0
    while True:
        life = Life(last, torn=torn)
        with mortal(table, life) as dying:
            try:
                change(scenes[0].writer.on(dying))
            except Killed:
                pass
            else:
                assert dump(table) == allowed[-1]
                break
        # The survivor neither has nor needs anything of the dead process but the descriptor of the memory.
        survivor = attached(table)
        with survivor.memory.lock():
            assert survivor.memory.words[Word.COUNTER] % 2 == 0
            found = dump(survivor)
        survivor.memory.close()
        if found != before:
            assert found in allowed, f"killed at store {last}"
            break  # it died past the commit point
        assert raw(table) == before_raw, f"killed at store {last}"
        last += 1
    assert last > 5
    for scene in scenes:
        scene.writer.table.memory.close()


def stores_of(name: str) -> int:
    """Return how many stores that change takes."""
    scene = Scene()
    change, life = CHANGES[name](scene), Life(None, torn=False)
    with mortal(scene.writer.table, life) as table:
        change(scene.writer.on(table))
    return life.stores


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("name", ["rename_across_a_merge_and_a_split", "growing from 19", "rename_directory_over"])
def test_who_undoes_may_be_killed_too(name: str, torn: bool) -> None:
    scene = Scene()
    change = CHANGES[name](scene)
    table = scene.writer.table
    before = dump(table)
    stores = stores_of(name)
    with mortal(table, Life(stores - 1, torn=torn)) as dying, pytest.raises(Killed):
        change(scene.writer.on(dying))
    for last in range(stores):
        with mortal(table, Life(last, torn=torn)) as undoing:
            try:
                with undoing.memory.lock():
                    break
            except Killed:
                assert table.memory.words[Word.COUNTER] % 2
    assert last > 5
    assert dump(table) == before
    table.memory.close()


# -- real processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_reader", [False, True], ids=["the next writer undoes it", "a reader undoes it"])
@pytest.mark.parametrize("name", ["rename_over_across", "growing from 35", "shrinking from 36", "mkdir"])
def test_a_process_is_killed_with_the_lock_in_its_hand(name: str, by_reader: bool) -> None:
    scene = Scene()
    change = CHANGES[name](scene)
    table = scene.writer.table
    before = dump(table)
    stores = stores_of(name)
    for last in (2, stores // 2, stores - 1):

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def run(last: int = last) -> None:
            with mortal(table, Life(last, torn=True, end=die)) as dying:
                change(scene.writer.on(dying))

        status = status_of(in_process(run))
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        survivor = attached(table)
        assert survivor.memory.words[Word.COUNTER] % 2, "it died within the change"
        if by_reader:
            assert survivor.memory.consistent(partial(survivor.buckets.children, 0)) == len(before.listings[0])
        else:
            with survivor.memory.lock():
                pass
        assert dump(survivor) == before
        survivor.memory.close()
    change(scene.writer)
    assert dump(table) != before
    table.memory.close()


def test_readers_in_another_process_never_see_half_a_change() -> None:
    scene = Scene()
    one, other = scene.directory(b"one", 19), scene.directory(b"other", 19)
    guest = scene.writer.make(one, b"guest")
    places = [(slot_of(parent), slot_of(guest)) for parent in (one, other)]
    table = scene.writer.table
    rounds = 1500

    def write() -> None:
        writer = scene.writer.on(attached(table))
        for number in range(rounds):
            writer.rename(guest, (other, one)[number % 2], b"guest")  # splits one directory, merges the other
            time.sleep(0.001 * (number % 3 == 0))  # or a reader would have to read all the time again

    pid = in_process(write)
    reader = attached(table)

    def look() -> tuple[list[bool], list[int], int]:
        listings = [[slot for _, slot in everything(reader, parent)] for parent, _ in places]
        found = [child in reader.buckets.find(parent, reader.buckets.hash_of(child)) for parent, child in places]
        listed = [child in rows for (_, child), rows in zip(places, listings, strict=True)]
        assert found == listed
        record = reader.record(slot_of(guest))
        assert record.parent - 1 == places[found.index(True)][0]
        assert [reader.buckets.children(parent) for parent, _ in places] == list(map(len, listings))
        return found, list(map(len, listings)), record.parent

    seen = set()
    ended, status = 0, -1
    deadline = time.monotonic() + DEADLINE_S
    while not ended:
        assert time.monotonic() < deadline
        found, lengths, parent = reader.memory.consistent(look)
        assert (found, lengths) in (([True, False], [20, 19]), ([False, True], [19, 20]))
        seen.add(parent)
        ended, status = os.waitpid(pid, os.WNOHANG)
    assert status == 0
    assert len(seen) == 2, "the reader saw the writer at work"
    reader.memory.close()
    table.memory.close()


def test_a_single_record_is_never_a_mixture() -> None:
    scene = Scene()
    table = scene.writer.table
    slot = 6  # its record lies across two lines of the processor's cache
    states = [Record(*([value * 0x11] * 11)) for value in (1, 2)]
    with table.memory.change():
        table.store(slot, states[0])

    def write() -> None:
        writing = attached(table)
        for number in range(60_000):
            with writing.memory.change():
                writing.store(slot, states[number % 2])

    pid = in_process(write)
    reader = attached(table)
    ended, status = 0, -1
    deadline = time.monotonic() + DEADLINE_S
    while not ended:
        assert time.monotonic() < deadline
        assert {reader.whole_record(slot) for _ in range(1000)} <= set(states)
        ended, status = os.waitpid(pid, os.WNOHANG)
    assert status == 0
    reader.memory.close()
    table.memory.close()


def everything(table: Table, directory: int) -> list[tuple[int, int]]:
    """Return the entries of *directory*; a reader that a writer overtook may find them without end."""
    rows: list[tuple[int, int]] = []
    while found := table.buckets.after(directory, rows[-1][0] if rows else 0):
        rows += found
        if len(rows) > 100:
            raise IndexError("too many")
    return rows
