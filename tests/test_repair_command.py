"""`imgfs check --repair`: what it says, asks and returns; on real files, also where it is killed."""

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from command_line import Run, flip, place_of, volume_file
from crafted import PATH, SETTINGS
from crash_model import Clock, without_index
from damage_model import Sample, closed_store, random_store
from killed_store import MortalDisk, die
from mortal import Life, in_process, status_of
from powercut import SimulatedDisk
from repairs import data, repaired
from snapshots import snapshot
from test_repair_files import CONTENTS, everything_wrong

from imgfs.errors import EXIT_BUSY, EXIT_DAMAGED, EXIT_FAILURE, EXIT_OK, EXIT_REPAIRED, EXIT_USAGE
from imgfs.repair import Repair
from imgfs.store import Store


def written(disk: SimulatedDisk, path: Path) -> Path:
    """Return the path of the store on *disk*, as real files below *path*."""
    for each in disk.paths():
        file = path / each.removeprefix(f"{PATH}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(disk.content(each))
    return path


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    return written(everything_wrong(), tmp_path / "wrong")


# -- the command ---------------------------------------------------------------------------------------------------


def test_it_says_what_it_did_and_then_that_there_is_nothing_to_do(wrong: Path, run: Run) -> None:
    before = files(wrong)
    dry = run("check", "--repair", "-n", wrong)
    # There may be a lock file, which says nothing.
    assert {name: text for name, text in files(wrong).items() if name != "lock"} == before
    told = [line for line in dry.out.splitlines() if line.startswith("to do: ")]
    done = run("check", "--repair", "--yes", wrong)
    assert done.code == EXIT_REPAIRED
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[:-1] == [line.replace("to do", "done", 1) for line in told]
    assert len(told) == 8
    assert lines[-1].startswith("nothing is damaged: checked ")
    again = run("check", "--repair", wrong)
    assert (again.code, again.err) == (EXIT_OK, "")
    assert again.out.splitlines()[-1] == "there is nothing to repair"
    plain = run("check", wrong)
    assert (plain.code, plain.err) == (EXIT_OK, "")


def test_a_plain_check_finds_contradictions_and_repairs_none(wrong: Path, run: Run) -> None:
    (wrong / "volumes" / "00000001.idx").touch()
    for _ in range(2):
        done = run("check", wrong)
        assert done.code == EXIT_DAMAGED
        assert "slot was used again while they were there; imgfs check --repair puts that right\n" in done.err


@pytest.mark.parametrize(("answer", "code"), [("y\n", EXIT_REPAIRED), ("n\n", EXIT_FAILURE), ("", EXIT_FAILURE)])
def test_it_asks_before_bytes_are_lost(
    filled: Path, run: Run, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    last = max((filled / "volumes").glob("*.vol"))
    size = last.stat().st_size
    with last.open("ab") as volume:
        volume.write(b"half a needle" * 10)
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    done = run("check", "--repair", filled)
    where = f"cut away 130 bytes behind the end of volume {int(last.stem)}, at {size:,}"
    assert done.err == f"imgfs: {where}? [y/N] "
    assert done.code == code
    assert last.stat().st_size == (size if code == EXIT_REPAIRED else size + 130)
    assert (f"left as it is: {where}\n" in done.out) == (code == EXIT_FAILURE)


def test_damaged_images_stay_and_are_named(filled: Path, run: Run) -> None:
    place = place_of(filled, "album 0/IMG_0004.jpg", run)
    flip(volume_file(filled, place["volume"]), place["data_offset"] + 9)
    flip(volume_file(filled, 1), 4096 + 20)
    for result in ("done: volume 1: the second copy of its header was damaged: written again", "there is nothing"):
        done = run("check", "--repair", filled)
        assert done.code == EXIT_DAMAGED
        assert done.err.count("\n") == 1
        assert "album 0/IMG_0004.jpg: the data does not match its checksum" in done.err
        assert result in done.out


def test_a_store_in_use_and_options_alone_are_refused(filled: Path, run: Run) -> None:
    with Store.open(str(filled)):
        for options in ([], ["-n"]):
            done = run("check", "--repair", *options, filled)
            assert done.code == EXIT_BUSY
            assert f"{filled} is in use" in done.err
    assert run("check", "-n", filled).code == run("check", "-y", filled).code == EXIT_USAGE


# -- killed --------------------------------------------------------------------------------------------------------


def test_killed_at_any_step_of_it_the_next_repair_finishes(wrong: Path, tmp_path: Path) -> None:
    """... by SIGKILL, in the middle of a write where it is one; on real files."""
    step = 0
    while True:
        copy = tmp_path / "copy"
        shutil.copytree(wrong, copy)
        life = Life(step, torn=True, end=die)

        def run(path: Path = copy, life: Life = life) -> None:
            with Repair(str(path), MortalDisk(life), SETTINGS, agree=lambda _: True).run():
                pass

        status = status_of(in_process(run))
        assert status == 0 or os.WIFSIGNALED(status), "the repair failed"
        with Repair(str(copy), settings=SETTINGS, agree=lambda _: True).run() as store:
            seen = snapshot(store)
        assert sorted(data(seen).values()) == CONTENTS, f"step {step}"
        again = Repair(str(copy), settings=SETTINGS)
        with again.run() as store:
            assert store.contradictions() == []
        assert (again.done, again.left) == ([], [])
        shutil.rmtree(copy)
        if not status:
            break
        step += 1
    assert step > 30


# -- stores of every kind ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patch:
        yield Clock(patch)


@pytest.mark.parametrize("seed", range(6))
def test_no_store_that_was_used_is_found_contradictory(clock: Clock, seed: int) -> None:
    sample = random_store(clock, seed, closed=seed % 2 == 0)
    with Store.open(PATH, disk=sample.disk.copy(), settings=SETTINGS, writable=False) as store:
        assert store.contradictions() == []
    done, seen = repaired(sample.disk)
    assert done == []
    assert seen.keys() == sample.wanted.keys()


def lost_bytes(sample: Sample, disk: SimulatedDisk) -> set[bytes]:
    """Return the bytes of images that lie in needles of which something differs on *disk*."""
    lost = set()
    for at in sample.needles:
        before, after = (each.content(at.path)[at.offset : at.end] for each in (sample.disk, disk))
        if before != after:
            data = at.parts()["data"]
            lost.add(sample.disk.content(at.path)[data.start : data.stop])
    return lost


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_damaged_what_is_whole_is_there(clock: Clock, seed: int, index: bool) -> None:
    """Blocks of zeros, flipped bits, cut files: each image whose needle is whole is there, byte by byte."""
    random = Random(seed)
    sample = closed_store(clock)
    disk = sample.disk.copy()
    paths = sorted({at.path for at in sample.needles})
    for _ in range(random.choice((1, 2, 5))):
        path = random.choice(paths)
        content = bytearray(disk.content(path))
        at = random.randrange(8192, len(content))
        match random.choice(("zeros", "flip", "cut")):
            case "zeros":
                start = at // 512 * 512
                content[start : start + 512] = bytes(len(content[start : start + 512]))
            case "flip":
                content[at] ^= 1 << random.randrange(8)
            case "cut":
                del content[at:]
        disk.set_content(path, bytes(content))
    if not index:
        without_index(disk)
    wanted = {node.data for path, node in sample.wanted.items() if node.data and path} - lost_bytes(sample, disk)
    repair = Repair(PATH, disk, SETTINGS, agree=lambda _: True)
    with repair.run() as store:
        seen = snapshot(store, damaged=True)
    assert wanted <= set(data(seen).values())
    again = Repair(PATH, disk, SETTINGS)
    with again.run() as store:
        assert snapshot(store, damaged=True) == seen
    assert (again.done, again.left) == ([], [])
