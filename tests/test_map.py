"""`imgfs map` tells live bytes from dead ones needle by needle, adds them up, and draws them legibly."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from command_line import COMMAND, Run, flip, volume_file
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imgfs.cli import picture
from imgfs.cli.picture import Picture, choose_cells, live_share, share_text
from imgfs.cli.text import binary_size
from imgfs.errors import EXIT_FAILURE, EXIT_USAGE
from imgfs.format import NEEDLE_HEADER_BYTES_MAX, NEEDLES_START, Kind
from imgfs.index import index_paths
from imgfs.settings import KIB, Settings
from imgfs.store import ROOT, Store, make_store
from imgfs.usage import Class, VolumeUsage
from imgfs.volume import Gap

SMALL = Settings(volume_bytes_max=64 * KIB, headroom_bytes=16 * KIB, checkpoint_needles=8)
_SKIPPED = re.compile(r"\x1b\[[0-9;]*m")


def put(store: Store, name: bytes, size: int) -> int:
    data = os.urandom(size)
    return store.put(ROOT, name, data, size, mode=0o644, uid=1, gid=2, mtime_ns=1)


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """Return the path of a store in which much was deleted, replaced, renamed and linked."""
    path = tmp_path / "used"
    make_store(str(path), SMALL, uid=0, gid=0)
    with Store.open(str(path), settings=SMALL) as store:
        for number in range(60):
            inode = put(store, b"%d" % number, 900 + 217 * number)
            if number % 7 == 0:
                store.set_xattr(inode, b"user.k", b"first")
                store.set_xattr(inode, b"user.k", b"second" * 20)
        for number in range(0, 40, 3):
            store.unlink(ROOT, b"%d" % number)
        for number in range(1, 40, 6):
            put(store, b"%d" % number, 3000)
        directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
        store.rename(ROOT, b"50", directory, b"fifty")
        store.rename(ROOT, b"51", ROOT, b"52")
        store.link(store.lookup(ROOT, b"53"), directory, b"link")
        store.link(store.lookup(ROOT, b"53"), directory, b"gone")
        store.unlink(directory, b"gone")
        store.symlink(ROOT, b"symlink", b"target", 0, 0)
        store.special(ROOT, b"pipe", 0o10644, 0, 0, 0)
    return path


def usages(path: Path) -> list[VolumeUsage]:
    with Store.open(str(path), writable=False) as store:
        usage = store.usage()
        return [usage.of(each) for each in usage.volumes()]


def needed(store: Store) -> set[tuple[int, int]]:
    """Return volume and offset of each needle with data that the tree needs, found one by one."""
    found = set()
    pending = [ROOT]
    while pending:
        for entry in store.list(pending.pop()):
            kind = store.attr(entry.inode).kind
            if kind == Kind.DIRECTORY:
                pending.append(entry.inode)
                continue
            record = store._images.record(entry.inode)
            found.add((store._table.volume(record.volume).volume_id, record.offset8 * 8))
            if store.has_xattrs(entry.inode):
                rare = store._table.rare.get(entry.inode - 1 & 0xFFFF_FFFF, entry.inode >> 32)
                found.add((store._table.volume(rare.volume).volume_id, rare.offset8 * 8))
    return found


_DATA = {Kind.FILE, Kind.SYMLINK, Kind.SPECIAL, Kind.LINK, Kind.XATTR}


def expected(path: Path) -> dict[int, list[tuple[int, int, Class]]]:
    """Return start, end and class of each needle of each volume, by its id, as a scan and the tree tell them."""
    found: dict[int, list[tuple[int, int, Class]]] = {}
    with Store.open(str(path), writable=False) as store:
        live = needed(store)
        for row in range(store.counts().volumes):
            volume = store._volumes.get(row).volume
            parts = found.setdefault(volume.header.volume_id, [])
            for item in volume.scan(NEEDLES_START, volume.size()):
                assert not isinstance(item, Gap)
                offset, needle = item
                kind = Class.METADATA if needle.kind not in _DATA else Class.DEAD
                if (volume.header.volume_id, offset) in live:
                    kind = Class.LIVE
                if needle.kind == Kind.LINK and needle.name == b"link":
                    # A listing shows the inode it names, not its own.
                    kind = Class.LIVE
                parts.append((offset, offset + needle.length, kind))
    return found


def compare(found: list[VolumeUsage], parts: dict[int, list[tuple[int, int, Class]]]) -> None:
    assert [usage.volume_id for usage in found] == sorted(parts)
    for usage in found:
        whole = [(0, NEEDLES_START, Class.METADATA), *parts[usage.volume_id]]
        edges = np.array([start for start, _, _ in whole] + [whole[-1][1]], float)
        assert edges[-1] == usage.size
        spread = usage.spread(edges)
        for (start, end, kind), amounts in zip(whole, spread, strict=True):
            assert amounts[kind] == amounts.sum() == end - start
        assert usage.needles.tolist() == [start for start, _, _ in whole[1:]]


def test_a_hole_behind_the_end_is_no_part_of_a_volume(used: Path) -> None:
    """As zeros written ahead are after power loss: blocks that were allocated and never written."""
    before = usages(used)
    last = max((used / "volumes").glob("*.vol"))
    os.truncate(last, last.stat().st_size + 256 * KIB)
    for usage, expected in zip(usages(used), before, strict=True):
        assert (usage.size, usage.bytes_of().tolist()) == (expected.size, expected.bytes_of().tolist())


def test_each_needle_is_judged_as_the_tree_needs_it(used: Path) -> None:
    parts = expected(used)
    compare(usages(used), parts)
    kinds = [kind for rows in parts.values() for _, _, kind in rows]
    assert min(kinds.count(Class.LIVE), kinds.count(Class.DEAD), kinds.count(Class.METADATA)) > 20


def test_all_bytes_of_the_files_add_up(used: Path) -> None:
    for usage in usages(used):
        assert usage.bytes_of().sum() == usage.size == volume_file(used, usage.volume_id).stat().st_size
    assert [usage.sealed for usage in usages(used)] == [True] * (len(usages(used)) - 1) + [False]


@pytest.mark.parametrize("harm", ["missing", "short", "damaged", "long", "empty"])
def test_the_volumes_say_it_where_an_index_file_does_not(used: Path, harm: str) -> None:
    parts = expected(used)
    for volume in parts:
        path = Path(index_paths(str(volume_file(used, volume))).records)
        if harm == "missing":
            path.unlink()
        elif harm == "short":
            os.truncate(path, path.stat().st_size // 2)
        elif harm == "empty":
            os.truncate(path, 0)
        elif harm == "long":
            path.write_bytes(path.read_bytes() + path.read_bytes()[-78:])
        else:
            flip(path, 39 * 3 + 15)
    compare(usages(used), parts)


def test_what_is_damaged_is_dead_and_costs_no_other_needle(used: Path) -> None:
    parts = expected(used)
    volume = next(volume for volume, rows in parts.items() if [kind for _, _, kind in rows[3:6]] == [Class.LIVE] * 3)
    start, end, _ = parts[volume][4]
    parts[volume][4] = (start, end, Class.DEAD)
    flip(volume_file(used, volume), start + 20)
    Path(index_paths(str(volume_file(used, volume))).records).unlink()
    compare(usages(used), parts)


def test_torn_bytes_at_the_end_are_dead(used: Path) -> None:
    last = usages(used)[-1]
    with volume_file(used, last.volume_id).open("ab") as file:
        file.write(b"torn" * 100)
    found = usages(used)[-1]
    assert found.size == last.size + 400
    assert (found.bytes_of() - last.bytes_of()).tolist() == [0, 0, 400, 0]


def test_a_store_that_is_in_use_is_shown(used: Path, run: Run) -> None:
    with Store.open(str(used), settings=SMALL) as store:
        put(store, b"new", 5000)
        store.unlink(ROOT, b"58")
        done = run("map", used)
        assert (done.code, done.err) == (0, "")
        compare(usages(used), expected(used))


# -- holes ------------------------------------------------------------------------------------------------------------


def make_hole(path: Path, start: int, end: int) -> None:
    """Write the file anew with a hole in it."""
    content = path.read_bytes()
    path.unlink()
    with path.open("wb") as file:
        file.write(content[:start])
        file.seek(end)
        file.write(content[end:])
        file.truncate(len(content))


def dead_runs(parts: list[tuple[int, int, Class]]) -> Iterator[tuple[int, int]]:
    """Yield the whole pages of neighbours that are dead, behind the header of the first."""
    start = None
    for first, _, kind in [*parts, (parts[-1][1], 0, Class.LIVE)]:
        if kind == Class.DEAD and start is None:
            start = first
        elif kind != Class.DEAD and start is not None:
            begin = -(-(start + NEEDLE_HEADER_BYTES_MAX) // 4096) * 4096
            if first // 4096 * 4096 > begin:
                yield begin, first // 4096 * 4096
            start = None


def test_holes_are_free_and_no_longer_to_be_punched(used: Path) -> None:
    parts = expected(used)
    runs = {volume: list(dead_runs(rows)) for volume, rows in parts.items()}
    assert sum(map(len, runs.values())) > 3
    for usage in usages(used):
        assert usage.punchable_bytes == sum(end - start for start, end in runs[usage.volume_id])
    punched = {volume: each[0] for volume, each in runs.items() if each}
    for volume, (start, end) in punched.items():
        make_hole(volume_file(used, volume), start, end)
    for usage in usages(used):
        start, end = punched.get(usage.volume_id, (0, 0))
        assert usage.bytes_of()[Class.FREE] == end - start
        assert usage.punchable_bytes == sum(end - start for start, end in runs[usage.volume_id][1:])
        if end:
            assert usage.spread(np.array([start, end], float))[0, Class.FREE] == end - start
            assert usage.spread(np.array([start - 1, start, end, end + 1], float))[[0, 2], Class.FREE].tolist() == [
                0,
                0,
            ]


# -- cells ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from(Class)), min_size=1, max_size=30), st.integers(1, 40))
def test_spreading_loses_no_byte_and_cells_show_each_class_its_due(parts: list[tuple[int, Class]], count: int) -> None:
    bounds = np.cumsum([0, *(length for length, _ in parts)]).astype(np.int64)
    classes = np.array([kind for _, kind in parts], np.uint8)
    usage = VolumeUsage(1, True, bounds, classes, bounds[:-1], 0)
    single = np.repeat(classes, np.diff(bounds))
    edges = np.linspace(0, usage.size, count + 1)
    spread = usage.spread(edges)
    for low, high, amounts in zip(edges[:-1], edges[1:], spread, strict=True):
        for kind in Class:
            each = sum(max(0.0, min(high, at + 1) - max(low, at)) for at in np.flatnonzero(single == kind))
            assert amounts[kind] == pytest.approx(each, abs=1e-6)
    cells = choose_cells(spread)
    assert len(cells) == count
    # No cell shows what it has nothing of, and over all cells no class is far from what it should have.
    assert all(spread[at, cell] > 0 for at, cell in enumerate(cells))
    if count == usage.size:
        assert cells.tolist() == single.tolist()


def test_few_dead_bytes_everywhere_are_seen_as_such() -> None:
    spread = np.zeros((100, len(Class)))
    spread[:, Class.LIVE], spread[:, Class.DEAD] = 90.0, 10.0
    cells = choose_cells(spread)
    assert 9 <= np.count_nonzero(cells == Class.DEAD) <= 11


def test_a_share_is_never_nothing_of_something_nor_all_of_less() -> None:
    shares = [0.0, 0.0001, 0.01, 0.504, 0.9999, 1.0]
    assert [share_text(share) for share in shares] == ["0 %", "<1 %", "1 %", "50 %", "99 %", "100 %"]


# -- the terminal -----------------------------------------------------------------------------------------------------


def test_the_terminal_shows_a_row_per_volume_and_the_totals(
    used: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    done = run("map", used)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    found = usages(used)
    rows = [re.fullmatch(r" *(\d+) +([\d.]+ \w+) +(<?\d+ %)  ([█▓░·]+)", line) for line in lines[1 : len(found) + 1]]
    for row, usage in zip(rows, found, strict=True):
        assert row is not None
        assert row.groups()[:3] == (str(usage.volume_id), binary_size(usage.size), share_text(live_share(usage)))
    assert max(map(len, lines[: len(found) + 1])) <= 90
    largest = max(found, key=lambda usage: usage.size)
    assert len(rows[found.index(largest)][4]) == 90 - len("volume   1023.9 MiB   100 %  ")  # type: ignore[index]
    for usage, row in zip(found, rows, strict=True):
        assert row is not None
        share = row[4].count("░") / len(row[4])
        assert share == pytest.approx(usage.bytes_of()[Class.DEAD] / usage.size, abs=2 / len(row[4]))
    amounts = sum(usage.bytes_of() for usage in found)
    for kind in Class:
        assert any(re.match(rf"{kind.name.lower()} .* {re.escape(binary_size(int(amounts[kind])))} ", x) for x in lines)
    sparse = [usage for usage in found if usage.sealed and live_share(usage) < 0.7]
    assert len(sparse) > 1
    gain = sum(int(usage.bytes_of()[Class.DEAD]) for usage in sparse) + NEEDLES_START * (len(sparse) - 1)
    assert f"{len(sparse)} sealed volumes are less than 70 % live: compaction copies " in done.out
    assert f" and gives back {binary_size(gain)}.\n" in done.out
    assert lines[-1] == f"Punching holes gives back {binary_size(sum(usage.punchable_bytes for usage in found))}."


def on_a_terminal(*arguments: str | Path, columns: int, **environment: str) -> str:
    """Return what a command prints on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        names = {"COLUMNS", "NO_COLOR", "LINES"}
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=theirs, stderr=theirs, env=inherited | {"TERM": "xterm"} | environment
        )
    finally:
        os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:
        pass  # as Linux says that the other end is closed
    finally:
        os.close(ours)
        assert process.wait(timeout=30) == 0
    return output.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_and_its_width(used: Path) -> None:
    shown = on_a_terminal("map", used, columns=60)
    assert "\x1b[32m█" in shown
    assert "\x1b[33m░" in shown
    rows = _SKIPPED.sub("", shown).splitlines()[: len(usages(used)) + 1]
    assert max(map(len, rows)) <= 60
    assert max(map(len, rows)) > 55


def test_no_color_means_none(used: Path) -> None:
    shown = on_a_terminal("map", used, columns=60, NO_COLOR="1")
    assert "\x1b" not in shown
    assert "█" in shown


def test_without_unicode_it_is_drawn_in_ascii(used: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "map", used],
        capture_output=True,
        timeout=30,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.stdout.isascii()
    assert re.search(rb"%  [#+.-]+\n", done.stdout)


def test_a_new_store_has_nothing_to_give_back(store: Path, run: Run) -> None:
    done = run("map", store)
    assert "No sealed volume is less than 70 % live: compaction has nothing to do.\n" in done.out
    assert done.out.endswith("Punching holes gives back 0 bytes.\n")


# -- pictures ---------------------------------------------------------------------------------------------------------

_PIXEL = {
    kind: [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in picture._COLOURS[kind]] for kind in Class
}


def test_a_png_gives_each_class_the_area_that_is_its_due(used: Path, run: Run, tmp_path: Path) -> None:
    volume, (start, end) = next(
        (volume, run) for volume, rows in expected(used).items() for run in list(dead_runs(rows))[:1]
    )
    make_hole(volume_file(used, volume), start, end)
    output = tmp_path / "map.png"
    done = run("map", "-o", output, used)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"drew {len(usages(used))} volumes in {output}\n"
    with Image.open(output) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    scale = picture._SCALE
    area = pixels[picture._TOP * scale : -picture._BOTTOM * scale, picture._LEFT * scale : -picture._RIGHT * scale]
    amounts = sum(usage.bytes_of() for usage in usages(used))
    assert isinstance(amounts, np.ndarray)
    counts = [
        sum(int((area == np.array(colour)).all(axis=2).sum()) for colour in {tuple(c) for c in _PIXEL[kind]})  # type: ignore[arg-type]
        for kind in Class
    ]
    for kind in Class:
        assert amounts[kind] > 0
        assert counts[kind] / sum(counts) == pytest.approx(amounts[kind] / amounts.sum(), abs=0.005)


def test_an_svg_says_what_it_shows(used: Path, run: Run, tmp_path: Path) -> None:
    odd = used.rename(tmp_path / "a <b> & \n c")
    output = tmp_path / "map.SVG"
    assert run("map", "-o", output, odd).code == 0
    root = ElementTree.parse(output).getroot()
    texts = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == f"Volumes of {tmp_path}/a <b> & \\n c"
    for kind in Class:
        assert any(text.startswith(kind.name.lower() + " ") for text in texts)
    for usage in usages(odd):
        assert str(usage.volume_id) in texts
    assert any("gives back" in text for text in texts)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    ends = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", output.read_text())
    assert max(float(x) + float(length) for x, _, length in ends) <= width
    assert max(float(y) for _, y, _ in ends) <= height


def test_needles_stand_out_where_they_are_wide_enough(used: Path, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "map.svg"
    assert run("map", "-o", output, used).code == 0
    path = re.search(rf'stroke="{picture._COLOURS[Class.LIVE][1]}"[^>]* d="([^"]*)"', output.read_text())
    assert path is not None
    live = sum(kind == Class.LIVE for rows in expected(used).values() for _, _, kind in rows)
    assert live * 0.8 <= path[1].count("M") <= live


@pytest.mark.parametrize("count", [1, 3, 40, 300, 3000])
def test_any_number_of_volumes_fits_below_each_other(count: int) -> None:
    drawn = Picture("many", [1 << 20] * count)
    bounds, classes = np.array([0, 8192, 1 << 20]), np.array([Class.METADATA, Class.LIVE], np.uint8)
    for number in range(count):
        drawn.add(VolumeUsage(number, True, bounds, classes, bounds[1:2], 0))
    drawn.finish("", [], "")
    rows = sorted((row.y, row.height) for row in drawn._rows)
    labels = [text.y for text in drawn._texts if text.text.isdigit() and text.x < picture._LEFT]
    assert rows[-1][0] <= drawn.size[1]
    assert all(later - earlier >= picture._LABEL_HEIGHT for earlier, later in pairwise(labels))
    assert drawn.size[1] < 1200 or count > 100


def test_without_pillow_it_says_what_to_do(
    used: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    done = run("map", "-o", tmp_path / "map.png", used)
    assert done.code == EXIT_FAILURE
    assert done.err == "imgfs: PNG needs Pillow, which is not installed: pip install 'imgfs[png]', or draw a .svg\n"
    assert run("map", "-o", tmp_path / "map.svg", used).code == 0


def test_a_picture_of_another_format_is_a_wrong_command_line(used: Path, run: Run, tmp_path: Path) -> None:
    done = run("map", "-o", "map.jpg", used)
    assert done.code == EXIT_USAGE
    assert "ends neither in .png nor in .svg" in done.err
    done = run("map", "-o", tmp_path / "nowhere" / "map.svg", used)
    assert done.code == EXIT_FAILURE
    assert done.err == f"imgfs: {tmp_path}/nowhere/map.svg: no such file or directory\n"
