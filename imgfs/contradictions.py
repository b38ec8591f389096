"""Finds what contradicts itself in a store whose bytes are all as they were written.

Owns what is called a contradiction; repair.py puts it right. Must not change anything.

*Concurrency:* the table must not change meanwhile, as for check.py.
"""

from imgfs.doubles import Doubles
from imgfs.errors import Damaged
from imgfs.format import NEEDLES_START
from imgfs.layout import Word
from imgfs.mend import count_links, ring_slots, stray_slots, twin_slots, unlisted_slots
from imgfs.table import Table
from imgfs.volume import Gap
from imgfs.volumes import Volumes


def contradictions(table: Table, volumes: Volumes) -> list[str]:
    """Return what contradicts itself in *table*, and in the needles of *volumes*; a line for each kind."""
    memory = table.memory
    counted = (
        (len(count_links(memory)[1]), "further names of what is gone"),
        (len(stray_slots(memory)), "entries without a name, or without a directory"),
        (len(ring_slots(memory)), "directories that lie in themselves"),
        (_count_twins(table, volumes), "entries whose name another has too"),
        (len(unlisted_slots(memory)), "entries of directories that do not list all they hold"),
        (_count_doubles(table, volumes), "images whose slot was used again while they were there"),
    )
    return [f"{number:,} {what}" for number, what in counted if number]


def _count_twins(table: Table, volumes: Volumes) -> int:
    """Return how many entries have their name in common with another, but for one of each name."""
    names = set()
    count = 0
    for slot in twin_slots(table.memory):
        record = table.record(slot)
        if record.name_offset:
            count += 1
            names.add((record.parent, volumes.get(record.name_volume).names.get(record.name_offset)))
    return count - len(names)


def _count_doubles(table: Table, volumes: Volumes) -> int:
    words, doubles, count = table.memory.words, Doubles(), 0
    for entry in volumes.rows():
        active = entry == words[Word.ACTIVE] and words[Word.ACTIVE_END]
        end = words[Word.ACTIVE_END] if active else table.volume(entry).end
        for item in volumes.get(entry).volume.scan(NEEDLES_START, end):
            if not isinstance(item, Gap):
                doubles.add(entry, *item)
    for double in doubles.find():
        volume = volumes.get(double.entry).volume
        try:
            count += volume.whole(volume.header_at(double.offset), double.offset)
        except Damaged:
            continue
    return count
