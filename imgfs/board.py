"""What supervisor and workers tell each other while they run: shared words, and the answer to INIT.

Owns the memory they lie in. Must not know requests, nor who acts on what they say.

*Concurrency:* each word is stored in one instruction, and has one process that writes it: the supervisor PAUSE, each
worker the words of its own number; but any worker may write WATCHER and LAST. Whoever answers INIT writes the answer,
always the same bytes, before its length.

PAUSE and READING_SINCE_NS are the gate. A worker says that it reads, and then looks whether it may; the supervisor
shuts the gate, lets a moment pass in which what a processor has stored comes to be seen by the others, and then looks
who still reads.
"""

import mmap
import os
import threading

from imgfs.listers import SHARED_BYTES

WORKERS_MAX = 16

_REPLY_AT = 2048
_PAGE = 4096
_LISTERS_AT = _PAGE
_BYTES = _LISTERS_AT + SHARED_BYTES
_WORKER_AT = 16  # words, eight for each worker
_WORDS_EACH = 8
_GIVING_AT, _GIVING = 160, 65  # words

# Words of the page. A worker stores some of them for each request, without a call in between.
PAUSE, REPLY_BYTES, WATCHER, LAST = range(4)
# Words of one worker.
READING_SINCE_NS, BEAT_NS, ANSWERED_LATE, ANSWERED, READY, WAITED, WAITED_NS = range(7)


class Post:
    """The words of one worker."""

    __slots__ = ("_lock", "words")

    def __init__(self, words: memoryview, worker: int) -> None:
        self.words = words[_WORKER_AT + worker * _WORDS_EACH :][:_WORDS_EACH]
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget the last worker of that number."""
        for word in range(_WORDS_EACH):
            self.words[word] = 0

    @property
    def reading_since_ns(self) -> int:
        """Since when it reads a request, by the monotonic clock; 0 if it does not, or has noted what it read."""
        return self.words[READING_SINCE_NS]

    @property
    def beat_ns(self) -> int:
        """When its loop last had a turn for something else than requests."""
        return self.words[BEAT_NS]

    @beat_ns.setter
    def beat_ns(self, value: int) -> None:
        self.words[BEAT_NS] = value

    @property
    def answered(self) -> int:
        """How many requests it has answered: at once, which its loop counts in a word of its own, and late."""
        return self.words[ANSWERED] + self.words[ANSWERED_LATE]

    def answered_late(self) -> None:
        """Note that it has answered a request, in any thread."""
        with self._lock:
            self.words[ANSWERED_LATE] += 1

    def waited(self, time_ns: int) -> None:
        """Note that a request had to wait for the disk for so long."""
        self.words[WAITED] += 1
        self.words[WAITED_NS] += time_ns

    @property
    def waits(self) -> tuple[int, int]:
        """How many requests had to wait for the disk, and for how long in all."""
        return self.words[WAITED], self.words[WAITED_NS]

    @property
    def ready(self) -> bool:
        """Whether it reads the device."""
        return bool(self.words[READY])

    @ready.setter
    def ready(self, value: bool) -> None:
        self.words[READY] = value


class Board:
    """All of it; a child process shares it by fork, the next release by its *descriptor*."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("imgfs-board", os.MFD_CLOEXEC)
        # That of another release may be shorter.
        os.ftruncate(descriptor, max(_BYTES, os.fstat(descriptor).st_size))
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, _BYTES)
        self.words = memoryview(self._map)[:_PAGE].cast("Q")
        """Of WATCHER: the worker, plus 1, that waits for the next request, so that nobody else need wake for it; or 0.

        Of LAST: the worker, plus 1, that has read the last request, if one client asks alone; or 0.

        Hints: two that come at once may both think that they are the one, and one that was killed still stands there.
        """
        self.giving = self.words[_GIVING_AT : _GIVING_AT + _GIVING]
        """Words that any worker may write: see giving.py."""
        self.listers = memoryview(self._map)[_LISTERS_AT:]
        """Bytes that any worker may write: see listers.py."""
        self.posts = [Post(self.words, worker) for worker in range(WORKERS_MAX)]

    @property
    def paused(self) -> bool:
        """Whether the gate is shut: workers must not read."""
        return bool(self.words[PAUSE])

    @paused.setter
    def paused(self, value: bool) -> None:
        self.words[PAUSE] = value

    def waits(self) -> tuple[int, int]:
        """Return how many requests had to wait for the disk, and for how long in all, in ns."""
        waits = [post.waits for post in self.posts]
        return sum(count for count, _ in waits), sum(time_ns for _, time_ns in waits)

    @property
    def init_reply(self) -> bytes:
        """What the kernel was answered to INIT; nothing before."""
        return bytes(self._map[_REPLY_AT : _REPLY_AT + self.words[REPLY_BYTES]])

    @init_reply.setter
    def init_reply(self, reply: bytes) -> None:
        assert len(reply) <= _PAGE - _REPLY_AT
        self._map[_REPLY_AT : _REPLY_AT + len(reply)] = reply
        self.words[REPLY_BYTES] = len(reply)
