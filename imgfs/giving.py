"""Puts the bytes of an image into the kernel's cache while it is being opened, so that it need not ask for them.

Owns which images the kernel is likely to have nothing of, and when it may be given their bytes. Must not know how they
are sent, nor who asks.

An image that was looked up and not opened since, or that had to be waited for, is mostly one that the kernel has no
page of. It is read right away, and its bytes were just verified: given with the answer they save a request.

What is given must not take the place of anything newer, and the kernel waits for a page that somebody reads until that
is answered, in a way that nothing can end. So an image is given within the table's lock, and only while the handle that
is being answered is its only one: then nobody reads it or writes to it. Who opens it meanwhile finds that it is being
given, and passes through the lock before that is answered; who opens it to write always does (`View.take_handle`); who
truncates it changes it within the lock.

*Concurrency:* on the loop of a worker. All share the words: the first is written by who has the lock, the others are
hints. Who opens stores its handle and then looks at the first word, who gives does it the other way round; each lets go
of a lock in between, which keeps the processor from reading before it has stored.
"""

import contextlib
import threading
from collections.abc import Callable

from imgfs.disk import Buffer
from imgfs.errors import ImgfsError
from imgfs.handles import Handles
from imgfs.image_reading import Seen
from imgfs.images import Images
from imgfs.memory import Memory


class Giving:
    """What one worker gives to the kernel by *tell*(inode, bytes).

    The first of the *shared* words is the inode that is being given, each other one an inode that will be asked for.
    """

    def __init__(
        self,
        memory: Memory,
        handles: Handles,
        images: Images,
        shared: memoryview,
        tell: Callable[[int, Buffer], None],
    ) -> None:
        self._memory = memory
        self._handles = handles
        self._images = images
        self._shared = shared
        self._expected = shared[1:]
        self._tell = tell
        self._fence = threading.Lock()

    def expect(self, inode: int) -> None:
        """Take it that the kernel has no bytes of *inode*, and will ask for them."""
        self._expected[inode % len(self._expected)] = inode

    def expects(self, inode: int) -> bool:
        """Return whether the kernel is likely to have no bytes of *inode*."""
        return self._expected[inode % len(self._expected)] == inode

    def is_giving(self, inode: int) -> bool:
        """Return whether *inode* is just being given to the kernel, or was when a worker died."""
        return self._shared[0] == inode

    def give(self, inode: int, seen: Seen) -> None:
        """Give the kernel what was *seen* of *inode*, for which a handle was just opened."""
        self._expected[inode % len(self._expected)] = 0
        if not len(seen.data):
            return
        # Whoever takes the lock carries on what a dead writer left, which can fail. Then the kernel asks by itself.
        with contextlib.suppress(ImgfsError, OSError):
            if self._memory.try_acquire():
                self._shared[0] = inode
                try:
                    with self._fence:
                        pass
                    if self._handles.is_only_one(inode) and self._images.record(inode)[:7] == seen.record[:7]:
                        self._tell(inode, seen.data)
                finally:
                    self._shared[0] = 0
                    self._memory.release()
