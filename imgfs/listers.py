"""Who lists directories and looks at nothing but names: for these the kernel is given no attributes.

Owns what is remembered of threads that list, and of which directories the kernel has names alone. Must not know what
an answer looks like, nor who forgets what.

An entry that comes with its attributes spares whoever looks at it a request. But the kernel makes an inode and a name
of it: 7 us, and a kilobyte of memory that nothing needs after a `find` or an `ls`. So a thread that has listed for some
time and looked up nothing gets names alone, until it looks one up. Who looks at every entry looks up none either, while
they come with attributes; so he is tried again now and then, which costs him the entries of one answer.

The kernel keeps listings until the directory changes. Of one with names alone whoever lists the directory next would
have to look up every entry: so the first entry that is looked up is the end of it, and whoever has looked one up gets
the next directories anew.

*Concurrency:* on the loops of all workers, and in their threads, each word and byte stored in one step. All of it are
hints: what two store at once, or who shares a word with another, costs time at most.
"""

# Answers with attributes for a thread that nobody knows, some 800 entries of a large directory each; and for one that
# has looked an entry up.
PATIENCE, PATIENCE_WITH_USER = 32, 1024
_THREADS = 64
_DIRECTORIES = 1 << 14
SHARED_BYTES = 8 * _THREADS + _DIRECTORIES
_LEFT_BITS = 32


class Listers:
    """What one worker knows of those who list."""

    def __init__(self, shared: memoryview | None = None) -> None:
        """All workers of a mount have the same *shared* bytes, SHARED_BYTES of them."""
        shared = memoryview(bytearray(SHARED_BYTES)) if shared is None else shared
        # For each thread, or several by turns: its number, and how many answers with attributes it still gets, plus 1.
        self._threads = shared[: 8 * _THREADS].cast("Q")
        # For each directory, or several together: 1 if the kernel may have names alone.
        self._bare = shared[8 * _THREADS :]
        self._outdated: set[int] = set()

    def wants_names_alone(self, thread: int, directory: int) -> bool:
        """Return whether *thread*, which gets another answer about *directory*, has no use for attributes."""
        if self._left(thread) != 1:
            return False
        self._bare[directory % _DIRECTORIES] = 1
        return True

    def gave_attributes(self, thread: int) -> None:
        """Note that *thread* got an answer with attributes."""
        left = self._left(thread) or PATIENCE + 1
        self._leave(thread, max(left - 1, 1))

    def looked_up(self, thread: int, directory: int) -> None:
        """Note that *thread* has asked for an entry of *directory* which is no directory itself."""
        bare = self._bare[directory % _DIRECTORIES]
        if bare or self._left(thread):
            self._leave(thread, PATIENCE_WITH_USER + 1)
        if bare:
            self._outdated.add(directory)

    def wants_anew(self, thread: int, directory: int) -> bool:
        """Return whether *thread*, which is going to list *directory*, has use for more than the kernel has of it."""
        if self._left(thread) <= PATIENCE + 1:
            return False
        bare = self._bare[directory % _DIRECTORIES]
        self._bare[directory % _DIRECTORIES] = 0
        return bool(bare)

    def outdated(self) -> list[int]:
        """Return the directories whose listing the kernel shall forget, each once."""
        # A copy, made in one step: a thread that looks something up may still add to the old one.
        outdated, self._outdated = list(self._outdated), set()
        for directory in outdated:
            self._bare[directory % _DIRECTORIES] = 0
        return outdated

    def _left(self, thread: int) -> int:
        """Return how many answers with attributes *thread* still gets, plus 1; 0: nothing is known of it."""
        word = self._threads[thread % _THREADS]
        return word & (1 << _LEFT_BITS) - 1 if word >> _LEFT_BITS == thread else 0

    def _leave(self, thread: int, left: int) -> None:
        self._threads[thread % _THREADS] = thread << _LEFT_BITS | left
