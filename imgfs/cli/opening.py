"""Opens a store for a command, and says on standard error what damage opening it found.

Owns the wording of damage. Must not decide what a command does about it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from imgfs.cli.text import complain
from imgfs.errors import ImgfsError
from imgfs.store import Store
from imgfs.survey import Damage

# So many damaged places are named one by one; `imgfs check` names them all.
_NAMED_MAX = 10


@contextmanager
def open_store(path: str, *, writable: bool = False, as_of_ns: int | None = None) -> Iterator[Store]:
    """Open the store at *path* for the length of a command, and tell about damage found on the way.

    With *as_of_ns* it is as it was then.
    """
    with Store.open(path, writable=writable, as_of_ns=as_of_ns) as store:
        tell_damage(store, path)
        yield store


def tell_damage(store: Store, path: str) -> None:
    """Say on standard error what damage opening *store* has found, and what it cost; it is at *path*."""
    damage = store.report.damage
    for item in damage[:_NAMED_MAX]:
        complain(f"damaged: {damage_line(store, item)}")
    if len(damage) > _NAMED_MAX:
        complain(f"{len(damage) - _NAMED_MAX:,} more damaged places; imgfs check {path} names them all")
    for text in store.report.renamed:
        complain(text)


def damage_line(store: Store, damage: Damage) -> str:
    """Return where the damage is, which image has it, and what it is."""
    return damage_text(damage, path_of(store, damage.inode) if damage.inode else None)


def damage_text(damage: Damage, path: bytes | None) -> str:
    """Return where the damage is, that the image at *path* has it if that is known, and what it is."""
    return f"{damage.place}{f', {os.fsdecode(path)}' if path is not None else ''}: {damage.text}"


def path_of(store: Store, inode: int) -> bytes:
    """Return the path of *inode* from the top of the store; its number where names are lost."""
    try:
        return store.path_of(inode)
    except ImgfsError:
        return b"inode %d" % inode
