"""The rows of requests and handles in a memory without a store, for tests.

Owns that memory. Must not know who serves a request.

*Concurrency:* as the rows themselves.
"""

from collections.abc import Iterator

import pytest

from imgfs.handles import Handles
from imgfs.memory import Memory
from imgfs.requests import Requests


class Shared:
    def __init__(self) -> None:
        self.memory = Memory()
        self.handles = Handles(self.memory)
        self.requests = Requests(self.memory, self.handles)

    def apply(self, row: int, inode: int) -> None:
        with self.memory.lock(), self.memory.change():
            self.requests.applied(row, inode)

    def close(self) -> None:
        self.requests.close()
        self.handles.close()
        self.memory.close()


@pytest.fixture
def shared_rows() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    shared.close()
