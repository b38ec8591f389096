"""Hot reads: open, read and close of images that are in memory, by one client and by four."""

from dataclasses import dataclass

from bench.lineup import ALL, Lineup, line_up
from bench.measure import reads_per_second
from bench.result import OURS, Result
from bench.site import Site
from bench.systems import Imgfs, ImgfsOneWorker, ImgfsTwoWorkers, System
from imgfs.mount import default_workers

_IMAGE_BYTES = 20_000
_CLIENTS = (1, 4)
_OURS = (ImgfsOneWorker, ImgfsTwoWorkers)


@dataclass(frozen=True)
class _Size:
    images: int
    rounds: int
    window_s: float
    disk_bytes: int


SIZES = {
    "tiny": _Size(50, 1, 0.1, 400 << 20),
    "quick": _Size(300, 2, 0.3, 1 << 30),
    # Many rounds: of five the median still varied by a quarter from run to run.
    "full": _Size(5_000, 12, 1.0, 4 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    parameters: dict[str, object] = {"images": chosen.images, "window_s": chosen.window_s}
    result = Result("hot", "Hot reads", parameters=parameters)
    others = tuple(kind for kind in ALL if kind is not Imgfs)
    with line_up(site, chosen.disk_bytes, result, (*_OURS, *others)) as lineup:
        lineup.fill(chosen.images, _IMAGE_BYTES)
        for clients in _CLIENTS:
            _measure(result, lineup, clients, chosen)
    result.notes.append(
        f"{chosen.images:,} images of {_IMAGE_BYTES:,} bytes, in random order; windows of {chosen.window_s:g} s, "
        f"{chosen.rounds} for each system, in turns. Clients are Python processes on the same cores as what serves. "
        f"Of itself `imgfs mount` takes here: workers {default_workers()}."
    )
    return result


def _measure(result: Result, lineup: Lineup, clients: int, chosen: _Size) -> None:
    def read(system: System, number: int) -> dict[str, float]:
        return {"/s": reads_per_second(system.directory, lineup.names, chosen.window_s, clients, number)}

    samples = lineup.take_turns(chosen.rounds, f"{clients} clients", read)["/s"]
    ours = {kind: samples.pop(kind.name) for kind in _OURS}
    for kind, found in ours.items():
        who = f"{clients} client{'s' * (clients > 1)}, {kind.workers} worker{'s' * (kind.workers != 1)}"
        result.add(f"open, read, close, {who}", "/s", {OURS: found, **samples})
