"""Trees of files of random bytes: what benches copy and read."""

import random
from pathlib import Path

PER_DIRECTORY = 1000


def names(images: int, per_directory: int = PER_DIRECTORY) -> list[str]:
    """Return the path of each image of a tree, relative to its top."""
    return [f"d{number // per_directory:04}/img_{number:08}.jpg" for number in range(images)]


def make_tree(top: Path, images: int, image_bytes: int, per_directory: int = PER_DIRECTORY) -> list[str]:
    """Fill the new directory *top* and return the paths of the images in it."""
    chance = random.Random(images)
    paths = names(images, per_directory)
    top.mkdir()
    for number, name in enumerate(paths):
        if number % per_directory == 0:
            (top / name).parent.mkdir()
        (top / name).write_bytes(chance.randbytes(image_bytes))
    return paths
