"""What everyday operations cost in FUSE requests; each costs two switches between processes, so none may creep in.

The operations are those of `bench/requests.py`. A count that grew on purpose is changed here and in
`docs/performance.md` (`make bench`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mounted import PROJECT

pytestmark = [pytest.mark.mount, pytest.mark.root]

# Ten seconds on a machine with nothing else to do.
DEADLINE_S = 120.0
# Somebody else who drops the caches of the machine meanwhile costs requests; the bench says where.
TRIES = 3

# Requests for each image, of every kind that comes for each.
WRITE = {"lookup": 1, "create": 1, "write": 1, "flush": 1, "release": 1, "getattr": 1}
COPY = {"setattr": 2}
SERVE = {"open": 1, "release": 1}
RSYNC = WRITE | {"lookup": 3, "open": 1, "flush": 1, "release": 2, "getattr": 3, "setattr": 3, "rename": 1}
PER_IMAGE = {
    "`cp -r` in": WRITE,
    "`cp -a` in": WRITE | COPY,
    "`rsync -a` in": RSYNC,
    "`cp -r` over the same names": {"open": 1, "write": 1, "flush": 1, "release": 1, "getattr": 2},
    "GET of an image that is new to the kernel": SERVE | {"lookup": 1},
    "GET of an image that was read once": SERVE,
    "GET of a known image": SERVE,
    "404, new to the kernel": {"lookup": 1},
    "404 again": {},
    "`ls -lR`, new to the kernel": {},
    "`ls -lR` again": {},
    "`find`, new to the kernel": {},
    "`rsync -a` again, new to the kernel": {"lookup": 1},
    "`rsync -a` again": {},
    "upload: write a temporary file, rename it": WRITE | {"lookup": 2, "getattr": 2, "rename": 1},
    "`rm -rf`": {"getattr": 1, "unlink": 1},
}
# What extended attributes add: before a write the kernel asks for `security.capability`; cp and ls ask for ACLs.
WITH_XATTR = {
    "`cp -r` in": {"getxattr": 1},
    "`cp -a` in": {"getxattr": 1, "setxattr": 1},
    "`rsync -a` in": {"getxattr": 1},
    "`cp -r` over the same names": {"getxattr": 2},
    "`ls -lR`, new to the kernel": {"getxattr": 1},
    "`ls -lR` again": {"getxattr": 1},
    "upload: write a temporary file, rename it": {"getxattr": 1},
}


def _counted(site: Path, results: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "bench", "requests", "--tiny", "--directory", site, "--results", results]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, cwd=PROJECT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parameters: dict[str, object] = json.loads((results / "requests.json").read_text())["parameters"]
    return parameters


def _grown(found: dict[str, object]) -> dict[str, str]:
    """Return what is more than it may be: by operation and kind of request."""
    images, disturbed = found["images"], found["disturbed"]
    assert isinstance(images, int)
    assert isinstance(disturbed, list)
    # Requests for the directories and for the mount itself: fewer than one for each image.
    once = images - 1
    grown = {}
    for what in PER_IMAGE.keys() - disturbed:
        for options, more in (("noxattr", {}), ("xattr", WITH_XATTR.get(what, {}))):
            counts = found.get(what, found.get(f"{what}, `{options}`"))
            assert isinstance(counts, dict)
            may = PER_IMAGE[what] | more
            for handler, count in counts.items():
                if count > may.get(handler, 0) * images + once:
                    grown[f"{what}, {options}: {handler}"] = f"{count} for {images} images"
    return grown


@pytest.mark.timeout(DEADLINE_S * TRIES + 30)
def test_no_operation_costs_more_requests_than_it_did(site: Path, tmp_path: Path) -> None:
    disturbed = set(PER_IMAGE)
    for _ in range(TRIES):
        found = _counted(site, tmp_path)
        assert _grown(found) == {}
        now = found["disturbed"]
        assert isinstance(now, list)
        disturbed &= set(now)
        if not disturbed:
            break
    assert len(disturbed) < len(PER_IMAGE) / 2, "too much else is going on here"
    assert not [left for left in os.listdir(site) if left.startswith("imgfs-bench-")]


def test_growth_is_noticed() -> None:
    """The test above can fail: one request more for each image, of a kind that came before or of another."""
    images = 16
    found: dict[str, object] = {"images": images, "disturbed": []}
    for what, per_image in PER_IMAGE.items():
        found[what] = {handler: count * images + images - 1 for handler, count in per_image.items()}
    assert _grown(found) == {}
    assert _grown({what: {"lookup": 999} for what in PER_IMAGE} | {"images": images, "disturbed": [*PER_IMAGE]}) == {}
    for what, per_image in PER_IMAGE.items():
        for handler in [*per_image, "fsync"]:
            counts = dict.fromkeys(per_image, 0) | {handler: (per_image.get(handler, 0) + 1) * images}
            assert [key.split(": ")[-1] for key in _grown(found | {what: counts})] == [handler, handler]
