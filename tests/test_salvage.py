"""`imgfs salvage` brings out of a damaged image what a checksum still speaks for, and says what is not right."""

import os
import random
import re
from pathlib import Path

import pytest
from command_line import Run
from mounted import MIB, Mounted, failure, imgfs
from store_parts import FailingDisk, flip, put

from imgfs.direct import BLOCK_BYTES
from imgfs.errors import EXIT_DAMAGED, EXIT_FAILURE
from imgfs.salvage import salvage
from imgfs.store import ROOT, Store, make_store

SIZES = {"small": 20_000, "one": MIB, "large": 3 * MIB + 5, "empty": 0}
NAME = "a rather long name, which was given later.jpg"


@pytest.fixture
def images(tmp_path: Path) -> dict[str, bytes]:
    """Make a store at `store` with an image of each size; return what they hold. One was renamed since."""
    chance = random.Random(5)
    content = {name: chance.randbytes(size) for name, size in SIZES.items()}
    path = str(tmp_path / "store")
    make_store(path, uid=0, gid=0)
    with Store.open(path) as store:
        for name, data in content.items():
            put(store, ROOT, name.encode(), data)
        store.rename(ROOT, b"large", ROOT, NAME.encode())
    content[NAME] = content.pop("large")
    return content


class Lies:
    """Where an image lies in its volume."""

    def __init__(self, path: Path, name: str) -> None:
        self.volume = path / "volumes" / "00000001.vol"
        with Store.open(str(path), writable=False) as store:
            where = store.locate(store.resolve(name.encode()))
        self.header, self.data, self.size = where.offset, where.data_offset, where.size
        self.footer = self.data + self.size


def bad_ranges(text: str) -> list[tuple[int, int]]:
    return [(int(start), int(end)) for start, end in re.findall(r"bytes (\d+) to (\d+)$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("name", ["small", "one", NAME, "empty"])
def test_a_whole_image_comes_out_whole(name: str, images: dict[str, bytes], tmp_path: Path, run: Run) -> None:
    done = run("salvage", tmp_path / "store", name, tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"salvaged {tmp_path / 'out'}: {len(images[name]):,} bytes, all right\n"
    assert (tmp_path / "out").read_bytes() == images[name]


@pytest.mark.parametrize("options", [[], ["--zero"]])
def test_the_good_chunks_of_a_large_image_come_out(
    options: list[str], images: dict[str, bytes], tmp_path: Path, run: Run
) -> None:
    path, data = tmp_path / "store", bytearray(images[NAME])
    lies = Lies(path, NAME)
    for at in (MIB + 7, 2 * MIB - 1, 3 * MIB):
        flip(lies.volume, lies.data + at)
        data[at] ^= 1
    done = run("salvage", *options, path, NAME, tmp_path / "out")
    assert done.code == EXIT_DAMAGED
    assert bad_ranges(done.err) == [(MIB, 2 * MIB - 1), (3 * MIB, 3 * MIB + 4)]
    assert f"{MIB + 5:,} of them damaged" in done.out
    if options:
        data[MIB : 2 * MIB] = bytes(MIB)
        data[3 * MIB :] = bytes(5)
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("name", ["small", "one", NAME])
def test_a_damaged_header_costs_nothing(name: str, images: dict[str, bytes], tmp_path: Path, run: Run) -> None:
    """Wherever it is damaged: the index knows where the image is and how long, the checksum where it begins."""
    path = tmp_path / "store"
    lies = Lies(path, name)
    for number, at in enumerate([*range(lies.header, lies.data, 13), None]):
        before = lies.volume.read_bytes()
        if at is None:
            with open(lies.volume, "r+b") as file:
                os.pwrite(file.fileno(), bytes(lies.data - lies.header), lies.header)
        else:
            flip(lies.volume, at, number % 8)
        out = tmp_path / f"out{number}"
        done = run("salvage", path, name, out)
        assert done.code == 0, f"byte {at}: {done}"
        assert out.read_bytes() == images[name]
        lies.volume.write_bytes(before)


@pytest.mark.parametrize("name", ["small", "one", NAME])
def test_a_damaged_footer_costs_nothing(name: str, images: dict[str, bytes], tmp_path: Path, run: Run) -> None:
    """Each checksum is believed by itself, or by what the others were made of."""
    path = tmp_path / "store"
    lies = Lies(path, name)
    for number, at in enumerate(range(lies.footer, lies.footer + 8 + 4 * (4 if lies.size > MIB else 0))):
        flip(lies.volume, at, number % 8)
        done = run("salvage", path, name, tmp_path / f"out{number}")
        assert done.code == 0, f"byte {at}: {done}"
        assert (tmp_path / f"out{number}").read_bytes() == images[name]
        flip(lies.volume, at, number % 8)


def test_header_and_data_damaged(images: dict[str, bytes], tmp_path: Path, run: Run) -> None:
    path, data = tmp_path / "store", bytearray(images[NAME])
    lies = Lies(path, NAME)
    flip(lies.volume, lies.header + 4)  # what it says of its own length
    flip(lies.volume, lies.data + 100)
    data[100] ^= 1
    done = run("salvage", path, NAME, tmp_path / "out")
    assert bad_ranges(done.err) == [(0, MIB - 1)]
    assert (tmp_path / "out").read_bytes() == data


def test_what_the_disk_cannot_read_is_zeros(images: dict[str, bytes], tmp_path: Path) -> None:
    data = bytearray(images[NAME])
    lies = Lies(tmp_path / "store", NAME)
    block = (lies.data + MIB + MIB // 2) // BLOCK_BYTES * BLOCK_BYTES
    with Store.open(str(tmp_path / "store"), writable=False) as store:
        pieces = list(salvage(store, store.resolve(NAME.encode()), FailingDisk(".vol", {block})))
    assert [piece.good for piece in pieces] == [True, False, True, True]
    start = block - lies.data
    data[start : start + BLOCK_BYTES] = bytes(BLOCK_BYTES)
    assert b"".join(piece.data for piece in pieces) == data


def test_by_its_number_and_what_is_refused(images: dict[str, bytes], tmp_path: Path, run: Run) -> None:
    path, out = tmp_path / "store", tmp_path / "out"
    with Store.open(str(path)) as store:
        inode = store.resolve(b"small")
        store.mkdir(ROOT, b"album", 0o755, 0, 0)
    for text in (str(inode), hex(inode)):
        assert run("salvage", path, text, out).code == 0
        assert out.read_bytes() == images["small"]
        assert "exists; name a new file" in run("salvage", path, text, out).err
        out.unlink()
    for image, why in (("album", "a directory"), ("nothing", "is not in the store"), ("99", "is not in the store")):
        done = run("salvage", path, image, out)
        assert done.code == EXIT_FAILURE
        assert why in done.err
        assert not out.exists()


def test_while_it_is_mounted(mounted: Mounted, tmp_path: Path) -> None:
    data = bytearray(random.Random(1).randbytes(5 * MIB))
    (mounted.point / "large.jpg").write_bytes(data)
    os.sync()
    lies = Lies(mounted.store, "large.jpg")
    flip(lies.volume, lies.data + 2 * MIB)
    flip(lies.volume, lies.header + 50)
    mounted.drop_caches()
    mounted.expected_log.append(r".*inode \S+: the (data|header) of this image is damaged")
    assert failure((mounted.point / "large.jpg").read_bytes) == "EIO"
    said = imgfs("salvage", mounted.store, "large.jpg", tmp_path / "out", code=EXIT_DAMAGED)
    assert bad_ranges(said) == [(2 * MIB, 3 * MIB - 1)]
    data[2 * MIB] ^= 1
    assert (tmp_path / "out").read_bytes() == data
    mounted.check_code = EXIT_DAMAGED
