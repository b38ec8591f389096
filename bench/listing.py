"""Listing: `ls -U` and `ls -l` of one huge directory, `find` over many, warm and cold."""

import functools
from dataclasses import dataclass

from bench.commands import Failed
from bench.commands import run as run_command
from bench.lineup import Lineup, line_up
from bench.measure import say, timed
from bench.neighbours import JuiceFs
from bench.result import Result
from bench.site import Site, touch_memory
from bench.systems import Bindfs, Imgfs, System, Xfs

_KINDS = (Imgfs, Xfs, Bindfs, JuiceFs)
_FULL_SIZED = (Imgfs, Xfs)
_COMMANDS = {1: ("ls -U", "ls -l"), 1000: ("find",)}


@dataclass(frozen=True)
class _Size:
    images: int
    fewer: int
    rounds: int
    disk_bytes: int


SIZES = {
    "tiny": _Size(500, 500, 1, 400 << 20),
    "quick": _Size(20_000, 5_000, 1, 1 << 30),
    "full": _Size(1_000_000, 50_000, 3, 6 << 30),
}


def run(site: Site, size: str) -> Result:
    """Measure it."""
    chosen = SIZES[size]
    parameters: dict[str, object] = {"images": chosen.images, "fewer": chosen.fewer}
    result = Result("listing", "Listing", parameters=parameters)
    for directories in _COMMANDS:
        with line_up(site, chosen.disk_bytes, result, _KINDS) as lineup:
            _measure(result, lineup, directories, chosen)
    smaller = ", ".join(kind.name for kind in _KINDS if kind not in _FULL_SIZED)
    result.notes.append(
        f"{chosen.images:,} images in one directory for `ls`, in 1,000 for `find`; {smaller}: {chosen.fewer:,}, for "
        "they take long. Only names and attributes count: those of imgfs have 32 bytes, the others none. Output goes "
        "nowhere. Cold: taken down, caches dropped, mounted again. Warm: once more."
    )
    return result


def _measure(result: Result, lineup: Lineup, directories: int, chosen: _Size) -> None:
    def images_in(system: System) -> int:
        return chosen.images if isinstance(system, _FULL_SIZED) else chosen.fewer

    def load(system: System) -> None:
        images = images_in(system)
        seconds = timed(lambda: system.load_names(images, directories))
        if not isinstance(system, _FULL_SIZED):
            listed = len(run_command("find", system.directory, "-name", "img_*").splitlines())
            if listed != images:
                raise Failed(f"{listed:,} images are listed, not {images:,}")
        say(f"{system.name} holds {images:,} images in {directories:,} directories, after {seconds:.0f} s")

    def walk(system: System, number: int) -> dict[str, float]:
        figures = {}
        for command in _COMMANDS[directories]:
            for state in ("cold", "warm"):
                if state == "cold":
                    system.drop_caches()
                else:
                    touch_memory()
                seconds = timed(functools.partial(run_command, *command.split(), system.directory, quietly=True))
                figures[f"`{command}`, {state}"] = images_in(system) / seconds
        return figures

    lineup.each(load)
    for what, samples in lineup.take_turns(chosen.rounds, "entries/s", walk).items():
        result.add(what, "entries/s", samples)
