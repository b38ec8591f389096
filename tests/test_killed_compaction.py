"""The maintenance process is killed at any step of giving space back; the others go on, and the next one finishes."""

import itertools
from collections.abc import Callable

import pytest
from compacted import assert_sound, assert_tidy, reclaim, rows_of
from killed_store import MortalDisk, killed_at, new_store, on_disk
from snapshots import assert_same, snapshot
from stores import content, put

from imgfs.compact import Keep
from imgfs.layout import VOLUME_SEALED, Word
from imgfs.store import ROOT, Store

# Between the stores of one change nothing can be told apart by others: so many are left out.
STRIDE = 7


class MortalPunch(MortalDisk):
    """As `MortalDisk`, which also dies before it frees blocks."""

    def punch(self, file: int, offset: int, size: int) -> bool:
        self._step(lambda: None)
        return super().punch(file, offset, size)


def fill(store: Store) -> int:
    """Make two sealed volumes of which little is needed; return a handle on an unlinked image in them."""
    for number in range(7):
        put(store, ROOT, b"%d" % number, bytes([number]) * 9000)
    for number in range(7, 12):
        put(store, ROOT, b"%d" % number, bytes([number]) * 9000)
    handle = store.open_image(store.resolve(b"0"))
    for number in range(5):
        store.unlink(ROOT, b"%d" % number)
    store.set_xattr(store.resolve(b"5"), b"user.a", b"value")
    store.link(store.resolve(b"6"), ROOT, b"link")
    put(store, ROOT, b"7", b"overwritten")
    store.rename(ROOT, b"8", ROOT, b"9")
    store.symlink(ROOT, b"symlink", b"target", 1, 1)
    put(store, ROOT, b"fills", bytes(20_000))
    put(store, ROOT, b"the next", bytes(9000))
    sealed = [row for row in rows_of(store).values() if store._table.volume(row).flags & VOLUME_SEALED]
    assert len(sealed) == 2
    return handle


def publish(store: Store) -> None:
    compaction = store.reclaimer().compaction
    plan = compaction.plan(store._volumes.rows(sealed=True), Keep(store._handles.slots()))
    compaction.run(plan, 0)


def finish(store: Store) -> None:
    assert store.reclaimer().finish()


def everything(store: Store) -> None:
    reclaim(store)


def go_on(store: Store, handle: int) -> None:
    """Do what workers do meanwhile: each image is read, one more is made, and one taken away."""
    assert bytes(store.read(handle, 0, 9001)) == bytes(9000)
    put(store, ROOT, b"one more", b"its bytes")
    assert content(store, store.resolve(b"one more")) == b"its bytes"
    store.unlink(ROOT, b"one more")


@pytest.mark.parametrize(
    ("before", "call", "stride"),
    [(publish, finish, 3), (publish, finish, -9), (lambda store: None, everything, STRIDE)],
    ids=["making current and removing", "torn", "everything"],
)
def test_killed_at_each_step(before: Callable[[Store], None], call: Callable[[Store], None], stride: int) -> None:
    for step in itertools.count(0, abs(stride)):
        with new_store() as store:
            handle = fill(store)
            before(store)
            wanted = without_root_times(store)
            was_killed = killed_at(store, step, call, torn=stride < 0, disk=MortalPunch)
            where = f"killed at step {step}"
            assert without_root_times(store) == wanted, f"{where}, before anybody settles it"
            store.roll_forward()
            go_on(store, handle)
            if step % 2 == 0:
                with on_disk(store) as twin:
                    assert not twin.report.damage
                    assert without_root_times(twin) == wanted, f"{where}, and then all others"
                    assert_tidy(twin)
            reclaim(store)
            assert without_root_times(store) == wanted, f"{where}, and finished by the next"
            go_on(store, handle)
            assert_tidy(store)
            assert_sound(store)
            if not was_killed:
                break
    assert step > 20


def without_root_times(store: Store) -> dict[bytes, object]:
    seen = dict(snapshot(store))
    root = seen.pop(b"")
    return {**seen, b"": root._replace(mtime_ns=0, ctime_ns=0)}


def test_a_row_is_given_again_and_nobody_reads_the_wrong_volume() -> None:
    """Another process has the old volume open by its row when that goes to another."""
    with new_store() as store:
        handle = fill(store)
        store.release(handle)
        wanted = snapshot(store)
        assert killed_at(store, 10**9, everything, torn=False) is False
        for number in range(12):
            put(store, ROOT, b"new%d" % number, bytes([number]) * 9000)
        assert store._memory.words[Word.ROWS_FREE] == 0, "the rows should be in use again"
        for number in range(12):
            assert content(store, store.resolve(b"new%d" % number)) == bytes([number]) * 9000
            store.unlink(ROOT, b"new%d" % number)
        assert_same({**snapshot(store), b"": wanted[b""]}, wanted, "")
