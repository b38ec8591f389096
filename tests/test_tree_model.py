"""A tree on a real mount, the same on XFS, and a model of both agree after any changes, also when mounted again.

IMGFS_SOAK=1 lets four processes at once take 100,000 steps each, instead of some hundreds.
"""

import itertools

import pytest
from exerciser import SOAK, Model, exercisers
from proving_ground import Ground, try_steps
from tree_model import TreeModel

pytestmark = [pytest.mark.mount, pytest.mark.root]

EXAMPLES = 500 if SOAK else 30
REMOUNTED_EXAMPLES = 50 if SOAK else 5
STEPS = 100_000 if SOAK else 800
DEADLINE_S = 3000 if SOAK else 100


def test_any_steps(ground: Ground) -> None:
    models = try_steps(ground, TreeModel, EXAMPLES)
    ground.mount_again()
    for model in models:
        model.check()


def test_any_steps_before_and_after_a_new_mount(ground: Ground) -> None:
    """Half of the times the daemon is killed."""
    kill = itertools.cycle([True, False])

    def mount_again(model: Model) -> None:
        ground.mount_again(kill=next(kill))
        model.check()

    models = try_steps(ground, TreeModel, REMOUNTED_EXAMPLES, mount_again)
    for model in models:
        model.check()


def test_four_at_once(ground: Ground) -> None:
    with exercisers(TreeModel, ground.directories, STEPS) as running:
        running.wait(DEADLINE_S)
        ground.mount_again()
        running.finish(DEADLINE_S)
