"""What supervisor and workers tell each other while they run: one page of shared words, and the answer to INIT.

Owns the page. Must not know requests, nor who acts on what it says.

*Concurrency:* each word is stored in one instruction, and has one process that writes it: the supervisor PAUSE, each
worker the words of its own number; but any worker may write WATCHER. Whoever answers INIT writes the answer, always
the same bytes, before its length.
"""

import mmap
import os

WORKERS_MAX = 16

_REPLY_AT = 2048
_PAGE = 4096
_WORKER_AT = 16  # words, eight for each worker
_WORDS_EACH = 8


class _Word:
    PAUSE = 0
    REPLY_BYTES = 1
    WATCHER = 2


class _Of:
    """The words of one worker."""

    GATE_SINCE_NS = 0
    BEAT_NS = 1
    IN_HAND = 2
    ANSWERED = 3
    READY = 4
    WAITED = 5
    WAITED_NS = 6


class Post:
    """The words of one worker."""

    __slots__ = ("_at", "_words")

    def __init__(self, words: memoryview, worker: int) -> None:
        self._words = words
        self._at = _WORKER_AT + worker * _WORDS_EACH

    def clear(self) -> None:
        """Forget the last worker of that number."""
        for word in range(self._at, self._at + _WORDS_EACH):
            self._words[word] = 0

    def _get(self, word: int) -> int:
        value: int = self._words[self._at + word]
        return value

    @property
    def gate_since_ns(self) -> int:
        """Since when it holds the gate, by the monotonic clock; 0 if it does not."""
        return self._get(_Of.GATE_SINCE_NS)

    @gate_since_ns.setter
    def gate_since_ns(self, value: int) -> None:
        self._words[self._at + _Of.GATE_SINCE_NS] = value

    @property
    def beat_ns(self) -> int:
        """When its loop last had a turn for something else than requests."""
        return self._get(_Of.BEAT_NS)

    @beat_ns.setter
    def beat_ns(self, value: int) -> None:
        self._words[self._at + _Of.BEAT_NS] = value

    @property
    def in_hand(self) -> int:
        """How many requests it has read and not answered."""
        return self._get(_Of.IN_HAND)

    @property
    def answered(self) -> int:
        """How many requests it has answered."""
        return self._get(_Of.ANSWERED)

    def took(self) -> None:
        """Note that it has read one more request."""
        self._words[self._at + _Of.IN_HAND] += 1

    def gave(self) -> None:
        """Note that it has answered a request."""
        words, at = self._words, self._at
        words[at + _Of.IN_HAND] -= 1
        words[at + _Of.ANSWERED] += 1

    def waited(self, time_ns: int) -> None:
        """Note that a request had to wait for the disk for so long."""
        self._words[self._at + _Of.WAITED] += 1
        self._words[self._at + _Of.WAITED_NS] += time_ns

    @property
    def waits(self) -> tuple[int, int]:
        """How many requests had to wait for the disk, and for how long in all."""
        return self._get(_Of.WAITED), self._get(_Of.WAITED_NS)

    @property
    def ready(self) -> bool:
        """Whether it reads the device."""
        return bool(self._get(_Of.READY))

    @ready.setter
    def ready(self, value: bool) -> None:
        self._words[self._at + _Of.READY] = value


class Board:
    """The page; a child process shares it by fork, the next release by its *descriptor*."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("imgfs-board", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, _PAGE)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, _PAGE)
        self._words = memoryview(self._map).cast("Q")
        self.posts = [Post(self._words, worker) for worker in range(WORKERS_MAX)]

    @property
    def paused(self) -> bool:
        """Whether workers must leave the gate alone."""
        return bool(self._words[_Word.PAUSE])

    @paused.setter
    def paused(self, value: bool) -> None:
        self._words[_Word.PAUSE] = value

    @property
    def watcher(self) -> int:
        """The worker, plus 1, that waits for the next request, so that nobody else need wake for it; or 0.

        A hint: two that come at once may both think that they are the one, and one that was killed still stands there.
        """
        return self._words[_Word.WATCHER]

    @watcher.setter
    def watcher(self, value: int) -> None:
        self._words[_Word.WATCHER] = value

    def waits(self) -> tuple[int, int]:
        """Return how many requests had to wait for the disk, and for how long in all, in ns."""
        waits = [post.waits for post in self.posts]
        return sum(count for count, _ in waits), sum(time_ns for _, time_ns in waits)

    @property
    def init_reply(self) -> bytes:
        """What the kernel was answered to INIT; nothing before."""
        return bytes(self._map[_REPLY_AT : _REPLY_AT + self._words[_Word.REPLY_BYTES]])

    @init_reply.setter
    def init_reply(self, reply: bytes) -> None:
        assert len(reply) <= _PAGE - _REPLY_AT
        self._map[_REPLY_AT : _REPLY_AT + len(reply)] = reply
        self._words[_Word.REPLY_BYTES] = len(reply)
