"""An image on a real mount, the same on XFS, and a model of both agree on all that is read, written, mapped and cut.

IMGFS_SOAK=1 lets four processes at once take 100,000 steps each, instead of some hundreds.
"""

import random

import pytest
from exerciser import SOAK, exercisers
from file_model import FileModel, SparseBytes
from proving_ground import Ground, try_steps

pytestmark = [pytest.mark.mount, pytest.mark.root]

EXAMPLES = 500 if SOAK else 25
STEPS = 100_000 if SOAK else 600
DEADLINE_S = 3000 if SOAK else 100


def test_any_steps(ground: Ground) -> None:
    models = try_steps(ground, FileModel, EXAMPLES)
    for kill in (False, True):
        ground.mount_again(kill=kill)
        for model in models:
            model.check()


def test_four_at_once(ground: Ground) -> None:
    with exercisers(FileModel, ground.directories, STEPS) as running:
        running.wait(DEADLINE_S)
        ground.mount_again()
        running.finish(DEADLINE_S)


def test_the_model_itself() -> None:
    """Pages and zeros are as good as one array."""
    chance, sparse, plain = random.Random(1), SparseBytes(), bytearray()
    for _ in range(3000):
        offset, data = chance.randrange(50_000), chance.randbytes(chance.choice([0, 1, 100, 4096, 9000]))
        if chance.random() < 0.3:
            sparse.resize(offset)
            plain[offset:] = bytes(max(0, offset - len(plain)))
        else:
            sparse.write(offset, data)
            plain += bytes(max(0, offset - len(plain))) if data else b""
            plain[offset : offset + len(data)] = data
        assert sparse.size == len(plain)
        assert sparse.read(offset, 10_000) == plain[offset : offset + 10_000]
    assert sparse.read(0, 100_000) == plain
