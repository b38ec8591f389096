"""Requests in hand: what is left of a dead worker's, and that each is answered once with its true result."""

import pytest
from shared_rows import Shared

from imgfs.errors import BadHandle
from imgfs.layout import REQUESTS_MAX
from imgfs.requests import TASKS_MAX, WORKERS_MAX, Request, Result

ONE = Request(9, 100, 1, 0xFFFF_FFFF_FFFF_FFFF)
OTHER = Request(12, 101, 1 << 39, 7)
ROW = 3 * TASKS_MAX  # the first of worker 3


def test_a_row_holds_its_request_until_it_is_answered(shared_rows: Shared) -> None:
    requests = shared_rows.requests
    requests.begin(ROW, ONE)
    requests.begin(ROW + TASKS_MAX - 1, OTHER)
    assert requests.in_hand(3) == [(ROW, ONE, None), (ROW + TASKS_MAX - 1, OTHER, None)]
    assert requests.busy(3)
    assert not requests.busy(2)
    assert not requests.busy(4)
    shared_rows.apply(ROW, 77)
    assert requests.in_hand(3)[0] == (ROW, ONE, Result(77, 0))
    requests.end(ROW)
    requests.end(ROW + TASKS_MAX - 1)
    assert requests.in_hand(3) == []
    requests.begin(ROW, OTHER)
    assert requests.in_hand(3) == [(ROW, OTHER, None)], "nothing is left of the last request"
    requests.clear(3)
    assert not requests.busy(3)


def test_what_waits_for_room_is_in_hand_but_not_at_work(shared_rows: Shared) -> None:
    requests = shared_rows.requests
    requests.begin(ROW, ONE)
    requests.begin(ROW + 1, OTHER)
    requests.wait(ROW, waiting=True)
    assert requests.at_work(3) == {ROW + 1: OTHER}
    assert requests.in_hand(3) == [(ROW, ONE, None), (ROW + 1, OTHER, None)]
    requests.wait(ROW, waiting=False)
    assert requests.at_work(3) == {ROW: ONE, ROW + 1: OTHER}
    requests.wait(ROW, waiting=True)
    requests.begin(ROW, OTHER)
    assert requests.at_work(3)[ROW] == OTHER, "another one does not wait"


def test_the_last_row_of_the_last_worker(shared_rows: Shared) -> None:
    shared_rows.requests.begin(REQUESTS_MAX - 1, ONE)
    assert shared_rows.requests.in_hand(WORKERS_MAX - 1) == [(REQUESTS_MAX - 1, ONE, None)]


def test_an_undone_change_has_not_applied_its_request(shared_rows: Shared) -> None:
    shared_rows.requests.begin(ROW, ONE)
    with pytest.raises(KeyError), shared_rows.memory.lock(), shared_rows.memory.change():
        shared_rows.requests.applied(ROW, 5)
        raise KeyError
    assert shared_rows.requests.in_hand(3) == [(ROW, ONE, None)]


def test_what_was_applied_and_is_sent_again_is_answered_from_the_list_once(shared_rows: Shared) -> None:
    requests = shared_rows.requests
    requests.begin(ROW, ONE)
    handle = shared_rows.handles.open(50, 1, lambda handle: requests.opened(ROW, handle))
    shared_rows.apply(ROW, 50)
    assert requests.settle(3, [OTHER, ONE]) == []
    assert not requests.busy(3)
    assert requests.resent(5 * TASKS_MAX, OTHER) is None
    assert requests.resent(5 * TASKS_MAX, ONE) == Result(50, handle)
    assert requests.resent(6 * TASKS_MAX, ONE) is None, "the next one of that kind is another request"
    assert shared_rows.handles.get(handle) == (50, 1)


def test_what_was_answered_keeps_its_handle_and_is_forgotten(shared_rows: Shared) -> None:
    requests = shared_rows.requests
    requests.begin(ROW, ONE)
    handle = shared_rows.handles.open(50, 1, lambda handle: requests.opened(ROW, handle))
    shared_rows.apply(ROW, 50)
    assert requests.settle(3, []) == []
    assert requests.resent(ROW, ONE) is None
    assert shared_rows.handles.get(handle) == (50, 1)


def test_what_was_not_applied_gives_its_handle_back(shared_rows: Shared) -> None:
    requests = shared_rows.requests
    requests.begin(ROW, ONE)
    handle = shared_rows.handles.open(50, 0, lambda handle: requests.opened(ROW, handle))
    assert requests.settle(3, [ONE]) == [ONE]
    with pytest.raises(BadHandle):
        shared_rows.handles.get(handle)
    assert requests.resent(ROW, ONE) is None


def test_who_answers_from_the_list_may_die_too(shared_rows: Shared) -> None:
    requests = shared_rows.requests
    requests.begin(ROW, ONE)
    shared_rows.apply(ROW, 50)
    requests.settle(3, [ONE])
    for worker in (4, 5, 6):
        row = worker * TASKS_MAX
        requests.begin(row, ONE)
        assert requests.resent(row, ONE) == Result(50, 0)
        assert requests.settle(worker, [ONE]) == []
    requests.begin(ROW, ONE)
    assert requests.resent(ROW, ONE) == Result(50, 0)
    requests.end(ROW)
    requests.settle(3, [])
    assert requests.resent(ROW, ONE) is None


def test_what_its_sender_gave_up_is_dropped_with_its_handle(shared_rows: Shared) -> None:
    requests = shared_rows.requests
    requests.begin(ROW, ONE)
    handle = shared_rows.handles.open(50, 1, lambda handle: requests.opened(ROW, handle))
    shared_rows.apply(ROW, 50)
    requests.settle(3, [ONE])
    requests.settle(4, [OTHER])  # at the next death the kernel no longer sends it
    assert requests.resent(ROW, ONE) is None
    with pytest.raises(BadHandle):
        shared_rows.handles.get(handle)


def test_equal_requests_are_told_apart_by_their_number(shared_rows: Shared) -> None:
    requests = shared_rows.requests
    for row in (ROW, ROW + 1):
        requests.begin(row, ONE)
    assert requests.settle(3, [ONE]) == [ONE], "one of two was answered"


def test_more_than_a_page_of_them(shared_rows: Shared) -> None:
    requests = shared_rows.requests
    many = [Request(9, pid, 1, pid * 3) for pid in range(TASKS_MAX)]
    for worker in (1, 2, 3):
        for task, request in enumerate(many):
            requests.begin(worker * TASKS_MAX + task, request._replace(node=worker))
            shared_rows.apply(worker * TASKS_MAX + task, request.pid + 1)
    resent = [request._replace(node=worker) for worker in (1, 2, 3) for request in many]
    for worker in (1, 2, 3):
        assert requests.settle(worker, resent) == []
    for request in reversed(resent):
        assert requests.resent(0, request) == Result(request.pid + 1, 0)
    assert requests.resent(0, resent[0]) is None
