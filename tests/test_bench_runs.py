"""Benches run to their end on tiny numbers and leave sane JSON and nothing else; what they measure is not judged."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from mounted import wait_until

from bench.__main__ import BENCHES
from bench.commands import Failed
from bench.commands import run as run_command
from bench.lineup import ALL, line_up
from bench.measure import read_files, timed
from bench.needles import image_data
from bench.page import fill_in, read_results
from bench.plots import draw
from bench.result import OURS, RESULTS, Result
from bench.site import drop_caches, open_site
from bench.stores import large_store_path, make_large_store
from bench.systems import Bindfs, Passing, System, Xfs
from bench.targets import TARGETS, Target, summary_table
from bench.throttle import capped, no_cap
from bench.trees import make_tree
from bench.watch import within
from imgfs.check import check_volumes
from imgfs.settings import MIB
from imgfs.store import ROOT, Store
from imgfs.survey import Damage

PROJECT = Path(__file__).parent.parent
DEADLINE_S = 100.0


def _command(name: str, site: Path, results: Path, *more: str) -> list[str | Path]:
    return [sys.executable, "-m", "bench", name, "--tiny", "--directory", site, "--results", results, *more]


def _left_of(site: Path) -> list[str]:
    """Return what a bench has left: files, mounts, loop devices, processes."""
    left = [name for name in os.listdir(site) if name.startswith("imgfs-bench-")]
    marker = f"{site}/imgfs-bench-"
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if marker in line]
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            left += [str(file)] if marker in file.read_text() else []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            left += [command] if marker in command else []
    return left


def _run(name: str, site: Path, results: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(
        _command(name, site, results, *more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=PROJECT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    found: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    assert not _left_of(site)
    return found


def _check_figures(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        assert OURS in row["systems"]
        for summary in (*row["systems"].values(), *row["ratios"].values()):
            assert summary["min"] <= summary["median"] <= summary["max"], row
            assert all(math.isfinite(figure) for figure in summary["samples"]), row


@pytest.mark.mount
@pytest.mark.root
@pytest.mark.parametrize("name", BENCHES)
def test_tiny_bench(name: str, site: Path, tmp_path: Path) -> None:
    # Not with all the others each time: the next test has those that take seconds to start.
    others = _here(Bindfs) if name in ("hot", "copying", "ingest", "listing") else []
    found = _run(name, site, tmp_path, "--systems", ",".join(others) or "none")
    assert found["bench"] == name
    assert found["size"] == "tiny"
    assert found["machine"]["kernel"].startswith("Linux ")
    _check_figures(found)
    if not shutil.which("wrk") and name == "web":
        assert "wrk" in found["notes"][0]
        return
    assert found["rows"]
    uncapped = any("with the reads of the disk capped" in note for note in found["notes"])
    for target in TARGETS:
        if target.bench != name or ("capped" in target.row and uncapped):
            continue
        row = target.find(found)
        if row is None and found["parameters"].get("disturbed"):
            continue  # somebody had the kernel forget what it knew, and what that cost does not count
        assert row is not None, target
        if set(target.against) & {"XFS", *others}:
            assert target.measured(found), target


def _here(*kinds: type[System]) -> list[str]:
    return [kind.name for kind in kinds if not kind.missing()]


@pytest.mark.mount
@pytest.mark.root
def test_all_systems_come_and_go(site: Path, tmp_path: Path) -> None:
    """Each is measured, or the result says why it is not; nothing of any is left."""
    found = _run("ingest", site, tmp_path)
    _check_figures(found)
    for row in found["rows"]:
        for kind in ALL:
            noted = any(note.startswith(f"Without {kind.name}: ") for note in found["notes"])
            assert (kind.name in row["systems"]) is not noted, found["notes"]
            assert not kind.missing() or noted
            assert row["systems"].get(kind.name, {"min": 1})["min"] > 0


class _Absent(Bindfs):
    name = "absent"

    @classmethod
    def missing(cls) -> str:
        return "nobody has it"


class _Broken(Bindfs):
    name = "broken"

    def command(self, point: Path) -> list[str | Path]:
        return ["false"]


class _Failing(Passing):
    """Comes up, and fails when it is measured."""

    name = "failing"

    def mount(self) -> None:
        pass

    def unmount(self) -> None:
        pass

    @property
    def directory(self) -> Path:
        return self.below

    def command(self, point: Path) -> list[str | Path]:
        raise NotImplementedError


@pytest.mark.mount
@pytest.mark.root
def test_neighbour_that_fails_is_a_note(site: Path) -> None:
    result = Result("some", "Some")

    def measure(system: System, number: int) -> dict[str, float]:
        if system.name == "failing" and number == 1:
            raise Failed("it broke")
        assert system.directory.is_dir()
        return {"/s": number + 1.0}

    with open_site(str(site)) as here, line_up(here, 400 << 20, result, (Xfs, _Absent, _Broken, _Failing)) as lineup:
        assert lineup.take_turns(3, "looking", measure) == {"/s": {"XFS": [1.0, 2.0, 3.0]}}
    said = " ".join(result.notes)
    assert "Without absent: nobody has it." in said
    assert "Without broken: it failed here" in said
    assert "Without failing: it failed here: it broke." in said
    assert not _left_of(site)


class _Hanging(Passing):
    """A real mount whose server stops answering."""

    name = "hanging"

    def command(self, point: Path) -> list[str | Path]:
        return ["bindfs", "-f", self.below, point]


@pytest.mark.mount
@pytest.mark.root
def test_neighbour_that_hangs_is_a_note(site: Path) -> None:
    """Whether the bench waits in a request that is never answered, or for somebody else."""
    result = Result("some", "Some")
    waits: list[str] = []

    def measure(system: System, number: int) -> dict[str, float]:
        if isinstance(system, _Hanging):
            waits.append("asked")
            os.kill(system.server.pid, signal.SIGSTOP)
            (system.directory / "new").mkdir()
            raise AssertionError("who is stopped has answered")
        if isinstance(system, _Failing):
            waits.append("waited")
            run_command("sleep", "1000")
        return {"/s": number + 1.0}

    with open_site(str(site)) as here, line_up(here, 400 << 20, result, (Xfs, _Hanging, _Failing)) as lineup:
        lineup.deadline_s = 1.0
        assert lineup.take_turns(2, "looking", measure) == {"/s": {"XFS": [1.0, 2.0]}}
    assert waits == ["asked", "waited"]
    said = " ".join(result.notes)
    assert "Without hanging: it failed here" in said
    assert "Without failing: it failed here: it took more than 1 s." in said
    assert not _left_of(site)


def test_step_that_is_in_time_is_not_cut_off() -> None:
    cut: list[str] = []
    with within(0.2, lambda: cut.append("cut")):
        pass
    assert timed(lambda: time.sleep(0.4)) > 0.3
    assert not cut


@pytest.mark.mount
@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_bench_leaves_nothing(number: signal.Signals, site: Path, tmp_path: Path) -> None:
    """However it ends; what it cannot take away once it is killed, the next run does."""
    command = _command("hot", site, tmp_path, "--systems", "bindfs")
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=PROJECT
    ) as bench:
        assert bench.stdout is not None
        # All are up when the first of them has been measured.
        for line in bench.stdout:
            if "round 1" in line:
                break
        assert _left_of(site)
        bench.send_signal(number)
        bench.stdout.read()
        assert bench.wait(DEADLINE_S) != 0
    if number == signal.SIGKILL:
        with open_site(str(site)):
            pass
    # Processes that were killed take a moment to go.
    wait_until(lambda: not _left_of(site), "nothing is left")


@pytest.mark.mount
@pytest.mark.root
def test_capped_disk_is_slow(site: Path) -> None:
    with open_site(str(site)) as here, here.disk(400 << 20) as disk:
        names = make_tree(disk.path / "tree", 30, 5_000)
        if no_cap(disk.device):
            return
        drop_caches()
        with capped(disk.device, 20):
            seconds = timed(lambda: read_files(disk.path / "tree", names))
        # 30 reads or more, 20 a second; the first of them may come at once.
        assert seconds > 0.5


def test_page_has_a_place_for_each_table() -> None:
    page = (PROJECT / "docs" / "performance.md").read_text()
    for name in BENCHES:
        result = Result(name, "title")
        result.add("what", "unit", {OURS: [1.0], "XFS": [2.0]})
        changed = fill_in(page, {name: result.as_json({"cpu": "a cpu"}, "full")})
        assert "| what, unit | 1.00 | 2.00; **0.50x** |" in changed
        assert fill_in(changed, {name: result.as_json({"cpu": "a cpu"}, "full")}) == changed


def test_page_is_made_of_the_results() -> None:
    page = (PROJECT / "docs" / "performance.md").read_text()
    assert fill_in(page, read_results(RESULTS)) == page


def test_target_is_held_against_the_best_of_others_in_each_round() -> None:
    target = Target("it", "some", "row.*", least=2.0, against=("JuiceFS", "SeaweedFS"))
    result = Result("some", "Some")
    result.add("row 1", "/s", [9.0])
    result.add("row 2", "/s", {OURS: [4.0, 6.0], "JuiceFS": [2.0, 1.0], "SeaweedFS": [1.0, 3.0], "XFS": [100.0, 100.0]})
    found = result.as_json({}, "full")
    assert target.measured(found) == [2.0, 2.0]
    assert target.is_met(2.0)
    assert not target.is_met(1.99)
    assert not target.absent(found)
    assert Target("it", "some", "row 1", most=9.0).measured(found) == [9.0]
    assert not Target("it", "some", "row 2", least=1.0, against=("bindfs",)).measured(found)
    assert not Target("it", "some", "another", most=1.0).measured(found)


def test_summary_says_met_or_not() -> None:
    result = Result("copying", "Copying")
    result.add("`cp -r` in", "/s", {OURS: [3.0], "bindfs": [1.0], "JuiceFS": [1.0]})
    result.add("`rm -rf`", "/s", {OURS: [3.0], "bindfs": [6.0]})
    table = summary_table({"copying": result.as_json({}, "full")})
    assert "| `cp -r` in | at least 1.5x bindfs | 3x | yes |" in table
    assert "| 3x | **no**, without SeaweedFS |" in table
    assert "| `rm -rf` of 100,000 | at least 1.3x bindfs | 0.5x | **no** |" in table
    assert "| `rm -rf` of 100,000 | at least 5x the best of JuiceFS, SeaweedFS | | not measured |" in table


def test_plots_are_pictures_of_the_results(tmp_path: Path) -> None:
    result = Result("copying", "Copying")
    result.add("`cp -r` in", "/s", {OURS: [1234.0], "XFS": [98765.0]})
    results = {"copying": result.as_json({}, "full")}
    (path,) = draw(results, tmp_path)
    first = path.read_bytes()
    texts = [element.text for element in ElementTree.fromstring(first).iter("{http://www.w3.org/2000/svg}text")]
    assert {"1,234", "98,765", OURS, "XFS"} <= set(texts)
    assert draw(results, tmp_path) == [path]
    assert path.read_bytes() == first


@pytest.mark.parametrize("directories", [1, 7])
def test_large_store_is_a_store(directories: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = 2_000
    path = tmp_path / "store"
    make_large_store(path, images, directories, volume_bytes_max=MIB // 8)
    with Store.open(str(path), writable=False) as store:
        report = store.report
        assert not report.rebuilt
        assert not report.damage
        assert not report.torn_bytes
        counts = store.counts()
        assert (counts.images, counts.directories) == (images, directories + 1 if directories > 1 else 1)
        assert counts.volumes > 1
        for number in range(images):
            inode = store.resolve(large_store_path(number, directories).encode())
            handle = store.open_image(inode)
            assert bytes(store.read(handle, 0, 1000)) == image_data(number)
            store.release(handle)
        assert sum(1 for _ in store.list(ROOT)) == (directories if directories > 1 else images)
    with Store.open(str(path)) as store:
        assert not [row for row in check_volumes(store._table, store._volumes, store._disk) if isinstance(row, Damage)]
        inode = store.put(ROOT, b"one more", b"x", 1, mode=0o600, uid=0, gid=0, mtime_ns=0)
    with Store.open(str(path)) as store:
        assert store.lookup(ROOT, b"one more") == inode
        assert not store.report.damage
