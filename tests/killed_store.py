"""A process that is killed at a chosen step of a call to a store: at a system call, in the middle of a write, or at a
store into shared memory; and the store it leaves behind, on a real file system.

Owns the counting of steps and the child. Must not know what is called.

*Concurrency:* the child has a store of its own on the same memory, as a worker after an exec has.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mortal import Life, MortalMemory, in_process, status_of

from imgfs import store as store_module
from imgfs.disk import Buffer, Disk
from imgfs.memory import Memory
from imgfs.settings import KIB, Settings
from imgfs.store import Store, make_store

SMALL = Settings(volume_bytes_max=64 * KIB, headroom_bytes=0, checkpoint_needles=8, rest_slots=2)
# A real file system without a disk: nothing here is about durability.
_DIRECTORY = "/dev/shm"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class MortalDisk(Disk):
    """A disk whose process is killed at one of the calls that change something."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._life = life

    def _step(self, call: Callable[[], object]) -> None:
        def whole(size: int) -> None:
            if size:  # nothing but a write is done by half
                call()

        self._life.store(whole, 1)

    def open(self, path: str, *, writable: bool = False, create: bool = False, exclusive: bool = False) -> int:
        if create and not self.exists(path):
            self._step(lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)))
        return super().open(path, writable=writable, create=create, exclusive=exclusive)

    def write(self, file: int, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        self._life.store(lambda size: super(MortalDisk, self).write(file, offset, [data[:size]]), len(data))

    def truncate(self, file: int, size: int) -> None:
        self._step(lambda: super(MortalDisk, self).truncate(file, size))

    def sync(self, file: int) -> None:
        self._step(lambda: super(MortalDisk, self).sync(file))

    def rename(self, source: str, target: str) -> None:
        self._step(lambda: super(MortalDisk, self).rename(source, target))

    def unlink(self, path: str) -> None:
        self._step(lambda: super(MortalDisk, self).unlink(path))

    def sync_directory(self, path: str) -> None:
        self._step(lambda: super(MortalDisk, self).sync_directory(path))


@contextmanager
def new_store(settings: Settings = SMALL) -> Iterator[Store]:
    """Yield an empty store in real files; whatever is left of it is removed."""
    directory = tempfile.mkdtemp(prefix="imgfs-killed-", dir=_DIRECTORY)
    try:
        make_store(f"{directory}/store", settings, uid=0, gid=0)
        with Store.open(f"{directory}/store", settings=settings) as store:
            yield store
    finally:
        shutil.rmtree(directory)


@contextmanager
def on_disk(store: Store) -> Iterator[Store]:
    """Yield what the next daemon would open if all processes died now."""
    copy = f"{Path(store.path).parent}/copy"
    shutil.copytree(store.path, copy)
    try:
        with Store.open(copy, settings=store.settings) as twin:
            yield twin
    finally:
        shutil.rmtree(copy)


def killed_at(
    store: Store, step: int, call: Callable[[Store], object], *, torn: bool, disk: type[MortalDisk] = MortalDisk
) -> bool:
    """Let another process do *call* to *store* until it is killed at *step*; return False if it got to the end."""
    life = Life(step, torn=torn, end=die)

    def attach(descriptor: int) -> Memory:
        return MortalMemory(descriptor, life)

    def run() -> None:
        store_module.Memory = attach  # type: ignore[misc, assignment]
        # The supervisor lives, and has the store's lock.
        descriptor = os.dup(store.memory_descriptor)
        call(Store.attach(store.path, descriptor, None, settings=store.settings, disk=disk(life)))

    status = status_of(in_process(run))
    assert status == 0 or os.WIFSIGNALED(status), "the call failed"
    return status != 0
