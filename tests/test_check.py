"""Damage is found wherever it is, told with volume, offset and image, and costs nothing else."""

from pathlib import Path

import pytest
from command_line import Run, flip, place_of, volume_file

from imgfs.errors import EXIT_DAMAGED, EXIT_REPAIRED
from imgfs.store import Store


def test_a_clean_store(filled: Path, run: Run) -> None:
    done = run("check", filled)
    assert done.code == 0
    assert done.err == ""
    assert done.out.startswith("nothing is damaged: checked ")


def test_damaged_data_is_named_with_volume_offset_and_image(filled: Path, run: Run) -> None:
    place = place_of(filled, "album 0/IMG_0004.jpg", run)
    flip(volume_file(filled, place["volume"]), place["data_offset"] + 4999)
    done = run("check", filled)
    assert done.code == EXIT_DAMAGED
    where = f"volume {place['volume']}, offset {place['offset']}, album 0/IMG_0004.jpg"
    assert done.err == f"imgfs: damaged: {where}: the data does not match its checksum\n"
    assert done.out.startswith("1 damaged place: checked ")


def test_a_damaged_header_costs_one_image(filled: Path, tmp_path: Path, run: Run) -> None:
    place = place_of(filled, "album 1/IMG_0005.jpg", run)
    flip(volume_file(filled, place["volume"]), place["offset"] + 20)
    done = run("check", filled)
    assert done.code == EXIT_DAMAGED
    where = f"volume {place['volume']}, offset {place['offset']}, album 1/IMG_0005.jpg"
    assert done.err == f"imgfs: damaged: {where}: its header is damaged\n"
    assert run("export", filled, tmp_path / "out").out.startswith("exported 19 images")


def test_damage_to_what_was_replaced_is_damage_too(filled: Path, photos: Path, run: Run) -> None:
    place = place_of(filled, "album 0/IMG_0004.jpg", run)
    (photos / "album 0" / "IMG_0004.jpg").write_bytes(b"new")
    assert run("import", photos, filled, "--resume").code == 0
    flip(volume_file(filled, place["volume"]), place["data_offset"])
    done = run("check", filled)
    assert done.code == EXIT_DAMAGED
    where = f"volume {place['volume']}, offset {place['offset']}"
    assert done.err == (f"imgfs: damaged: {where}: the data does not match its checksum; no image needs it any more\n")


@pytest.mark.parametrize("at", [20, 4096 + 20])
def test_a_damaged_copy_of_a_volume_header_is_named(at: int, filled: Path, run: Run) -> None:
    flip(volume_file(filled, 2), at)
    done = run("check", filled)
    assert done.code == EXIT_DAMAGED
    assert done.err == (
        f"imgfs: damaged: volume 2, offset {at - 20}: one of the two copies of the volume's header is damaged\n"
    )


def test_any_flipped_bit_of_a_sealed_volume_is_found(filled: Path, run: Run) -> None:
    volume = volume_file(filled, 1)
    content = volume.read_bytes()
    missed = []
    for at in range(8192, len(content), 977):
        flip(volume, at)
        if run("check", "-q", filled).code != EXIT_DAMAGED:
            missed.append(content[at])
        flip(volume, at)
    assert missed == []


def test_missing_index_files_are_made_anew(filled: Path, run: Run) -> None:
    (filled / "volumes" / "00000001.idx").unlink()
    done = run("check", filled)
    assert done.code == EXIT_REPAIRED
    assert done.err.startswith("imgfs: made anew: ")
    assert run("check", filled).code == 0


def test_a_store_in_use_is_checked_beside_its_writer(filled: Path, run: Run) -> None:
    place = place_of(filled, "album 0/IMG_0004.jpg", run)
    with Store.open(str(filled)) as store:
        store.put(1, b"more", b"more", 4, mode=0o644, uid=0, gid=0, mtime_ns=0)
        assert run("check", filled).code == 0
        flip(volume_file(filled, place["volume"]), place["data_offset"])
        assert run("check", filled).code == EXIT_DAMAGED
        assert store.lookup(1, b"more")


def test_what_a_crash_tore_is_told_and_is_no_damage(filled: Path, run: Run) -> None:
    last = max((filled / "volumes").glob("*.vol"))
    with last.open("ab") as volume:
        volume.write(b"half a needle" * 10)
    done = run("check", filled)
    assert done.code == 0
    assert done.err == "imgfs: 130 bytes were torn by a crash before they were durable, and are left out\n"
    assert run("check", filled).err == ""


def test_rebuild_index_makes_the_same_files_again(filled: Path, run: Run) -> None:
    def index() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (filled / "volumes").iterdir() if path.suffix != ".vol"}

    before, listing = index(), run("ls", filled, "-lR").out
    done = run("rebuild-index", filled)
    assert done.code == 0
    assert done.out == f"made {len(before)} index files anew for 24 entries\n"
    after = index()
    assert set(after) == set(before)
    assert all(after[name].startswith(content) for name, content in before.items())
    assert run("ls", filled, "-lR").out == listing
    assert run("check", filled).code == 0
