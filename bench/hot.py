"""Hot reads: open, read and close of images that are in memory, through the mount and from plain XFS."""

import functools
from dataclasses import dataclass
from pathlib import Path

from bench.measure import per_system, read_files, read_for, rounds, say, together
from bench.result import Result
from bench.site import Site, imgfs
from bench.trees import make_tree

_IMAGE_BYTES = 20_000
_CLIENTS = (1, 4)


@dataclass(frozen=True)
class _Size:
    images: int
    rounds: int
    window_s: float
    disk_bytes: int


SIZES = {
    "tiny": _Size(50, 1, 0.1, 400 << 20),
    "quick": _Size(2_000, 5, 1.0, 512 << 20),
    "full": _Size(20_000, 9, 3.0, 2 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    result = Result("hot", "Hot reads", parameters={"images": chosen.images, "window_s": chosen.window_s})
    with site.disk(chosen.disk_bytes) as disk:
        plain = disk.path / "plain"
        names = make_tree(plain, chosen.images, _IMAGE_BYTES)
        store = site.make_store(disk.path / "store")
        imgfs("import", "--quiet", plain, store)
        with site.mounted(store) as mounted:
            tops = {"imgfs": mounted.point, "xfs": plain}
            for top in tops.values():
                read_files(top, names)
            for clients in _CLIENTS:
                _measure(result, tops, names, clients, chosen)
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes, in random order; windows of {chosen.window_s:g} s, "
        f"{chosen.rounds} for each system, in turns. Clients are Python processes on the same cores as the daemon."
    )
    return result


def _measure(result: Result, tops: dict[str, Path], names: list[str], clients: int, chosen: _Size) -> None:
    samples: dict[str, list[float]] = {"imgfs": [], "xfs": []}
    for number, order in rounds(chosen.rounds, ("imgfs", "xfs")):
        for system in order:
            jobs = [
                functools.partial(read_for, tops[system], names, chosen.window_s, number * clients + client)
                for client in range(clients)
            ]
            seconds, counts = together(jobs)
            samples[system].append(sum(counts) / seconds)
            say(f"round {number + 1}, {clients} clients, {system}: {sum(counts) / seconds:,.0f} /s")
    who = f"{clients} client" + ("s" if clients > 1 else "")
    result.add(f"open, read, close, {who}", "/s", *per_system(samples))
