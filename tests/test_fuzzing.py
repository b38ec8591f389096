"""A short part of what `make soak-fuzz` does at length: stores with any damage or lie in their files, and all parsers.

What reads bytes from outside, and how it is fuzzed: docs/crash.md.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from unittest.mock import ANY

import pytest
from cases import Seed
from fuzzing import Hang, bounded, make_case, run, run_bounded
from parsers import PARSERS
from seeds import seeds

CASES = 120  # in each of the parts, which xdist may run beside each other
PARTS = 5


@pytest.fixture(scope="module")
def made() -> Iterator[list[Seed]]:
    with seeds() as stores, bounded():
        yield stores


@pytest.mark.parametrize("part", range(PARTS))
def test_stores_with_any_damage(made: list[Seed], part: int) -> None:
    outcomes = {run_bounded(made, number) for number in range(part * CASES, (part + 1) * CASES)}
    assert "served" in outcomes


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__.strip("_"))
def test_each_parser(parser: Callable[[Random], None], made: list[Seed]) -> None:
    for number in range(400):
        parser(Random(number))


def failures(made: list[Seed], kind: str = "") -> Iterator[str]:
    """Yield what is wrong with cases, one after the other; of those to which that *kind* of thing was done."""
    for number in range(5000):
        log = make_case(made, number)[0].log
        if kind and not any(line.startswith(kind) for line in log):
            continue
        try:
            run(made, number)
        except (Exception, Hang) as error:
            yield f"{type(error).__name__}: {error}"


def test_wrong_bytes_would_be_noticed(made: list[Seed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgfs.image_reading.checksums", lambda data: ANY)
    assert any("wrong bytes" in text for text in failures(made))


def test_what_is_believed_too_easily_would_be_noticed(made: list[Seed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgfs.recover.sound_records", lambda *_: True)
    assert any(failures(made, "index lies"))


def test_a_number_is_one_case() -> None:
    """... in every process, or a failure could not be looked at again."""
    program = (
        "import sys, hashlib; sys.path[:0] = sys.argv[1:]\n"
        "from fuzzing import make_case\n"
        "from seeds import seeds\n"
        "with seeds() as made:\n"
        "    cases = [make_case(made, number)[0] for number in range(50)]\n"
        "    files = [sorted((path, bytes(data)) for path, data in case.files.items()) for case in cases]\n"
        "    print(hashlib.sha256(repr(files).encode()).hexdigest())\n"
    )
    here = Path(__file__).parent
    said = {
        subprocess.run(
            [sys.executable, "-c", program, str(here), str(here.parent)],
            env=os.environ | {"PYTHONHASHSEED": str(number)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for number in (1, 2)
    }
    assert len(said) == 1
    assert len(said.pop()) == 65
