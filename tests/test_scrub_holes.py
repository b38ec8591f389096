"""A scrub of a store whose deleted images gave their blocks back: holes are no damage, and hide none."""

import random
from pathlib import Path

from store_parts import SETTINGS, flip, parts_of, put

from imgfs.scrub import Scrub
from imgfs.store import ROOT, Store, make_store
from imgfs.survey import Damage


def test_holes_are_no_damage_and_hide_none(tmp_path: Path) -> None:
    path, chance = tmp_path / "store", random.Random(4)
    make_store(str(path), SETTINGS, uid=0, gid=0)
    with Store.open(str(path), settings=SETTINGS) as store:
        for number in range(60):
            put(store, ROOT, b"%d" % number, chance.randbytes(chance.choice([10, 3000, 20_000])))
            if number % 3:
                store.unlink(ROOT, b"%d" % (number - 1))
    live = [part for part in parts_of(path) if part.inode]
    with Store.open(str(path), settings=SETTINGS) as store:
        assert store.reclaimer().punch(everything=True).hole_bytes > 100_000
    assert list(map(str, found(path))) == []
    for part in chance.sample(live, 25):
        at = chance.randrange(part.start, part.end)
        flip(path / part.file, at)
        assert {item.inode for item in found(path)} == {part.inode}, part
        flip(path / part.file, at)
    assert found(path) == []


def found(path: Path) -> list[Damage]:
    return [step for step in Scrub(str(path)).run() if isinstance(step, Damage)]
