"""Several systems on one disk, up together, taking turns: what every comparison of them is made with.

A neighbour that cannot be had here, or fails, is a note in the result; imgfs and XFS have to work.
"""

import contextlib
import functools
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from bench.commands import Failed, run
from bench.measure import rounds, say
from bench.neighbours import JuiceFs, SeaweedFs
from bench.result import Result
from bench.site import Site, XfsDisk
from bench.systems import Bindfs, Imgfs, Passthrough, System, Xfs
from bench.trees import PER_DIRECTORY, make_tree
from bench.watch import within

T = TypeVar("T")

# The first one is what all others are compared with.
ALL: tuple[type[System], ...] = (Imgfs, Xfs, Bindfs, Passthrough, JuiceFs, SeaweedFs)
_NEEDED = (Imgfs, Xfs)
# What one system does in one turn takes seconds; to fill it, somewhat more.
STEP_DEADLINE_S = 120.0
# Nothing is left to compare without these.
_PATIENCE = 3


class Lineup:
    """The systems of one comparison; see `line_up`."""

    def __init__(self, site: Site, disk: XfsDisk, result: Result) -> None:
        self.disk = disk
        self.deadline_s = STEP_DEADLINE_S
        self.systems: list[System] = []
        self.names: list[str] = []
        self._few: list[str] = []
        self._site = site
        self._result = result

    def bring_up(self, kind: type[System]) -> System | None:
        """Mount one more system; None, and a note, if that cannot be."""
        if missing := kind.missing():
            self._result.note(f"Without {kind.name}: {missing}.")
            return None
        system = kind(self._site, self.disk)
        self.systems.append(system)
        self._attempt(system, system.mount)
        return system

    def _attempt(self, system: System, call: Callable[[], T]) -> T | None:
        """Return what *call* does; a neighbour for which it fails, or takes too long, is out."""
        try:
            with within(self.deadline_s * (_PATIENCE if isinstance(system, _NEEDED) else 1), system.kill):
                return call()
        except (Failed, OSError, subprocess.SubprocessError) as error:
            if isinstance(system, _NEEDED):
                raise
            say(f"{system.name} failed: {error}")
            self._result.note(f"Without {system.name}: it failed here: {' '.join(str(error).split())[-200:]}.")
            system.close()
            self.systems.remove(system)
            return None

    def each(self, call: Callable[[System], object]) -> None:
        """Do something with every system."""
        for system in list(self.systems):
            self._attempt(system, functools.partial(call, system))

    def fill(
        self, images: int, image_bytes: int, few: int = 0, per_directory: int = PER_DIRECTORY, depth: int = 1
    ) -> None:
        """Put the same images into all; only as many as *few*, if that is given, into those that are slow to fill."""
        xfs = next(system for system in self.systems if isinstance(system, Xfs))
        say(f"{images:,} images of {image_bytes:,} bytes")
        self.names = make_tree(xfs.directory, images, image_bytes, per_directory, depth)
        self._few = self.names[:few] if few else self.names
        short = xfs.directory
        if len(self._few) < images:
            short = self.disk.path / "few"
            short.mkdir()
            tops = sorted({name.partition("/")[0] for name in self._few})
            run("cp", "-r", "--reflink=always", "-t", short, *(xfs.directory / top for top in tops))
            slow = ", ".join(system.name for system in self.systems if system.is_slow)
            self._result.note(f"{slow}: {len(self._few):,} of the {images:,} images, for they take long to fill.")
        self.each(lambda system: system.load(short if system.is_slow else xfs.directory))

    def names_in(self, system: System) -> Sequence[str]:
        """Return the paths of the images that *system* was filled with."""
        return self._few if system.is_slow else self.names

    def drop_out(self, unwanted: Callable[[System], bool]) -> None:
        """Take down those that have no part in what comes."""
        for system in [system for system in self.systems if unwanted(system)]:
            system.close()
            self.systems.remove(system)

    def take_turns(
        self, count: int, what: str, measure: Callable[[System, int], dict[str, float]]
    ) -> dict[str, dict[str, list[float]]]:
        """Let each system be measured once in every round; return figure by figure, system by system, the samples.

        *what* it is about is shown as it goes.
        """
        found: dict[str, dict[str, list[float]]] = {}
        for number, order in rounds(count, list(self.systems)):
            for system in order:
                if system not in self.systems:
                    continue
                figures = self._attempt(system, functools.partial(measure, system, number)) or {}
                for name, figure in figures.items():
                    found.setdefault(name, {}).setdefault(system.name, []).append(figure)
                if figures:
                    shown = ", ".join(f"{figure:,.2f} {name}" for name, figure in figures.items())
                    say(f"{what}, round {number + 1}, {system.name}: {shown}")
        # Each in the order of the systems; who has left has nothing to compare.
        return {
            what: {system.name: samples[system.name] for system in self.systems if system.name in samples}
            for what, samples in found.items()
        }


@contextlib.contextmanager
def line_up(site: Site, disk_bytes: int, result: Result, kinds: Sequence[type[System]] = ALL) -> Iterator[Lineup]:
    """Bring up systems of these kinds on a disk of their own, as far as the run wants them; take them down again."""
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(site.disk(disk_bytes))
        lineup = Lineup(site, disk, result)
        stack.callback(_close, lineup.systems)
        for kind in kinds:
            if site.wants(kind.name):
                lineup.bring_up(kind)
        yield lineup


def _close(systems: list[System]) -> None:
    """Take down whatever is left of them."""
    with contextlib.ExitStack() as stack:
        for system in systems:
            stack.callback(system.close)
