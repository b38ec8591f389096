"""Trees of files of random bytes: what benches copy and read."""

import random
from pathlib import Path

PER_DIRECTORY = 1000


def name_directory(number: int) -> str:
    """Return the name of a directory of images."""
    return f"d{number:06}"


def name_file(number: int) -> str:
    """Return the name of an image."""
    return f"img_{number:08}.jpg"


def names(images: int, per_directory: int = PER_DIRECTORY, depth: int = 1) -> list[str]:
    """Return the path of each image of a tree, relative to its top, so many directories below it."""
    tails = ["/".join(["", *(f"below{level}" for level in range(1, depth)), ""])] * images
    return [name_directory(number // per_directory) + tail + name_file(number) for number, tail in enumerate(tails)]


def make_tree(
    top: Path, images: int, image_bytes: int, per_directory: int = PER_DIRECTORY, depth: int = 1
) -> list[str]:
    """Fill the directory *top* and return the paths of the images in it, relative to it."""
    chance = random.Random(images)
    paths = names(images, per_directory, depth)
    top.mkdir(exist_ok=True)
    for number, name in enumerate(paths):
        if number % per_directory == 0:
            (top / name).parent.mkdir(parents=True)
        (top / name).write_bytes(chance.randbytes(image_bytes))
    return paths
