"""Which worker takes a request that more than one is woken for."""

import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
from shared_rows import Shared

from imgfs.board import LAST, WATCHER, Board
from imgfs.desk import Desk
from imgfs.requests import TASKS_MAX, Request
from imgfs.wire import Opcode

OURS, OTHER = 0, 1


@pytest.fixture
def desk(shared_rows: Shared) -> Iterator[Desk]:
    """That of worker 0, with a request to read."""
    nobody: Any = None
    desk = Desk(OURS, nobody, Board(), shared_rows.requests)
    read, write = os.pipe()
    os.write(write, b"request")
    desk._awake.listen_to(read)
    yield desk
    desk.close()
    os.close(read)
    os.close(write)


def comes(desk: Desk, *, woken: bool) -> bool:
    """Return whether it takes the request, *woken* by it or having slept."""
    desk._woken = woken
    return cast(bool, desk._watch(0))


def test_who_served_a_client_last_is_left_the_next_request_for_a_moment(desk: Desk) -> None:
    words = desk._board.words
    words[LAST] = OTHER + 1
    assert not comes(desk, woken=True)
    assert comes(desk, woken=False), "it was not taken meanwhile: the other may be dead"
    words[LAST] = OURS + 1
    assert comes(desk, woken=True)
    words[LAST] = 0
    assert comes(desk, woken=True), "several ask"


def test_but_not_if_it_has_another_in_hand(desk: Desk) -> None:
    desk._board.words[LAST] = OTHER + 1
    desk._requests.begin(OTHER * TASKS_MAX, Request(Opcode.GETATTR, 1, 2, 3))
    assert comes(desk, woken=True)
    desk._requests.end(OTHER * TASKS_MAX)
    assert not comes(desk, woken=True)


def test_who_watches_says_so_until_something_comes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    words, seen = desk._board.words, []
    monkeypatch.setattr(desk._awake, "wait", lambda patience_ms: seen.append(words[WATCHER]) or True)
    assert desk._watch(1)
    assert seen == [OURS + 1]
    assert words[WATCHER] == 0
    words[WATCHER] = OTHER + 1
    assert desk._watch(1)
    assert seen == [OURS + 1], "nobody else waits, but looks"
