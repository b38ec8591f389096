"""What was prepared for who lists is what would be said now; where anything changed it is not said."""

import threading
from collections.abc import Iterator
from random import Random

import pytest
from listings import LARGE, filled, last_position, of_everything
from stores import new_store, put

from imgfs import prepared, replies
from imgfs.acts import Acts, Manner
from imgfs.calls import Calls
from imgfs.disk import WouldBlock
from imgfs.errors import Damaged
from imgfs.format import Kind
from imgfs.listing import Page
from imgfs.prepared import Prepared
from imgfs.store import ROOT, Store

ANSWER_BYTES = 4096


pytestmark = pytest.mark.usefixtures("no_store_stays_open")


class Lister:
    """Lists the root as the kernel does, and holds each answer against what entry by entry gives."""

    def __init__(self, acts: Acts, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self._acts = acts._store, acts
        self.prepared = Prepared(self.store, acts, self.store.access_times, Calls.start)
        self.counts: list[int] = []
        """How many entries were asked for at a time."""
        self.most: int | None = None
        """More than this cannot be had."""
        page = acts.page

        def counted(directory: int, position: int, count: int, *, nowait: bool = False) -> Page | None:
            self.counts.append(count)
            return page(directory, position, count, nowait=nowait) if count <= (self.most or count) else None

        monkeypatch.setattr(acts, "page", counted)

    def answer(self, position: int, size: int = ANSWER_BYTES, *, bare: bool = False, directory: int = ROOT) -> bytes:
        """Return the answer behind *position*, which is right, and as long as can be or the end of what is prepared."""
        reply = self.prepared.answer(7, directory, position, size, bare=bare)
        self.wait()
        assert reply is not None
        answer = b"".join(reply)
        assert answer[:16] == replies.OUT_HEADER.pack(len(answer), 0, 7)
        expected = self.expected(position, size, bare=bare, directory=directory)
        assert expected.startswith(answer[16:])
        assert len(answer) > 16 or not expected
        return answer[16:]

    def wait(self) -> None:
        """Return once no thread prepares anything: the store is closed at the end of a test."""
        ahead = self.prepared._ahead
        if ahead is not None:
            ahead.done.wait()

    def expected(self, position: int, size: int = ANSWER_BYTES, *, bare: bool = False, directory: int = ROOT) -> bytes:
        """Return what entry by entry gives behind *position*."""
        times, listing = self.store.access_times, self._acts.listing(directory, position)
        return b"".join(replies.listing(7, listing, times, self._acts.manner.timeout_s, size, bare=bare)[1:])

    def walk(self, size: int = ANSWER_BYTES, *, bare: bool = False) -> Iterator[int]:
        """List all, and stop behind each answer to give its number."""
        position, number = 0, 0
        while answer := self.answer(position, size, bare=bare):
            position = last_position(answer)
            yield number
            number += 1


def base_count(size: int = ANSWER_BYTES) -> int:
    return size // replies.LISTED_BYTES_MIN


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("size", [500, ANSWER_BYTES, 1 << 20])
def test_all_answers_are_those_of_who_looks_at_each(monkeypatch: pytest.MonkeyPatch, size: int, bare: bool) -> None:
    lister = Lister(of_everything(), monkeypatch)
    assert len(list(lister.walk(size, bare=bare))) >= min(20, (1 << 20) // size)
    assert lister.counts == sorted(lister.counts), "more and more"
    assert lister.counts[-1] > 4 * lister.counts[0] or size == 1 << 20


def test_few_steps_are_taken_for_many_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    lister = Lister(Acts(filled(3000), Manner(60.0)), monkeypatch)
    answers = sum(1 for _ in lister.walk())
    assert answers > 100
    assert len(lister.counts) < 10
    lister.prepared.forget()
    assert lister.prepared.forget()
    lister.counts.clear()
    monkeypatch.setattr(prepared, "_ENTRIES_MAX", 100)
    list(lister.walk())
    assert max(lister.counts) == 100


def test_what_changes_meanwhile_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change is followed by an answer; most are about entries that are prepared by then."""
    random = Random(3)
    lister = Lister(of_everything(), monkeypatch)
    store = lister.store

    def change(number: int) -> None:
        entries = [entry for entry in store.list(ROOT) if store.attr(entry.inode).kind == Kind.FILE]
        _, inode, name = random.choice(entries)
        random.choice(
            (
                lambda: store.unlink(ROOT, name),
                lambda: store.rename(ROOT, name, ROOT, b"renamed %d" % number),
                lambda: store.set_attr(inode, mode=random.randrange(0o777)),
                lambda: put(store, ROOT, name, b"another image"),
                lambda: put(store, ROOT, b"one more %d" % number),
            )
        )()

    for number in lister.walk():
        change(number)
    assert lister.counts.count(base_count()) > 20
    assert max(lister.counts) == 2 * base_count(), "nothing is prepared that will not be asked for"


def test_where_much_cannot_be_had_at_once_little_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lister = Lister(Acts(filled(500), Manner(60.0)), monkeypatch)
    lister.most = base_count()
    assert sum(1 for _ in lister.walk()) > 15


def test_who_asks_again_is_answered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a worker died, or somebody seeks; or others list the same directory."""
    lister = Lister(Acts(filled(500), Manner(60.0)), monkeypatch)
    answers, position = [], 0
    while answer := lister.answer(position):
        answers.append((position, answer))
        position = last_position(answer)
    Random(4).shuffle(answers)
    for position, _ in answers:
        for bare in (False, True, False):
            lister.answer(position, bare=bare)
        lister.answer(position, 2 * ANSWER_BYTES)


def test_the_end_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    lister = Lister(Acts(filled(40), Manner(60.0)), monkeypatch)
    first = lister.answer(0, 1 << 20)
    assert lister.answer(last_position(first), 1 << 20) == b""
    assert len(lister.counts) == 1
    put(lister.store, ROOT, b"one more")
    lister.answer(last_position(first), 1 << 20)
    assert len(lister.counts) == 2


def test_an_access_time_that_was_set_meanwhile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lister = Lister(Acts(filled(500), Manner(60.0)), monkeypatch)
    position = last_position(lister.answer(0))
    for entry in lister.store.list(ROOT):
        lister.store.access_times.put(entry.inode, 12345)
    lister.answer(position)


def test_a_damaged_entry_costs_only_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    acts = Acts(filled(500), Manner(60.0))
    page = acts.page

    def damaged(directory: int, position: int, count: int, *, nowait: bool = False) -> Page | None:
        if count > base_count():
            raise Damaged("a name that is not asked for yet")
        return page(directory, position, count, nowait=nowait)

    monkeypatch.setattr(acts, "page", damaged)
    lister = Lister(acts, monkeypatch)
    list(lister.walk())
    assert lister.counts.count(2 * base_count()) < 3, "nor is it tried again and again"


def directories(store: Store, count: int) -> list[int]:
    found = [store.mkdir(ROOT, b"directory %d" % number, 0o755, 0, 0) for number in range(count)]
    for directory in found:
        for number in range(200):
            put(store, directory, b"%d" % number)
    return found


def test_of_several_directories_each_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(LARGE)
    listed = dict.fromkeys(directories(store, 6), 0)
    lister = Lister(Acts(store, Manner(60.0)), monkeypatch)
    for _ in range(5):
        for directory, position in listed.items():
            listed[directory] = last_position(lister.answer(position, directory=directory))
    assert len(lister.prepared._lots) == prepared._LOTS_MAX


def test_nothing_is_kept_of_listings_that_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    lister = Lister(Acts(filled(500), Manner(60.0)), monkeypatch)
    assert not lister.prepared.forget()
    lister.answer(0)
    assert not lister.prepared.forget(), "it goes on"
    assert lister.prepared._lots
    assert lister.prepared.forget()
    assert not lister.prepared._lots
    assert not lister.prepared.forget(), "there is nothing"
    lister.answer(0)


def test_what_is_being_written_is_left_to_who_looks_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    lister = Lister(Acts(filled(500), Manner(60.0)), monkeypatch)
    store = lister.store
    handle = store.open_image(store.lookup(ROOT, b"7"), write=True)
    store.write(handle, 0, b"other")
    position, answers, left = 0, 0, 0
    while answer := lister.expected(position):
        prepared_now = lister.prepared.answer(7, ROOT, position, ANSWER_BYTES, bare=False)
        lister.wait()
        position = last_position(b"".join(prepared_now[1:]) if prepared_now else answer)
        answers += 1
        left += prepared_now is None
    assert 0 < left < answers
    store.flush(handle)
    store.release(handle)
    list(lister.walk())


class HeldUp:
    """Lets who prepares ahead, in a thread, wait for a sign; what is asked for meanwhile is not held up."""

    def __init__(self, lister: Lister, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.go = threading.Event()
        self.threads: list[int] = []
        here, page = threading.get_ident(), lister._acts.page

        def held_up(directory: int, position: int, count: int, *, nowait: bool = False) -> Page | None:
            if threading.get_ident() != here:
                self.threads.append(threading.get_ident())
                assert not nowait
                assert self.go.wait(30)
                if error is not None:
                    raise error
            return page(directory, position, count, nowait=nowait)

        monkeypatch.setattr(lister._acts, "page", held_up)


def until_a_thread_is_at_it(lister: Lister) -> int:
    """List until a thread prepares what comes next; return where that begins."""
    position = 0
    while lister.prepared._ahead is None:
        reply = lister.prepared.answer(7, ROOT, position, ANSWER_BYTES, bare=False)
        assert reply is not None
        position = last_position(b"".join(reply[1:]))
    return lister.prepared._ahead.place.behind


def test_what_comes_next_is_prepared_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    lister = Lister(Acts(filled(3000), Manner(60.0)), monkeypatch)
    held = HeldUp(lister, monkeypatch)
    position = until_a_thread_is_at_it(lister)
    with pytest.raises(WouldBlock):
        lister.prepared.answer(7, ROOT, position, ANSWER_BYTES, bare=False, nowait=True)
    assert lister.prepared.answer(7, ROOT, 0, ANSWER_BYTES, bare=False, nowait=True), "others need not wait"
    before = len(lister.counts)
    threading.Timer(0.05, held.go.set).start()
    lister.answer(position)  # waits
    assert len(lister.counts) == before + 1, "by the thread alone"
    while answer := lister.answer(position):
        position = last_position(answer)
    assert len(held.threads) == len(lister.counts) - before > 3, "nobody else prepared anything from there on"


def test_what_a_thread_cannot_prepare_is_left_to_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lister = Lister(Acts(filled(500), Manner(60.0)), monkeypatch)
    held = HeldUp(lister, monkeypatch, Damaged("a name that is not asked for yet"))
    position = until_a_thread_is_at_it(lister)
    held.go.set()
    while answer := lister.answer(position):
        position = last_position(answer)
    assert held.threads


def test_what_changes_while_a_thread_prepares_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lister = Lister(Acts(filled(500), Manner(60.0)), monkeypatch)
    held = HeldUp(lister, monkeypatch)
    position = until_a_thread_is_at_it(lister)
    held.go.set()
    lister.wait()
    _, inode, _ = next(iter(lister.store.list(ROOT, position)))
    lister.store.set_attr(inode, mode=0o600)
    lister.answer(position)


def test_where_no_thread_is_to_be_had_who_lists_goes_on() -> None:
    acts = Acts(filled(3000), Manner(60.0))

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    prepared, position, count = Prepared(acts._store, acts, acts._store.access_times, start), 0, 0
    while True:
        reply = prepared.answer(7, ROOT, position, ANSWER_BYTES, bare=False, nowait=True)
        assert reply is not None
        answer = b"".join(reply[1:])
        if not answer:
            break
        position, count = last_position(answer), count + 1
    assert count > 3000 // (ANSWER_BYTES // replies.LISTED_BYTES_MIN)
