"""Benches run to their end on tiny numbers and leave sane JSON and nothing else; what they measure is not judged."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.__main__ import BENCHES
from bench.needles import image_data, image_name
from bench.result import Result, put_into
from bench.stores import make_large_store
from imgfs.check import check_volumes
from imgfs.settings import MIB
from imgfs.store import ROOT, Store
from imgfs.survey import Damage

PROJECT = Path(__file__).parent.parent
DEADLINE_S = 100.0


@pytest.mark.mount
@pytest.mark.root
@pytest.mark.parametrize("name", BENCHES)
def test_tiny_bench(name: str, site: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", name, "--tiny", "--directory", site, "--results", tmp_path]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, cwd=PROJECT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["bench"] == name
    assert found["size"] == "tiny"
    assert found["machine"]["kernel"].startswith("Linux ")
    assert found["rows"]
    for row in found["rows"]:
        figures = [row[system][key] for system in ("imgfs", "xfs") if system in row for key in ("median", "min", "max")]
        assert all(math.isfinite(figure) for figure in figures), row
    assert not [left for left in os.listdir(site) if left.startswith("imgfs-bench-")]


def test_page_has_a_place_for_each_table() -> None:
    page = (PROJECT / "docs" / "performance.md").read_text()
    for name in BENCHES:
        result = Result(name, "title")
        result.add("what", "unit", 1.0, [2.0])
        changed = put_into(page, result.as_json({"cpu": "a cpu"}, "full"))
        assert "| what | 1.00 unit | 2.00 unit | 0.50 |" in changed
        assert put_into(changed, result.as_json({"cpu": "a cpu"}, "full")) == changed


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
            inode = store.resolve(_path(directories)(number))
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


def _path(directories: int) -> Callable[[int], bytes]:
    if directories == 1:
        return image_name
    return lambda number: b"d%06d/%s" % (number % directories + ROOT + 1, image_name(number))
