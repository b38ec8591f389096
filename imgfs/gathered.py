"""Images that an import has read and that are not in the store yet: they go in many at a time.

Owns what is waiting, and what the import has counted of it too soon. Must not know files.

*Concurrency:* see `transfer`.
"""

from collections.abc import Callable

from imgfs.batch import IMAGES_AT_ONCE, NewImage
from imgfs.errors import ImgfsError
from imgfs.store import Store
from imgfs.transfer import Tally

# Waiting bytes: few enough to be in the processor's cache still when they are written.
_BYTES_MAX = 1 << 20


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

    def __bool__(self) -> bool:
        return bool(self._images)

    def add(self, image: NewImage, path: bytes) -> None:
        """Let *image*, which was read from *path*, be stored with the next `flush`."""
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
