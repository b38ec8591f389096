"""Freed memory goes back to the kernel where it is needed now and then, and is kept where it is needed all the time."""

import subprocess
import sys

# Frees arrays of growing size with small things between them, as making a table does; says what is left of them.
LEFT = """
import numpy
from bench.measure import process_memory
from imgfs import heap
{first}
before = process_memory()["RssAnon"]
for _ in range(2):
    arrays, small = [], []
    for size in range(40):
        arrays.append(numpy.ones((size + 1) << 16, "u1"))
        small.append(bytearray(2000))
    del arrays
{last}
print(process_memory()["RssAnon"] - before)
"""
# Takes and frees what a request for a large image takes; says how many pages the kernel had to find for the last ones.
FAULTS = """
import resource
from imgfs import heap
{first}
for number in range(60):
    if number == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(3 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (3 << 20) // 4096


def said(program: str, first: str, last: str = "") -> int:
    command = [sys.executable, "-c", program.format(first=first, last=last)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_large_blocks_go_back_at_once_where_they_are_rare() -> None:
    left = said(LEFT, "heap.give_back()")
    assert left < 4 << 20
    assert said(LEFT, "") > left + (8 << 20)  # by itself malloc would have kept them


def test_who_serves_finds_what_the_last_request_has_freed() -> None:
    assert said(FAULTS, "heap.give_back(); heap.keep()") < PAGES
    assert said(FAULTS, "heap.give_back()") > 30 * PAGES


def test_what_was_kept_goes_back_when_it_is_needed_no_more() -> None:
    kept = said(LEFT, "heap.give_back(); heap.keep()")
    assert said(LEFT, "heap.give_back(); heap.keep()", "heap.trim()") < kept - (1 << 20)
