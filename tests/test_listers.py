"""Who looks at nothing but names gets names alone, and nobody who looks at more pays for it for long."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import PROJECT, Mounted, imgfs, wait_until

from bench.counting import make_counts, read_counts
from bench.site import caches_dropped
from imgfs.board import Board
from imgfs.listers import PATIENCE, PATIENCE_WITH_USER, Listers

DIRECTORY, OTHER = 5, 6
THREAD = 4321
SAME_WORD = THREAD + 64


def answers_with_attributes(listers: Listers, thread: int = THREAD) -> int:
    """Let *thread* list until it gets names alone; return how many answers it got with attributes."""
    count = 0
    while not listers.wants_names_alone(thread, DIRECTORY):
        listers.gave_attributes(thread)
        count += 1
        assert count <= PATIENCE_WITH_USER
    return count


def test_who_looks_up_nothing_gets_names_alone_after_some_time() -> None:
    listers = Listers()
    assert answers_with_attributes(listers) == PATIENCE
    assert answers_with_attributes(listers) == 0
    assert answers_with_attributes(listers, 0) == PATIENCE, "the thread of another PID namespace has no number"


def test_who_looks_an_entry_up_gets_attributes_for_long() -> None:
    listers = Listers()
    assert answers_with_attributes(listers) == PATIENCE
    listers.looked_up(THREAD, OTHER)
    assert answers_with_attributes(listers) == PATIENCE_WITH_USER
    assert answers_with_attributes(listers) == 0


def test_threads_that_share_a_word_cost_each_other_what_is_known() -> None:
    listers = Listers()
    assert answers_with_attributes(listers) == PATIENCE
    listers.looked_up(SAME_WORD, OTHER)
    assert answers_with_attributes(listers) == 0, "somebody else's look says nothing"
    assert answers_with_attributes(listers, SAME_WORD) == PATIENCE
    assert answers_with_attributes(listers) == PATIENCE


def test_what_the_kernel_has_names_alone_of_is_outdated_once_by_any_look() -> None:
    board = Board()
    one, other = Listers(board.listers), Listers(board.listers)
    other.looked_up(THREAD + 1, DIRECTORY)
    assert not other.outdated(), "it has more"
    answers_with_attributes(one)
    other.looked_up(THREAD + 1, OTHER)
    assert not other.outdated()
    other.looked_up(THREAD + 1, DIRECTORY)
    other.looked_up(THREAD + 1, DIRECTORY)
    assert other.outdated() == [DIRECTORY]
    other.looked_up(THREAD + 1, DIRECTORY)
    one.looked_up(THREAD, DIRECTORY)
    assert not other.outdated() + one.outdated(), "once is enough"


def test_who_has_looked_an_entry_up_lists_anew_what_the_kernel_has_names_alone_of() -> None:
    listers = Listers()
    assert not listers.wants_anew(THREAD, DIRECTORY)
    answers_with_attributes(listers)
    assert not listers.wants_anew(THREAD, DIRECTORY), "names are all it wants"
    assert not listers.wants_anew(THREAD + 1, DIRECTORY), "nobody knows what it wants"
    listers.wants_names_alone(THREAD, OTHER)
    listers.looked_up(THREAD + 1, DIRECTORY)
    assert listers.wants_anew(THREAD + 1, OTHER)
    assert not listers.wants_anew(THREAD + 1, OTHER), "now it has more"


# -- through the kernel -------------------------------------------------------------------------------------------


def by_another_thread(call: Callable[[int], object], number: int) -> None:
    thread = threading.Thread(target=call, args=(number,))
    thread.start()
    thread.join()


DIRECTORIES, EACH = PATIENCE + 8, 20
TRIES = 3


@pytest.mark.mount
@pytest.mark.root
def test_the_kernel_is_asked_for_each_entry_only_until_it_is_seen_that_somebody_looks(
    stopped: Mounted, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for number in range(DIRECTORIES):
        (source / f"{number:02}").mkdir(parents=True)
        for image in range(EACH):
            (source / f"{number:02}" / f"{image}.jpg").write_bytes(bytes(image + 1))
    imgfs("import", "--quiet", source, stopped.store)
    for tries_left in reversed(range(TRIES)):
        before = caches_dropped()
        stopped.start(
            "allow_other,workers=1",
            fault=("count-requests", str(make_counts(tmp_path / "counts"))),
            environment={"PYTHONPATH": str(PROJECT)},
        )
        try:
            list_and_look(stopped.point, tmp_path / "counts")
            return
        except AssertionError:
            if caches_dropped() == before or not tries_left:
                raise
        stopped.stop()


def list_and_look(point: Path, counts: Path) -> None:
    def asked(what: str, call: Callable[[], object]) -> int:
        before = read_counts(counts)[what]
        call()
        return read_counts(counts)[what] - before

    def names(number: int) -> set[str]:
        with os.scandir(point / f"{number:02}") as found:
            return {entry.name for entry in found if entry.is_file(follow_symlinks=False)}

    def look(number: int, images: range = range(EACH)) -> None:
        for image in images:
            assert os.stat(point / f"{number:02}" / f"{image}.jpg").st_size == image + 1

    expected = {f"{image}.jpg" for image in range(EACH)}
    assert len(os.listdir(point)) == DIRECTORIES
    for number in range(DIRECTORIES):
        assert names(number) == expected
    assert asked("lookup", lambda: look(0)) == 0, "attributes came with the names"
    one, other = DIRECTORIES - 1, DIRECTORIES - 2
    assert asked("lookup", lambda: look(one, range(1))) == 1, "they did not"
    # Soon the kernel forgets that listing; then it comes with attributes.
    wait_until(lambda: asked("readdir", lambda: by_another_thread(names, one)) > 0, "it is listed anew")
    assert asked("lookup", lambda: look(one)) == 0
    # Who has looked one up gets attributes of the other directories, too.
    assert asked("readdir", lambda: names(other)) > 0
    assert asked("lookup", lambda: look(other)) == 0
    assert names(one) == names(other) == expected
