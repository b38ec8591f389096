"""Stores whose directories are listed many entries at a time, and what comes of that."""

import dataclasses
import stat
from random import Random

from stores import TINY, new_store, put

from imgfs import replies
from imgfs.acts import Acts, Manner
from imgfs.listing import Page
from imgfs.store import ROOT, Store

LARGE = dataclasses.replace(TINY, volume_bytes_max=1 << 30)


def of_everything() -> Acts:
    """Return a store with some of everything, in more than one volume."""
    random = Random(5)
    store = new_store()
    for number in range(400):
        name = random.randbytes(random.choice((1, 2, 7, 8, 9, 40, 127))).hex().encode()
        mode, size = random.choice((0o644, 0o600, 0o4755)), random.randrange(600)
        times = random.randrange(-(1 << 60), 1 << 62)
        inode = store.put(ROOT, name, bytes(size), size, mode=mode, uid=number % 3, gid=number % 5, mtime_ns=times)
        if number % 7 == 0:
            store.access_times.put(inode, random.randrange(1 << 60))
        if number % 20 == 0:
            directory = store.mkdir(ROOT, b"directory %d" % number, 0o2750, 3, 4)
            store.mkdir(directory, b"below", 0o700, 0, 0)
            store.symlink(ROOT, b"symlink %d" % number, b"somewhere", 5, 6)
            store.special(ROOT, b"special %d" % number, stat.S_IFBLK | 0o660, 0x0801 + number, 7, 8)
    assert len(store._volumes.rows()) > 1
    return Acts(store, Manner(60.5))


def filled(count: int = 40) -> Store:
    store = new_store(LARGE)
    for number in range(count):
        put(store, ROOT, b"%d" % number)
    return store


def taken(store: Store) -> Page | None:
    return store.page(ROOT, 0, 1000)


def entries(store: Store, directory: int = ROOT, count: int = 50) -> list[tuple[int, int, bytes]]:
    """Return all of *directory*, taken in pages."""
    found: list[tuple[int, int, bytes]] = []
    while True:
        page = store.page(directory, found[-1][0] if found else 0, count)
        assert page is not None
        if not len(page.keys):
            return found
        for key, inode, name in zip(page.keys, page.inodes, names_of(page), strict=True):
            found.append((int(key), int(inode), name))


def names_of(page: Page) -> list[bytes]:
    """Return the names of *page*."""
    assert page.names.shape[0] == len(page.keys)
    names = [line[:length].tobytes() for line, length in zip(page.names, page.name_lengths, strict=True)]
    assert not any(line[len(name) :].any() for line, name in zip(page.names, names, strict=True))
    return names


def listed(answer: bytes) -> list[tuple[tuple[int, ...], bytes]]:
    """Return the fields and the name of each entry of an answer."""
    found, at = [], 0
    while at < len(answer):
        fields = replies._LISTED.unpack_from(answer, at)
        end = at + replies._LISTED.size + fields[-2]
        found.append((fields, answer[end - fields[-2] : end]))
        at = -(-end // 8) * 8
    assert at == len(answer)
    return found


def last_position(answer: bytes) -> int:
    found = listed(answer)
    return found[-1][0][-3] if found else 0
