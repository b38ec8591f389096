"""Talks to the maintenance process of a mounted store: through a socket in the store, a JSON object for each line.

Owns the socket and the form of what goes through it. Must not know what is asked for.

*Concurrency:* one client at a time; whoever else asks waits until that one has its answer.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from imgfs.errors import Busy, ImgfsError

NAME = "control"
# A client that says nothing for so long is left alone.
_ASK_S = 5.0
_BEGIN_S, _BEGIN_POLL_S = 2.0, 0.01
_LINE_BYTES_MAX = 65_536

Message = dict[str, Any]


class Interrupted(ImgfsError):
    """Who was asked died before it had answered."""


class Gone(Exception):
    """The client does not listen any more."""


def listen(store_path: str) -> socket.socket:
    """Return a socket that listens in the store; one that a killed process has left is replaced."""
    path = os.path.join(store_path, NAME)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _reachable(store_path) as directory:
        listening.bind(f"{directory}/{NAME}")
    os.chmod(path, 0o600)
    listening.listen()
    return listening


def answer(listening: socket.socket, do: Callable[[Message, Callable[[Message], None]], Message]) -> None:
    """Let *do* answer one client: it gets the question, and a function that tells how far it is."""
    connection, _ = listening.accept()
    with connection, contextlib.suppress(OSError, ValueError, Gone):
        connection.settimeout(_ASK_S)
        question = connection.makefile("rb").readline(_LINE_BYTES_MAX)

        def tell(message: Message) -> None:
            try:
                connection.sendall(json.dumps(message).encode() + b"\n")
            except OSError as error:
                raise Gone from error

        tell({"done": do(json.loads(question), tell)})


def ask(store_path: str, question: Message, told: Callable[[Message], None] = lambda _: None) -> Message:
    """Ask the maintenance process of the store at *store_path*; return its answer, and show what it tells before.

    Raises:
        Busy: the store is in use, but nobody answers for it.
        Interrupted: the process that was asked died.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with connection:
        _connect(connection, store_path)
        for message in _answers(connection, question):
            if "done" in message:
                done: Message = message["done"]
                return done
            told(message)
    raise Interrupted("the maintenance process was interrupted; what it had begun goes on, or is undone: ask again")


def _answers(connection: socket.socket, question: Message) -> Iterator[Message]:
    """Yield what is answered to *question*, until who answers is done, or dies."""
    with contextlib.suppress(ConnectionError):  # killed, with the question or a part of it not read yet
        connection.sendall(json.dumps(question).encode() + b"\n")
        for line in connection.makefile("rb"):
            if not line.endswith(b"\n"):
                return  # killed within a line
            yield json.loads(line)


def _connect(connection: socket.socket, store_path: str) -> None:
    """Connect to who answers for the store; just after a mount, or in place of a killed one, that begins in a moment.

    Raises:
        Busy: nobody does.
    """
    deadline_s = time.monotonic() + _BEGIN_S
    while True:
        try:
            with _reachable(store_path) as directory:
                connection.connect(f"{directory}/{NAME}")
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise Busy(f"{store_path} is in use, and who uses it does not answer ({error.strerror})") from None
        time.sleep(_BEGIN_POLL_S)


@contextlib.contextmanager
def _reachable(path: str) -> Iterator[str]:
    """Yield a short path to the directory *path*: the address of a socket has room for 107 bytes."""
    directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}"
    finally:
        os.close(directory)
