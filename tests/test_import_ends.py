"""An import that ends within an append of many, by a kill or a full disk: what is there is whole, and counted."""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from killed_store import MortalDisk, die
from mortal import Life, in_process, status_of
from trees import Watcher, bring_in, snapshot, take_out

from imgfs.disk import Buffer, Disk
from imgfs.errors import StoreFull
from imgfs.settings import KIB, MIB, Settings
from imgfs.store import Store, make_store
from imgfs.transfer import Tally

SETTINGS = Settings(volume_bytes_max=256 * KIB, headroom_bytes=0, rest_slots=2)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """Images in several directories, and some of what an append of many does not take."""
    path = tmp_path / "source"
    for number in range(60):
        directory = path / f"d{number % 4}" / ("deep" if number % 8 < 4 else "")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number}").write_bytes(os.urandom(number * 200))
    (path / "d1" / "link").symlink_to("13")
    (path / "d1" / "twin").hardlink_to(path / "d1" / "13")
    os.setxattr(path / "d2" / "14", "user.rating", b"5")
    (path / "d3").chmod(0o711)
    os.utime(path / "d3", ns=(1, 981_173_106_123_456_789))
    return path


@pytest.mark.parametrize("torn", [False, True], ids=["between steps", "within a step"])
def test_a_killed_import_leaves_whole_images_and_is_resumed(torn: bool, source: Path, tmp_path: Path) -> None:
    wanted = snapshot(source)
    steps = 0
    for step in range(1, 1000, 7):
        path = tmp_path / f"store{step}"
        make_store(str(path), SETTINGS, uid=0, gid=0)
        life = Life(step, torn=torn, end=die)

        def run(life: Life = life, path: Path = path) -> None:
            with Store.open(str(path), disk=MortalDisk(life), settings=SETTINGS) as store:
                bring_in(store, source)

        was_killed = status_of(in_process(run)) != 0
        with Store.open(str(path), settings=SETTINGS) as store:
            assert not store.report.damage
            out = tmp_path / f"out{step}"
            assert take_out(store, out).damaged == 0
            for name, node in snapshot(out).items():
                assert node.content == wanted[name].content, f"killed at step {step}"
            bring_in(store, source, resume=True)
            take_out(store, tmp_path / f"all{step}")
        assert snapshot(tmp_path / f"all{step}") == wanted
        steps += 1
        if not was_killed:
            break
    assert steps > 5


class FullDisk(Disk):
    """A disk on which no file gets longer than *room* bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def write(self, file: int, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        fits = max(0, self._room - offset)
        super().write(file, offset, [data[:fits]])
        if len(data) > fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("room", [130 * KIB, 200 * KIB, 290 * KIB])
def test_a_full_disk_ends_an_import_and_what_was_counted_is_there(room: int, source: Path, tmp_path: Path) -> None:
    large = Settings(volume_bytes_max=64 * MIB, headroom_bytes=0, rest_slots=2)
    path = str(tmp_path / "store")
    make_store(path, large, uid=0, gid=0)
    told: list[Tally] = []
    with Store.open(path, disk=FullDisk(room), settings=large) as store, pytest.raises(StoreFull):
        bring_in(store, source, Watcher(told.append))
    with Store.open(path, settings=large) as store:
        assert not store.report.damage
        assert not store.report.torn_bytes
        counts = take_out(store, tmp_path / "some")
        assert 10 < counts.images < 60
        assert (counts.images, counts.data_bytes) == (told[-1].images, told[-1].data_bytes)
        wanted = snapshot(source)
        assert all(wanted[name].content == node.content for name, node in snapshot(tmp_path / "some").items())
        assert bring_in(store, source, resume=True).resumed == counts.images
        take_out(store, tmp_path / "all")
    assert snapshot(tmp_path / "all") == wanted
