"""Owner numbers: those that no image has any more are given to other owners, whatever happens in between."""

import random
from collections.abc import Iterator

import pytest
from stores import abandon_all, killed, new_store, put, rebuilt, reopened

from imgfs.errors import StoreLimit
from imgfs.layout import Word
from imgfs.store import ROOT, Store

MOST = 12


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


@pytest.fixture(autouse=True)
def few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgfs.owners.OWNERS_MAX", MOST)


def give(store: Store, name: bytes, mode: int) -> None:
    """Put an image of that *mode*."""
    store.set_attr(put(store, ROOT, name), mode=mode)


def modes(store: Store) -> dict[bytes, int]:
    return {entry.name: store.attr(entry.inode).mode for entry in store.list(ROOT)}


@pytest.mark.parametrize("seed", range(4))
def test_a_number_stands_for_what_has_it_now(seed: int) -> None:
    pick = random.Random(seed)
    store = new_store()
    expected: dict[bytes, int] = {}
    for number in range(120):
        name = b"%d" % pick.randrange(4)
        mode = number % 0o1000
        if name in expected:
            store.unlink(ROOT, name)
        give(store, name, mode)
        expected[name] = mode
        if number % 10 == 0:
            reclaimer = store.reclaimer()
            for group in reclaimer.worthwhile(reclaimer.survey()):
                reclaimer.compact(group)
            store = pick.choice([killed, reopened, rebuilt])(store)
        assert modes(store) == expected
    assert store._memory.words[Word.OWNERS] <= MOST


def test_numbers_that_are_in_use_are_not_taken_away() -> None:
    store = new_store()
    given: dict[bytes, int] = {}
    with pytest.raises(StoreLimit, match="combinations"):
        for number in range(MOST + 1):
            give(store, b"%d" % number, number)
            given[b"%d" % number] = number
    assert len(given) > MOST // 2
    assert given.items() <= modes(store).items()
