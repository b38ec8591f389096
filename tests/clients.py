"""Clients of a mount as processes of their own, each of which checks every answer it gets (mount_load.py).

Owns the processes. Must not know what happens to the mount meanwhile.

*Concurrency:* none; the clients run beside the test.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

from mount_load import image
from mounted import PROJECT

READERS = 4


class Load:
    """Readers, writers and one that renames, each a process that checks every answer it gets."""

    def __init__(self, root: Path, seed: int) -> None:
        still = root / "still"
        still.mkdir()
        chance = random.Random(seed)
        for number in range(50):
            (still / f"{number}").write_bytes(image(number, chance.choice([1, 5000, 20_000, 300_000, 1_500_000])))
        self._clients = []
        for number, role in enumerate([*["reader"] * READERS, "changer", "changer", "renamer"]):
            directory = still if role == "reader" else root / f"{role}{number}"
            directory.mkdir(exist_ok=True)
            command = [sys.executable, PROJECT / "tests" / "mount_load.py", role, directory, str(seed + number)]
            client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
            self._clients.append(client)

    def has_failed(self) -> bool:
        return any(client.poll() is not None for client in self._clients)

    def finish(self) -> None:
        """Let everybody compare what is there with what must be; fail if anybody was surprised."""
        for client in self._clients:
            assert client.stdin is not None
            client.stdin.close()
        told = []
        for client in self._clients:
            assert client.stdout is not None
            told.append(json.loads(client.stdout.read() or '{"surprise": "no word", "done": 0}'))
            client.wait()
        assert [client["surprise"] for client in told] == [""] * len(told)
        assert sum(client["done"] for client in told) > len(told), told

    def stop(self) -> None:
        for client in self._clients:
            client.kill()
            client.wait()
            for pipe in (client.stdin, client.stdout):
                if pipe is not None:
                    pipe.close()
