"""Make a tree of images that are like photos in size, entropy and age: the sample for `make run`, the tests and bench/.

Usage: make_photos.py DIRECTORY [--count N] [--seed N]. The same arguments make the same pictures.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

# The long side in pixels is drawn between these, small ones more often: 5 KB thumbnails to camera pictures of a few MB.
SIDES = (260, 3600)
ALBUMS = ["2021/garden", "2022/Île de Ré", "2023/city at night", "2024/mountains"]
PNG_SHARE = 0.08


def clouds(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return height x width floats around 0: noise at every scale, as in skies, leaves and walls."""
    field = np.zeros((height, width), np.float32)
    for cells in 2 ** np.arange(1, 10):
        coarse = rng.standard_normal((max(2, cells * height // width), cells), dtype=np.float32)
        field += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)) / cells**0.8
    return field


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return a landscape: a sky with a sun, a ridge, a foreground, and the grain of a sensor."""
    sky, ground = rng.uniform([[110], [50]], [[210], [150]], (2, 3)).astype(np.float32)
    y, x = np.ogrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    y, x = y.astype(np.float32), x.astype(np.float32)
    below = y > 0.55 + 0.12 * clouds(rng, width, 2)[0]
    glow = 90 * np.exp(-12 * (x - rng.uniform(0, 1)) ** 2) * np.exp(-12 * (y - 0.2) ** 2)
    shade = np.where(below, 45, 18) * clouds(rng, width, height) + np.where(below, 0, glow)
    shade += rng.uniform(0.5, 12) * rng.standard_normal((height, width), dtype=np.float32)
    light = np.where(below, 0.4 + 0.6 * y, 1.1 - 0.5 * y)
    channels = [np.clip((np.where(below, g, s) + shade) * light, 0, 255) for s, g in zip(sky, ground, strict=True)]
    return Image.merge("RGB", [Image.fromarray(channel.astype(np.uint8)) for channel in channels])


def make_photo(rng: np.random.Generator, directory: Path, number: int) -> None:
    """Write photo *number* into an album under *directory*, with the time it was taken as its mtime."""
    side = int(np.exp(rng.uniform(*np.log(SIDES))))
    width, height = (side, side * 3 // 4) if rng.random() < 0.7 else (side * 3 // 4, side)
    image = picture(rng, width, height)
    taken = datetime(2021, 5, 1, tzinfo=UTC) + timedelta(seconds=int(rng.integers(4 * 365 * 86400)))
    album = directory / ALBUMS[number % len(ALBUMS)]
    album.mkdir(parents=True, exist_ok=True)
    if side < 1600 and rng.random() < PNG_SHARE:
        path = album / f"screen_{number:04}.png"
        image.save(path)
    else:
        path = album / f"IMG_{number:04}.jpg"
        exif = Image.Exif()
        exif[ExifTags.Base.DateTime] = f"{taken:%Y:%m:%d %H:%M:%S}"
        image.save(path, quality=int(rng.integers(70, 95)), exif=exif)
    taken_ns = int(taken.timestamp()) * 10**9 + int(rng.integers(10**9))
    os.utime(path, ns=(taken_ns, taken_ns))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tree of images that are like photos.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    def make(number: int) -> None:
        make_photo(np.random.default_rng([arguments.seed, number]), arguments.directory, number)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, range(arguments.count)))


if __name__ == "__main__":
    main()
