"""docs/performance.md: the tables that stand between its markers.

Owns their layout. Must not know how anything is measured.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from bench.result import OURS, PROJECT, RESULTS
from bench.targets import summary_table

PAGE = PROJECT / "docs" / "performance.md"
_ABSENT = "Not measured at full length since this bench has become what it is: `make bench`."


def number(value: float) -> str:
    """Return *value* with as many digits as it deserves."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(summary: Mapping[str, object] | None, ratio: Mapping[str, object] | None = None) -> str:
    """Return the text of a cell: the median, from where to where the rounds went, how imgfs compares."""
    if summary is None:
        return ""
    median, least, most = (float(str(summary[key])) for key in ("median", "min", "max"))
    spread = f" ({number(least)} to {number(most)})" if number(least) != number(most) else ""
    compared = f"; **{number(float(str(ratio['median'])))}x**" if ratio else ""
    return number(median) + spread + compared


def table(found: Mapping[str, object]) -> str:
    """Return the rows of a result as a table in Markdown, with what it was measured on."""
    rows = found["rows"]
    assert isinstance(rows, list)
    systems = list(dict.fromkeys([OURS, *(name for row in rows for name in row["systems"])]))
    lines = ["| " + " | ".join(["", *systems]) + " |", "| --- |" + " ---: |" * len(systems)]
    for row in rows:
        what = row["what"] + (f", {row['unit']}" if row["unit"] else "")
        cells = [cell(row["systems"].get(name), row["ratios"].get(name)) for name in systems]
        lines.append("| " + " | ".join([what, *cells]) + " |")
    machine, notes = found["machine"], found["notes"]
    assert isinstance(machine, dict)
    assert isinstance(notes, list)
    lines += ["", *(f"- {note}" for note in notes)]
    lines.append("- Measured on: " + ", ".join(str(value) for value in machine.values()) + ".")
    return "\n".join(lines)


def put_into(page: str, name: str, text: str) -> str:
    """Return *page* with *text* between the markers of *name*."""
    start, end = f"<!-- bench {name} -->", f"<!-- end of bench {name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no markers for {name}")
    return pattern.sub(lambda _: f"{start}\n\n{text}\n\n{end}", page)


def read_results(results: Path) -> dict[str, dict[str, object]]:
    """Return what was found by each bench that has been run."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}


def fill_in(page: str, results: Mapping[str, Mapping[str, object]]) -> str:
    """Return *page* with every table made anew."""
    page = put_into(page, "targets", summary_table(results))
    for name in re.findall(r"<!-- bench (?!targets)(\w+) -->", page):
        page = put_into(page, name, table(results[name]) if name in results else _ABSENT)
    return page


def refresh_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Make every table of the page anew from the results that are kept."""
    page.write_text(fill_in(page.read_text(), read_results(results)))
