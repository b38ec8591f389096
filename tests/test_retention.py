"""What is kept for undelete: holes and compaction leave the past since the cutoff as it was, and all of its trash."""

from itertools import pairwise
from random import Random

import pytest
from crash_model import SETTINGS, STORE, Clock
from dated import Dated, history_of
from snapshots import Node, difference, snapshot
from test_trash import expected, facts
from workloads import random_operations

from imgfs.compact import Keep
from imgfs.errors import NotFound
from imgfs.format import Kind
from imgfs.needed import Needed
from imgfs.store import Store
from imgfs.trash import find


def punch(work: Dated, cutoff_s: int) -> None:
    holes = work.store.reclaimer().holes
    judge = Needed(work.store._table, work.store._handles.slots())
    for row in work.store._volumes.rows():
        records = holes.records(row)
        dead, died_s, _ = judge.dead(records, row)
        holes.punch(row, records, dead & (died_s < cutoff_s))


def compact(work: Dated, cutoff_s: int, chance: Random) -> None:
    compaction = work.store.reclaimer().compaction
    rows = work.store._volumes.rows(sealed=True)
    first = chance.randrange(len(rows))
    last = chance.randrange(first, len(rows)) + 1
    row = compaction.run(compaction.plan(rows[first:last], Keep((), cutoff_s)), 0)
    assert compaction.unfinished() == [row]
    assert compaction.remove(row, [])


def plain(tree: dict[bytes, Node]) -> dict[bytes, Node]:
    """Return *tree* without the times of directories, which a compacted volume tells as they were last written down."""
    return {
        path: node._replace(mtime_ns=0, ctime_ns=0) if node.kind == Kind.DIRECTORY else node
        for path, node in tree.items()
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("how", ["punch", "compact", "both"])
def test_the_past_since_the_cutoff_is_kept(seed: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work, chance = Dated(Clock(monkeypatch)), Random(seed)
    random_operations(work, Random(seed), 150)
    cut = chance.randrange(len(work.times))
    cutoff_s = work.times[cut] // 10**9
    if how != "compact":
        punch(work, cutoff_s)
    if how != "punch":
        compact(work, cutoff_s, chance)
    for time_ns, wanted in zip(work.times, work.history, strict=True):
        try:
            with Store.open(STORE, disk=work.disk, settings=SETTINGS, writable=False, as_of_ns=time_ns) as store:
                assert not store.report.damage
                seen = snapshot(store, damaged=True)
        except NotFound:
            assert time_ns // 10**9 < cutoff_s
            continue
        if time_ns // 10**9 >= cutoff_s:
            assert plain(seen) == plain(wanted), difference(plain(seen), plain(wanted))
    assert seen == work.history[-1]
    with history_of(work.disk) as history:
        found = {facts(history, gone) for gone in find(history, cutoff_s * 10**9) if gone.kind != Kind.DIRECTORY}
    for number, (before, after) in enumerate(pairwise(work.history[cut:]), cut + 1):
        left = {node.inode: node for node in after.values()}
        for node in before.values():
            now = left.get(node.inode)
            stays = now is not None and (now.data == node.data or not node.data)
            if node.kind != Kind.DIRECTORY and not stays and node.nlink == 1:
                assert expected(node, work.times[number]) in found
