"""Runs benches: `python -m bench [all | quick | docs | NAME ...]`; results go to bench/results and the docs."""

import argparse
import importlib
import sys
import time
from pathlib import Path

from bench.machine import describe
from bench.result import RESULTS, Result, refresh_page, table, write_json
from bench.site import Failed, Site, open_site

# In the order in which they run.
BENCHES = ("requests", "hot", "workers", "copying", "cold", "reclaim", "start", "memory")
# Quick results are for whoever runs them; those of full size are kept, and stand in docs/performance.md.
DIRECTORIES = {"tiny": RESULTS / "tiny", "quick": RESULTS / "quick", "full": RESULTS}


def run_bench(name: str, site: Site, size: str) -> Result:
    """Run one bench."""
    module = importlib.import_module(f"bench.{name}")
    result: Result = module.run(site, size)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure what docs/performance.md states.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all (default), quick, docs, {', '.join(BENCHES)}")
    parser.add_argument("--quick", action="store_true", help="small numbers; the page in docs/ stays as it is")
    parser.add_argument("--tiny", action="store_true", help="numbers that mean nothing, to see that it runs")
    parser.add_argument("--directory", help="where to work; needs 16 GB for the full size")
    parser.add_argument("--results", type=Path, help="where to write the JSON; the page in docs/ stays as it is")
    arguments = parser.parse_args()
    names = arguments.names or ["all"]
    if names == ["docs"]:
        refresh_page()
        return 0
    quick = arguments.quick or "quick" in names
    size = "tiny" if arguments.tiny else "quick" if quick else "full"
    chosen = [name for name in names if name not in ("all", "quick")] or list(BENCHES)
    unknown = [name for name in chosen if name not in BENCHES]
    if unknown:
        parser.error(f"there is no bench {unknown[0]}; there are {', '.join(BENCHES)}")
    try:
        return _run(chosen, size, arguments.directory, arguments.results or DIRECTORIES[size])
    except Failed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def _run(names: list[str], size: str, directory: str | None, results: Path) -> int:
    start = time.monotonic()
    for name in names:
        print(f"{name} ({size})", flush=True)
        # A site of its own: what one bench leaves in memory or on the disk must not slow the next.
        with open_site(directory) as site:
            found = run_bench(name, site, size).as_json(describe(site.directory), size)
        path = write_json(results, found)
        print(f"{table(found)}\n  {path}, after {time.monotonic() - start:.0f} s\n", flush=True)
    if results == RESULTS:
        refresh_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
