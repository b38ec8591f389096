"""What a bench found: rows of figures, kept as JSON, shown as a table in docs/performance.md.

Owns both formats. Must not know how anything is measured.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGE = PROJECT / "docs" / "performance.md"


@dataclass(frozen=True)
class Row:
    """One figure: what was measured in each round, of imgfs, and of plain XFS where that does the same."""

    what: str
    unit: str
    imgfs: Sequence[float]
    xfs: Sequence[float] = ()
    others: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What others do in the same rounds, by their names."""

    @property
    def ratio(self) -> float | None:
        """The median over the rounds of imgfs / XFS; both ran in each round, one right after the other."""
        if not self.xfs or not all(self.xfs):
            return None
        return statistics.median(ours / theirs for ours, theirs in zip(self.imgfs, self.xfs, strict=True))

    def as_json(self) -> dict[str, object]:
        fields: dict[str, object] = {"what": self.what, "unit": self.unit, "imgfs": _summary(self.imgfs)}
        if self.xfs:
            fields |= {"xfs": _summary(self.xfs), "ratio": self.ratio}
        if self.others:
            fields["others"] = {name: _summary(samples) for name, samples in self.others.items()}
        return fields


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
        imgfs: float | Sequence[float],
        xfs: Sequence[float] = (),
        others: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Add a row; a single number was measured once."""
        self.rows.append(Row(what, unit, (imgfs,) if isinstance(imgfs, int | float) else imgfs, xfs, others or {}))

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


def _summary(samples: Sequence[float]) -> dict[str, object]:
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


def number(value: float) -> str:
    """Return *value* with as many digits as it deserves."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(summary: Mapping[str, object] | None, unit: str) -> str:
    """Return the text of a cell: the median, and from where to where the rounds went."""
    if summary is None:
        return ""
    median, least, most = (float(str(summary[key])) for key in ("median", "min", "max"))
    spread = f" ({number(least)} to {number(most)})" if number(least) != number(most) else ""
    return f"{number(median)}{' ' + unit if unit else ''}{spread}"


def table(found: Mapping[str, object]) -> str:
    """Return the rows of a result as a table in Markdown, with what it was measured on."""
    rows = found["rows"]
    assert isinstance(rows, list)
    compared = any("xfs" in row for row in rows)
    others = list(dict.fromkeys(name for row in rows for name in row.get("others", {})))
    heads = ["", "imgfs", *(["plain XFS", "imgfs / XFS"] if compared else []), *others]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        cells = [row["what"], cell(row["imgfs"], row["unit"])]
        if compared:
            ratio = row.get("ratio")
            cells += [cell(row.get("xfs"), row["unit"]), f"{ratio:.2f}" if ratio is not None else ""]
        cells += [cell(row.get("others", {}).get(name), row["unit"]) for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    machine, notes = found["machine"], found["notes"]
    assert isinstance(machine, dict)
    assert isinstance(notes, list)
    lines += ["", *(f"- {note}" for note in notes)]
    lines.append("- Measured on: " + ", ".join(str(value) for value in machine.values()) + ".")
    return "\n".join(lines)


def put_into(page: str, found: Mapping[str, object]) -> str:
    """Return *page* with the table of a result between its markers."""
    start, end = f"<!-- bench {found['bench']} -->", f"<!-- end of bench {found['bench']} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no markers for the table of {found['bench']}")
    return pattern.sub(lambda _: f"{start}\n\n{table(found)}\n\n{end}", page)


def refresh_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Put every result that is kept into the page."""
    text = page.read_text()
    for path in sorted(results.glob("*.json")):
        text = put_into(text, json.loads(path.read_text()))
    page.write_text(text)
