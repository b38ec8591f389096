"""Linear hashing in shared memory: against a dict, and listings whose positions stay valid whatever comes and goes."""

import struct
from collections.abc import Callable, Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tables import free_regions

from imgfs.buckets import Buckets, bucket_count, bucket_of, record_at, region_class, reversed_hash
from imgfs.errors import Damaged
from imgfs.layout import AT_CHILDREN, AT_HASH, Word
from imgfs.memory import Memory

DIRECTORIES = (0, 1)
FIRST_SLOT = 2
# Few values, so that some collide; small ones and multiples of powers of two share buckets for long.
HASHES = st.one_of(st.integers(0, 40), st.integers(0, 23).map(lambda bit: 1 << bit), st.integers(0, (1 << 24) - 1))


def new_buckets() -> tuple[Memory, Buckets]:
    memory = Memory()
    return memory, Buckets(memory)


def set_hash(memory: Memory, slot: int, value: int) -> None:
    struct.pack_into("<I", memory.map, record_at(slot) + AT_HASH, value | 0x5A << 24)


def listing(buckets: Buckets, directory: int) -> list[tuple[int, int]]:
    rows: list[tuple[int, int]] = []
    while found := buckets.after(directory, rows[-1][0] if rows else 0):
        rows += found
    return rows


def regions(memory: Memory, buckets: Buckets) -> list[tuple[int, int]]:
    """Return (unit, length) of all bucket regions, used and free, sorted."""
    found = []
    for directory in DIRECTORIES:
        count = bucket_count(buckets.children(directory))
        if count > 1:
            at = record_at(directory) + AT_CHILDREN - 4
            found.append((struct.unpack_from("<I", memory.map, at)[0], 1 << region_class(count)))
    for size_class in range(8):
        found += [(unit, 1 << size_class) for unit in free_regions(memory, size_class)]
    return sorted(found)


# -- the arithmetic -----------------------------------------------------------------------------------------------


@given(st.integers(0, (1 << 24) - 1))
def test_a_hash_is_reversed_bit_by_bit(value: int) -> None:
    assert reversed_hash(value) == int(f"{value:024b}"[::-1], 2)
    assert reversed_hash(reversed_hash(value)) == value


@given(st.integers(0, (1 << 24) - 1), st.integers(1, 1 << 20))
def test_one_bucket_more_moves_entries_only_into_the_new_one(value: int, buckets: int) -> None:
    before, after = bucket_of(value, buckets), bucket_of(value, buckets + 1)
    assert 0 <= before < buckets
    assert after in (before, buckets)


def test_a_bucket_holds_about_four_records_and_a_region_fits_its_buckets() -> None:
    assert [bucket_count(children) for children in (0, 7, 8, 11, 12, 400)] == [1, 1, 2, 2, 3, 100]
    for children in range(1, 5000):
        buckets = bucket_count(children)
        assert bucket_count(children + 1) - buckets in (0, 1)
        assert buckets == 1 or buckets * 4 <= children < buckets * 4 + 4
        assert buckets <= 4 << region_class(buckets) < 2 * max(buckets, 4)


# -- against a dict -----------------------------------------------------------------------------------------------


class AgainstADict(RuleBasedStateMachine):
    """Two directories whose children come and go one at a time; each holds what a dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.buckets = new_buckets()
        self.children: dict[int, dict[int, int]] = {directory: {} for directory in DIRECTORIES}  # slot -> hash
        self.free: list[int] = []
        self.next = FIRST_SLOT

    def teardown(self) -> None:
        self.memory.close()

    @rule(directory=st.sampled_from(DIRECTORIES), values=st.lists(HASHES, min_size=1, max_size=30))
    def add(self, directory: int, values: list[int]) -> None:
        for value in values:
            slot = self.free.pop() if self.free else self.next
            self.next = max(self.next, slot + 1)
            set_hash(self.memory, slot, value)
            with self.memory.change():
                self.buckets.add(directory, slot)
            self.children[directory][slot] = value

    @precondition(lambda self: any(self.children.values()))
    @rule(data=st.data(), count=st.integers(1, 40))
    def remove(self, data: st.DataObject, count: int) -> None:
        directory = data.draw(st.sampled_from([key for key in DIRECTORIES if self.children[key]]))
        random = data.draw(st.randoms(use_true_random=False))
        slots = sorted(self.children[directory])
        for slot in random.sample(slots, min(count, len(slots))):
            with self.memory.change():
                self.buckets.remove(directory, slot)
            del self.children[directory][slot]
            self.free.append(slot)

    @precondition(lambda self: any(self.children.values()))
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        directory = data.draw(st.sampled_from([key for key in DIRECTORIES if self.children[key]]))
        with pytest.raises(ValueError, match="undone"), self.memory.change():
            for slot in sorted(self.children[directory])[:12]:
                self.buckets.remove(directory, slot)
            set_hash(self.memory, self.next, 3)
            self.buckets.add(1 - directory, self.next)
            raise ValueError("undone")

    @invariant()
    def listed_in_order_and_found(self) -> None:
        for directory, children in self.children.items():
            assert self.buckets.children(directory) == len(children)
            expected = sorted((reversed_hash(value) << 32 | slot + 1, slot) for slot, value in children.items())
            assert listing(self.buckets, directory) == expected
            for value in {*children.values(), 5}:
                same = sorted(slot for slot, other in children.items() if other == value)
                assert sorted(self.buckets.find(directory, value)) == same

    @invariant()
    def no_region_is_lost(self) -> None:
        end = 0
        for unit, size in regions(self.memory, self.buckets):
            assert unit == end
            end += size
        assert end == self.memory.words[Word.ARENA_END]


AgainstADict.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAgainstADict = AgainstADict.TestCase


# -- listings while entries come and go ---------------------------------------------------------------------------


def pages(buckets: Buckets, directory: int) -> Iterator[list[int]]:
    """Yield the slots of a listing, as it is read: page by page, each from the last position."""
    position = 0
    while found := buckets.after(directory, position):
        yield [slot for _, slot in found]
        position = found[-1][0]


@settings(max_examples=150, deadline=None)
@given(
    stay=st.lists(HASHES, max_size=60),
    guests=st.lists(HASHES, max_size=60),
    random=st.randoms(use_true_random=False),
)
def test_what_stays_is_listed_once_whatever_comes_and_goes(stay: list[int], guests: list[int], random: Random) -> None:
    memory, buckets = new_buckets()
    slots = list(range(FIRST_SLOT, FIRST_SLOT + len(stay) + len(guests)))
    for slot, value in zip(slots, stay + guests, strict=True):
        set_hash(memory, slot, value)
    staying, outside = slots[: len(stay)], slots[len(stay) :]
    inside: list[int] = []
    with memory.change():
        for slot in staying:
            buckets.add(0, slot)
    seen: list[int] = []
    for page in pages(buckets, 0):
        seen += page
        for _ in range(random.randint(0, 25)):
            source, target = (outside, inside) if random.random() < 0.5 else (inside, outside)
            if source:
                slot = source.pop(random.randrange(len(source)))
                with memory.change():
                    (buckets.add if target is inside else buckets.remove)(0, slot)
                target.append(slot)
    assert sorted(slot for slot in seen if slot in staying) == staying
    assert all(seen.count(slot) <= 1 for slot in slots)
    memory.close()


def test_a_listing_survives_growth_and_shrinking_by_a_thousand() -> None:
    memory, buckets = new_buckets()
    for slot in range(FIRST_SLOT, 1100):
        set_hash(memory, slot, slot * 0x9E3779B1 & 0xFFFFFF)
    staying, guests = range(FIRST_SLOT, 52), range(52, 1100)

    def move(change: Callable[[int, int], None], slots: range) -> None:
        for slot in slots:
            with memory.change():
                change(0, slot)

    move(buckets.add, staying)
    seen: list[int] = []
    for number, page in enumerate(pages(buckets, 0)):
        seen += page
        if number in (3, 9):
            move(buckets.add, guests)
        if number in (6, 40):
            move(buckets.remove, guests)
    assert sorted(set(seen) & set(staying)) == list(staying)
    assert len(seen) == len(set(seen))
    memory.close()


def test_what_is_not_there_cannot_be_removed() -> None:
    memory, buckets = new_buckets()
    set_hash(memory, 5, 1)
    with pytest.raises(Damaged, match="slot 5 is not in the directory in slot 0"), memory.change():
        buckets.remove(0, 5)
    assert memory.words[Word.COUNTER] % 2 == 0
    memory.close()


def test_a_ring_is_an_error_and_no_endless_loop() -> None:
    memory, buckets = new_buckets()
    set_hash(memory, 5, 1)
    with memory.change():
        buckets.add(0, 5)
        buckets.add(0, 5)
    with pytest.raises(AssertionError, match="form a ring"):
        buckets.find(0, 2)
    memory.close()


@given(st.lists(HASHES, max_size=60), st.lists(HASHES, min_size=1, max_size=200), st.lists(HASHES, max_size=20))
def test_many_at_once_are_as_each_alone(there: list[int], new: list[int], asked: list[int]) -> None:
    listings = []
    for together in (False, True):
        memory, buckets = new_buckets()
        for slot, value in enumerate(there + new, FIRST_SLOT):
            set_hash(memory, slot, value)
        with memory.change():
            for slot in range(FIRST_SLOT, FIRST_SLOT + len(there)):
                buckets.add(0, slot)
        first = FIRST_SLOT + len(there)
        with memory.change():
            if together:
                buckets.extend(0, first, new)
            else:
                for slot in range(first, first + len(new)):
                    buckets.add(0, slot)
        listings.append(listing(buckets, 0))
        known = [place for place, value in enumerate(asked) if buckets.find(0, value)]
        assert buckets.first_known(0, asked) == (known[0] if known else len(asked))
        memory.close()
    assert listings[0] == listings[1]
    assert len(listings[0]) == len(there) + len(new)
