"""A scrub beside a daemon, on XFS: it reads the disk, disturbs nobody, and is disturbed by nobody.

What it finds in a store at rest is in test_scrub.py.
"""

import contextlib
import ctypes
import json
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from mounted import DEADLINE_S, MIB, PROJECT, Mounted, XfsDisk, failure, imgfs, run, wait_until

from imgfs.check import Checked
from imgfs.disk import Disk
from imgfs.errors import EXIT_BUSY, EXIT_DAMAGED
from imgfs.scrub import Scrub
from imgfs.scrub_state import read_state
from imgfs.survey import Damage

DISK = Disk()


def fill(directory: Path, images: int, size: int = 50_000, seed: int = 1) -> dict[str, bytes]:
    chance = random.Random(seed)
    content = {f"{number:04}.jpg": chance.randbytes(size) for number in range(images)}
    for name, data in content.items():
        with open(directory / name, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
    return content


def place(store: Path, name: str) -> tuple[Path, int, int]:
    """Return the volume that an image lies in, and where its needle and its data begin."""
    facts = json.loads(imgfs("stat", "--json", store, name))
    return store / "volumes" / f"{facts['volume']:08}.vol", facts["offset"], facts["data_offset"]


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 16]), offset)


def metric(store: Path, name: str) -> float:
    found = re.search(rf"^imgfs_{name}\{{.*\}} (\S+)$", imgfs("metrics", store), flags=re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def start_scrub(store: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "imgfs", "scrub", *options, store],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=PROJECT,
    )


def test_a_damaged_image_is_an_error_and_all_others_are_served(mounted: Mounted) -> None:
    """Its data, or its header; the daemon knows both still, who opens the store anew not the second."""
    content = fill(mounted.point, 30)
    damaged = {"0007.jpg": "the data does not match its checksum", "0011.jpg": "its header is damaged"}
    places = {name: place(mounted.store, name) for name in damaged}
    (volume, data, _), (_, header, _) = places["0007.jpg"], places["0011.jpg"]
    flip(volume, places["0007.jpg"][2] + 777)
    flip(volume, header + 30)
    mounted.drop_caches()
    mounted.expected_log.append(r"open: volume \d+, offset \d+, inode \S+: the (data|header) of this image is damaged")
    said = imgfs("scrub", "--rate", "0", mounted.store, code=EXIT_DAMAGED)
    for (name, text), offset in zip(damaged.items(), (data, header), strict=True):
        assert f"imgfs: damaged: volume {int(volume.stem)}, offset {offset}, {name}: {text}\n" in said
        assert failure((mounted.point / name).read_bytes) == "EIO"
    assert "2 damaged places: scrubbed " in said
    for name in content.keys() - damaged:
        assert (mounted.point / name).read_bytes() == content[name]
    assert f"offset {data}, 0007.jpg" in imgfs("check", "-q", mounted.store, code=EXIT_DAMAGED)
    assert metric(mounted.store, "damaged_images") == 2
    assert metric(mounted.store, "last_scrub_damaged_places") == 2
    assert metric(mounted.store, "in_use") == 1
    # Who has a good copy puts it in its place.
    for name in damaged:
        (mounted.point / name).write_bytes(content[name])
    assert metric(mounted.store, "damaged_images") == 0
    said = imgfs("scrub", "-q", mounted.store, code=EXIT_DAMAGED)
    assert said.count("no image needs it any more") == 2
    assert json.loads((mounted.store / "damage.json").read_text())["damage"] == []
    mounted.check_code = EXIT_DAMAGED


def test_what_is_written_meanwhile_is_never_called_damaged(mounted: Mounted) -> None:
    """Volumes are sealed and begun, images replaced and deleted, while one scrub after the other reads them."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def write(number: int) -> None:
        chance = random.Random(number)
        try:
            while not stop.is_set():
                path = mounted.point / f"{number}-{chance.randrange(20)}"
                match chance.randrange(4):
                    case 0:
                        path.unlink(missing_ok=True)
                    case 1:
                        with open(path, "ab") as file:
                            file.write(chance.randbytes(1000))
                            os.fsync(file.fileno())
                    case _:
                        path.write_bytes(chance.randbytes(chance.choice([10, 30_000, 300_000, MIB + 70_000])))
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=[number]) for number in range(3)]
    for writer in writers:
        writer.start()
    try:
        last = 0
        while last < 4 * int(os.environ.get("IMGFS_SOAK", "1")):
            one = Scrub(str(mounted.store))
            for step in one.run():
                assert isinstance(step, Checked), step
            last = max(int(path.stem) for path in (mounted.store / "volumes").glob("*.vol"))
    finally:
        stop.set()
        for writer in writers:
            writer.join(DEADLINE_S)
    assert errors == []
    assert one.result.read_bytes > 8 * MIB


def test_a_killed_scrub_goes_on_where_it_was(mounted: Mounted) -> None:
    mounted.check_code = EXIT_DAMAGED
    fill(mounted.point, 16, MIB // 2)
    volume, _, data_offset = place(mounted.store, "0001.jpg")
    flip(volume, data_offset)
    # So slow that it is killed in the middle.
    process = start_scrub(mounted.store, "--rate", "1M")
    store = str(mounted.store)

    def progress() -> int:
        now = read_state(store, DISK).now
        return now.read_bytes if now is not None else 0

    wait_until(lambda: progress() > MIB, "it has noted how far it is", process=process)
    assert "another scrub" in imgfs("scrub", mounted.store, code=EXIT_BUSY)
    os.kill(process.pid, signal.SIGKILL)
    assert "0001.jpg" in process.communicate(timeout=DEADLINE_S)[0]
    before = progress()
    assert metric(mounted.store, "scrub_unfinished") == 1
    assert metric(mounted.store, "scrub_read_bytes") == before
    steps = list(Scrub(store).run())
    assert not [step for step in steps if isinstance(step, Damage)], "what it had found it does not find again"
    assert isinstance(steps[0], Checked)
    assert before <= steps[0].volume_bytes < before + 2 * MIB
    state = read_state(store, DISK)
    assert state.last is not None
    assert state.last.damaged_places == 1
    assert state.last.read_bytes > 7 * MIB
    (row,) = json.loads((mounted.store / "damage.json").read_text())["damage"]
    assert row["path"] == "0001.jpg"
    # The next one starts anew, and finds it again.
    assert "0001.jpg" in imgfs("scrub", "-q", mounted.store, code=EXIT_DAMAGED)
    flip(volume, data_offset)
    assert imgfs("scrub", "-q", mounted.store) == ""
    mounted.check_code = 0


def test_it_sees_the_disk_and_not_what_the_kernel_remembers(mounted: Mounted, disk: XfsDisk) -> None:
    """A bit flips on the device below a page that is in memory: readers still get the right bytes, a scrub does not."""
    content = fill(mounted.point, 20)
    volume, _, data_offset = place(mounted.store, "0003.jpg")
    os.sync()
    extents = re.findall(
        r"^\s*\d+:\s+(\d+)\.\.\s*(\d+):\s+(\d+)\.\.", run("filefrag", "-e", volume), flags=re.MULTILINE
    )
    block, inside = divmod(data_offset + 100, 4096)
    (physical,) = [int(start) + block - int(first) for first, end, start in extents if int(first) <= block <= int(end)]
    device = run("findmnt", "-n", "-o", "SOURCE", disk.path).strip()
    before = volume.read_bytes()
    with kept_in_memory(volume):
        flip_on_device(device, physical * 4096 + inside)
        assert volume.read_bytes() == before
        assert (mounted.point / "0003.jpg").read_bytes() == content["0003.jpg"]
        assert "0003.jpg: the data does not match its checksum" in imgfs("scrub", mounted.store, code=EXIT_DAMAGED)
        flip_on_device(device, physical * 4096 + inside)
        assert "nothing is damaged" in imgfs("scrub", mounted.store)


@contextlib.contextmanager
def kept_in_memory(path: Path) -> Iterator[None]:
    """Let the kernel keep all of the file at *path* in its memory, whoever wants to drop it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    with open(path, "rb") as file:
        flags = mmap.MAP_SHARED | 0x2000  # MAP_LOCKED
        arguments = ctypes.c_size_t(size), mmap.PROT_READ, flags, file.fileno(), ctypes.c_long(0)
        address = libc.mmap(None, *arguments)
    assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


def flip_on_device(device: str, offset: int) -> None:
    file = os.open(device, os.O_RDWR)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        byte = os.pread(file, 1, offset)[0]
        os.pwrite(file, bytes([byte ^ 16]), offset)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def test_it_leaves_the_page_cache_as_it_is(mounted: Mounted) -> None:
    fill(mounted.point, 60, 200_000)
    first, second = sorted((mounted.store / "volumes").glob("*.vol"))
    mounted.drop_caches()

    def keeps_it() -> bool:
        size = len(first.read_bytes())
        assert list(map(type, Scrub(str(mounted.store)).run())).count(Damage) == 0
        return cached(first) >= size

    # Others on the machine may drop it at the same time.
    assert any(keeps_it() for _ in range(5))
    assert cached(second) <= MIB


def cached(path: Path) -> int:
    """Return how many bytes of a file are in memory."""
    return int(run("fincore", "--noheadings", "--bytes", "--output", "RES", path))


def test_it_gives_way_to_all_others(mounted: Mounted) -> None:
    fill(mounted.point, 8, MIB // 2)
    process = start_scrub(mounted.store, "--rate", "64K")
    try:
        wait_until(
            lambda: run("ionice", "-p", str(process.pid)).strip() == "idle", "it is idle for the disk", process=process
        )
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def test_metrics_for_the_textfile_collector(mounted: Mounted) -> None:
    fill(mounted.point, 5)
    file = mounted.store / "out.prom"
    try:
        assert imgfs("metrics", "--output", file, mounted.store) == ""
        text = file.read_text()
        assert f'imgfs_images{{store="{mounted.store}"}} 5.0\n' in text
        assert f'imgfs_live_bytes{{store="{mounted.store}"}} 250000.0\n' in text
        assert "imgfs_last_scrub_timestamp_seconds" not in text
        assert os.listdir(mounted.store).count("out.prom") == 1
        assert [name for name in os.listdir(mounted.store) if "prom" in name] == ["out.prom"]
    finally:
        file.unlink()
    imgfs("scrub", "-q", "--rate", "0", mounted.store)
    assert metric(mounted.store, "last_scrub_timestamp_seconds") > 1.7e9
    assert metric(mounted.store, "last_scrub_damaged_places") == 0
