"""The plots that the README shows: bars in SVG, drawn from the kept results, for light and dark pages alike.

Needs matplotlib. Owns docs/*.svg of benches. Must not know how anything is measured.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.result import OURS, PROJECT

DOCS = PROJECT / "docs"
# Of a lightness that stands out from white and from black.
_INK, _COLOURS = "#808890", {OURS: "#e8743b", "XFS": "#3b8fd0"}
_OTHER = "#8a93a0"
_PANEL_INCHES = (3.1, 1.75)

# Of each plot: panels, as (title, bench, row).
PLOTS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "speed": (
        ("hot reads per s, 1 client", "hot", "open, read, close, 1 client, 1 worker"),
        ("hot reads per s, 4 clients", "hot", "open, read, close, 4 clients, 2 workers"),
        ("nginx, hot, GET per s", "web", "GET, open_file_cache off"),
        ("cp -r in, images per s", "copying", "`cp -r` in"),
        ("durable images per s", "ingest", "create, write, fsync, close, 4 writers"),
        ("rm -rf, images per s", "copying", "`rm -rf`"),
        ("ls -l, warm, entries per s", "listing", "`ls -l`, warm"),
        ("find, warm, entries per s", "listing", "`find`, warm"),
        ("find, cold, entries per s", "listing", "`find`, cold"),
    ),
    "cold": (
        ("disk reads per cold image", "cold", "disk reads per image, 1 reader"),
        ("cold images per s, 4 readers", "cold", "images per second, 4 readers"),
        ("disk of 3,000 reads/s", "cold", "images per second, 4 readers, capped at 3,000 reads/s"),
    ),
}


def draw(results: Mapping[str, Mapping[str, Any]], directory: Path = DOCS) -> list[Path]:
    """Draw what there are results for; return the files."""
    written = []
    for name, panels in PLOTS.items():
        known = [(title, medians) for title, bench, row in panels if (medians := _medians(results.get(bench), row))]
        if known:
            path = directory / f"bench-{name}.svg"
            _draw(path, known)
            written.append(path)
    return written


def _medians(found: Mapping[str, Any] | None, what: str) -> dict[str, float]:
    rows = [row for row in (found or {}).get("rows", []) if row["what"] == what]
    if not rows:
        return {}
    return {name: statistics.median(summary["samples"]) for name, summary in rows[0]["systems"].items()}


def _draw(path: Path, panels: list[tuple[str, dict[str, float]]]) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    # Text stays text, and the same results give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "imgfs", "font.family": "sans-serif"}):
        figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines), layout="constrained")
        for number, (title, medians) in enumerate(panels):
            _draw_panel(figure.add_subplot(lines, columns, number + 1), title, medians)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="none")


def _draw_panel(axes: Any, title: str, medians: Mapping[str, float]) -> None:
    names = list(medians)[::-1]
    values = [medians[name] for name in names]
    axes.barh(names, values, color=[_COLOURS.get(name, _OTHER) for name in names], height=0.7)
    # XFS may be twenty times the rest: a bar that cannot be seen says nothing.
    if max(values) > 8 * min(values) > 0:
        axes.set_xscale("log")
        title += " (log)"
        axes.set_xlim(min(values) / 3, max(values) * 8)
    else:
        axes.set_xlim(0, max(values) * 1.3)
    for place, value in enumerate(values):
        said = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        axes.annotate(said, (value, place), (3, 0), textcoords="offset points", va="center", size=8, color=_INK)
    axes.set_title(title, size=9, color=_INK, loc="left")
    axes.tick_params(axis="y", length=0, labelsize=8, labelcolor=_INK)
    axes.get_xaxis().set_visible(False)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
