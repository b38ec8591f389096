"""Images that an import has read and that are not in the store yet: they go in many at a time.

Owns what is waiting, and what the import has counted of it too soon. Must not know files.

*Concurrency:* see `transfer`.
"""

from collections.abc import Callable

from imgfs.batch import IMAGES_AT_ONCE, NewImage
from imgfs.errors import ImgfsError
from imgfs.log import SMALL_BYTES
from imgfs.store import Store
from imgfs.transfer import Tally

# Waiting bytes: few enough to be in the processor's cache still when they are written.
_BYTES_MAX = 512 << 10


class Gathered:
    """What waits to be stored."""

    def __init__(
        self, store: Store, tally: Tally, one_only: tuple[type[ImgfsError], ...], skip: Callable[[bytes, str], None]
    ) -> None:
        """*one_only* are the errors that concern a single image: it is not stored, and *skip* hears its path and why.

        Images count in *tally* when they are added; those that are not stored in the end are taken out again.
        """
        self._store = store
        self._tally = tally
        self._one_only = one_only
        self._skip = skip
        self._images: list[NewImage] = []
        self._paths: list[bytes] = []
        self._data_bytes = 0
        # One place for the bytes of all that wait: to free and ask for memory again for each takes more than to read.
        self._buffer = memoryview(bytearray(_BYTES_MAX + SMALL_BYTES))

    def room(self, size: int) -> memoryview:
        """Return where the *size* bytes, at most a MiB, of the image that is added next can be read to."""
        return self._buffer[self._data_bytes : self._data_bytes + size]

    def add(self, image: NewImage, path: bytes) -> None:
        """Let *image*, which was read from *path* into `room`, be stored with the next `flush`."""
        self._images.append(image)
        self._paths.append(path)
        self._data_bytes += len(image.data)
        self._tally.images += 1
        self._tally.data_bytes += len(image.data)

    def is_full(self) -> bool:
        """Return whether it is time for a `flush`."""
        return self._data_bytes >= _BYTES_MAX or len(self._images) >= IMAGES_AT_ONCE

    def flush(self) -> None:
        """Store all that waits.

        Raises:
            As `Store.put_new`; what is not in the store then is forgotten.
        """
        images, paths = self._images, self._paths
        self._images, self._paths, self._data_bytes = [], [], 0
        done = 0
        try:
            while done < len(images):
                try:
                    done += self._store.put_new(images[done:])
                except self._one_only as error:
                    self._uncount(images[done])
                    self._skip(paths[done], str(error))
                    done += 1
        except BaseException:
            for image in images[done:]:
                self._uncount(image)
            raise

    def _uncount(self, image: NewImage) -> None:
        self._tally.images -= 1
        self._tally.data_bytes -= len(image.data)
