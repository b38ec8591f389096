"""What a bench found: rows of figures, round by round and system by system, kept as JSON.

Owns that format. Must not know how anything is measured, nor how it is shown.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
OURS = "imgfs"


@dataclass(frozen=True)
class Row:
    """One figure: what was measured in each round, of each system."""

    what: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    compared: bool = True
    """The columns are systems that do the same, imgfs the first of them."""

    def ratios(self) -> dict[str, list[float]]:
        """Return imgfs / other, round by round; both ran in each round, one soon after the other."""
        ours = self.samples.get(OURS)
        if ours is None or not self.compared:
            return {}
        return {
            name: [mine / other for mine, other in zip(ours, theirs, strict=False)]
            for name, theirs in self.samples.items()
            if name != OURS and all(theirs)
        }

    def as_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "unit": self.unit,
            "systems": {name: summary(samples) for name, samples in self.samples.items()},
            "ratios": {name: summary(ratios) for name, ratios in self.ratios().items()},
        }


@dataclass
class Result:
    """All that one bench found."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    parameters: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        what: str,
        unit: str,
        samples: float | Sequence[float] | Mapping[str, Sequence[float]],
        *,
        compared: bool = True,
    ) -> None:
        """Add a row: of imgfs, measured once or in rounds, or of several systems."""
        if isinstance(samples, int | float):
            samples = (samples,)
        if not isinstance(samples, Mapping):
            samples = {OURS: samples}
        self.rows.append(Row(what, unit, samples, compared))

    def note(self, text: str) -> None:
        """Add a note, unless it is there."""
        if text not in self.notes:
            self.notes.append(text)

    def as_json(self, machine: Mapping[str, str], size: str) -> dict[str, object]:
        return {
            "bench": self.name,
            "title": self.title,
            "size": size,
            "machine": dict(machine),
            "parameters": self.parameters,
            "rows": [row.as_json() for row in self.rows],
            "notes": self.notes,
        }


def summary(samples: Sequence[float]) -> dict[str, object]:
    """Return what is said about the rounds of one system."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": list(samples),
    }


def write_json(directory: Path, found: Mapping[str, object]) -> Path:
    """Write what `Result.as_json` returned; return the path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{found['bench']}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    return path
