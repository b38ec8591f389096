"""Opens a store in a process of its own and says what that took: `python -m bench.probe STORE [--use IMAGES]`.

Prints one JSON object: seconds, the memory of the table, and what kinds of memory the process has, in bytes.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from typing import Self

from bench.commands import Failed, python, status
from bench.measure import process_memory
from imgfs.store import ROOT, Store

_LOOK_EVERY_S = 0.002


class _Peak:
    """Watches, from a thread, the most private memory this process has."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_EVERY_S):
            self.bytes = max(self.bytes, process_memory()["RssAnon"])


def probe(store: object, *, use: int = 0) -> dict[str, float]:
    """Run this module on *store*; return what it prints."""
    found: dict[str, float] = json.loads(python("bench.probe", str(store), "--use", str(use)))
    return found


def probe_killed(store: object, images: int) -> None:
    """Run this module on *store*, let it put images and die of SIGKILL."""
    if status(sys.executable, "-m", "bench.probe", str(store), "--put-and-die", str(images)) != -signal.SIGKILL:
        raise Failed(f"the process that was to die at {store} did not")


def _put_and_die(store: Store, images: int) -> None:
    """Put so many images, half of them durable, and end without a word."""
    for number in range(images):
        if number == images // 2:
            store.sync()
        name = b"%d-%08d" % (os.getpid(), number)
        store.put(ROOT, name, name, len(name), mode=0o644, uid=0, gid=0, mtime_ns=number)
    os.kill(os.getpid(), signal.SIGKILL)


def _use(store: Store, images: int) -> int:
    """List the whole store, then open and read some images; return how many entries there are."""
    entries = 0
    chosen: list[int] = []
    chance = random.Random(1)
    pending = [ROOT]
    while pending:
        for entry in store.list(pending.pop()):
            entries += 1
            if store.attr(entry.inode).nlink > 1:
                pending.append(entry.inode)
            elif len(chosen) < images:
                chosen.append(entry.inode)
            elif (place := chance.randrange(entries)) < images:
                chosen[place] = entry.inode
    for inode in chosen:
        handle = store.open_image(inode)
        store.read(handle, 0, 1 << 20)
        store.release(handle)
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description="Open a store and say what that took.")
    parser.add_argument("store")
    parser.add_argument("--use", type=int, default=0, help="list all, and read so many images")
    parser.add_argument("--put-and-die", type=int, default=0, help="put so many images, and die")
    arguments = parser.parse_args()
    with _Peak() as peak:
        start = time.perf_counter()
        store = Store.open(arguments.store)
        seconds = time.perf_counter() - start
    if arguments.put_and_die:
        _put_and_die(store, arguments.put_and_die)
    found: dict[str, float] = {"seconds": seconds, "table": store.counts().memory_bytes, "anon_peak": peak.bytes}
    found |= process_memory()
    if arguments.use:
        found["entries"] = _use(store, arguments.use)
        found["anon_used"] = process_memory()["RssAnon"]
        found["table_used"] = store.counts().memory_bytes
    start = time.perf_counter()
    store.close()
    found["close_seconds"] = time.perf_counter() - start
    print(json.dumps(found))


if __name__ == "__main__":
    main()
