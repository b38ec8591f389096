"""Asking the maintenance process of a mounted store, which may be killed at any moment."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imgfs import control

SECONDS = 10.0
QUESTION = {"do": "it"}


@contextmanager
def answering(store: Path, do: Callable[[socket.socket], None]) -> Iterator[None]:
    """Let *do* have the connection of the first client that asks."""
    with control.listen(str(store)) as listening:
        listening.settimeout(SECONDS)

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                do(connection)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def reset(connection: socket.socket) -> None:
    """As when a process is killed that has not read all that was sent to it."""
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def within_a_line(connection: socket.socket) -> None:
    connection.makefile("rb").readline()
    connection.sendall(b'{"told": 1}\n{"do')


def silently(connection: socket.socket) -> None:
    connection.makefile("rb").readline()


@pytest.mark.parametrize("die", [reset, within_a_line, silently])
def test_who_is_asked_dies(die: Callable[[socket.socket], None], tmp_path: Path) -> None:
    told: list[control.Message] = []
    with answering(tmp_path, die), pytest.raises(control.Interrupted, match="ask again"):
        control.ask(str(tmp_path), QUESTION, told.append)
    assert told == ([{"told": 1}] if die == within_a_line else [])


def test_what_is_told_comes_before_the_answer(tmp_path: Path) -> None:
    told: list[control.Message] = []
    asked: list[control.Message] = []

    def do(question: control.Message, tell: Callable[[control.Message], None]) -> control.Message:
        asked.append(question)
        tell({"copied": 1})
        return {"freed": 2}

    with control.listen(str(tmp_path)) as listening:
        listening.settimeout(SECONDS)
        thread = threading.Thread(target=control.answer, args=(listening, do))
        thread.start()
        assert control.ask(str(tmp_path), QUESTION, told.append) == {"freed": 2}
        thread.join()
    assert (asked, told) == ([QUESTION], [{"copied": 1}])
