"""Runs benches: `python -m bench [all | docs | NAME ...]`; results go to bench/results, the docs and their plots."""

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bench.commands import Failed
from bench.machine import describe
from bench.page import read_results, refresh_page, table
from bench.plots import draw
from bench.result import RESULTS, Result, write_json
from bench.site import Site, open_site
from bench.targets import summary_table
from bench.watch import note_interrupts

# In the order in which they run.
BENCHES = (
    "requests",
    "hot",
    "awake",
    "web",
    "copying",
    "ingest",
    "cold",
    "listing",
    "space",
    "reclaim",
    "start",
    "memory",
)
# Quick results are for whoever runs them; those of full size are kept, and stand in docs/performance.md.
DIRECTORIES = {"tiny": RESULTS / "tiny", "quick": RESULTS / "quick", "full": RESULTS}


def run_bench(name: str, site: Site, size: str) -> Result:
    """Run one bench."""
    module = importlib.import_module(f"bench.{name}")
    result: Result = module.run(site, size)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure what docs/performance.md states.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all (default), docs, {', '.join(BENCHES)}")
    parser.add_argument("--quick", action="store_true", help="small numbers; docs/ stays as it is")
    parser.add_argument("--tiny", action="store_true", help="numbers that mean nothing, to see that it runs")
    parser.add_argument("--directory", help="where to work; needs 20 GB for the full size")
    parser.add_argument("--results", type=Path, help="where to write the JSON; docs/ stays as it is")
    parser.add_argument(
        "--systems", default="", help="what beside imgfs and XFS: bindfs,passthrough_ll,..., or none (all)"
    )
    arguments = parser.parse_args()
    if arguments.names == ["docs"]:
        _refresh_docs()
        return 0
    size = "tiny" if arguments.tiny else "quick" if arguments.quick else "full"
    chosen = [name for name in arguments.names if name != "all"] or list(BENCHES)
    unknown = [name for name in chosen if name not in BENCHES]
    if unknown:
        parser.error(f"there is no bench {unknown[0]}; there are {', '.join(BENCHES)}")
    systems = [name for name in arguments.systems.lower().split(",") if name]
    results = arguments.results or DIRECTORIES[size]
    note_interrupts()
    try:
        failed = _run(chosen, size, arguments.directory, systems, results)
    except KeyboardInterrupt:
        return 130
    if results == RESULTS:
        _refresh_docs()
    return 1 if failed else 0


def _run(names: list[str], size: str, directory: str | None, systems: list[str], results: Path) -> bool:
    """Run the benches, one after the other; return whether one of them failed, which does not keep the others."""
    start = time.monotonic()
    failed = False
    found: dict[str, Mapping[str, object]] = {}
    for number, name in enumerate(names):
        print(f"{name} ({size}, {number + 1} of {len(names)})", flush=True)
        try:
            # A site of its own: what one bench leaves in memory or on the disk must not slow the next.
            with open_site(directory, systems) as site:
                found[name] = run_bench(name, site, size).as_json(describe(site.directory), size)
        except (Failed, OSError, subprocess.SubprocessError) as error:
            print(f"bench: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        path = write_json(results, found[name])
        print(f"{table(found[name])}\n  {path}, after {time.monotonic() - start:.0f} s\n", flush=True)
    if size != "full":
        print("These are small numbers; the targets are about those of full size.\n")
    print(summary_table(found))
    return failed


def _refresh_docs() -> None:
    """Make the tables and the plots anew from the results that are kept."""
    refresh_page()
    try:
        draw(read_results(RESULTS))
    except ImportError:
        print("bench: no plots without matplotlib: pip install '.[bench]'", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
