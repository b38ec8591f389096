"""The Debian nginx, its workers as www-data, with the configuration we ship, serves a mounted store."""

import email.utils
import functools
import os
import pwd
import shutil
from pathlib import Path

import pytest
from mounted import Mounted, as_user
from PIL import Image
from web_server import WORKER, Nginx

from imgfs.errors import EXIT_DAMAGED
from imgfs.settings import MIB
from imgfs.store import Store

pytestmark = [pytest.mark.mount, pytest.mark.root]


@pytest.fixture
def stopped_nginx(web_server: Nginx, mounted: Mounted) -> Nginx:
    """An nginx that is not started yet, on a mount with some photos."""
    _put_photos(mounted.point)
    return web_server


@pytest.fixture
def nginx(stopped_nginx: Nginx) -> Nginx:
    """A running nginx, as shipped, on a mount with some photos."""
    stopped_nginx.start()
    return stopped_nginx


def _put_photos(root: Path) -> None:
    (root / "2024").mkdir()
    for name, side in (("2024/small.jpg", 40), ("2024/large.jpg", 1400), ("logo.png", 100)):
        Image.effect_noise((side, side), 90).convert("RGB").save(root / name, quality=95)
    (root / "2024" / "huge.bin").write_bytes(os.urandom(9 * MIB + 17))
    os.utime(root / "2024" / "small.jpg", ns=(0, 1_500_000_000_987_654_321))


# -- what is served ---------------------------------------------------------------------------------------------------

NO_CACHE = ("open_file_cache max=10000 inactive=60s;", "open_file_cache off;")
AIO = ("aio off;", "aio threads;")
with_and_without_its_cache = pytest.mark.parametrize("cache", [(), (NO_CACHE,)], ids=["cache", "no cache"])


@pytest.mark.parametrize("changes", [(), (NO_CACHE,), (AIO,), (NO_CACHE, AIO)], ids=["", "no cache", "aio", "both"])
def test_images_arrive_whole_cold_and_warm(
    stopped_nginx: Nginx, mounted: Mounted, changes: tuple[tuple[str, str], ...]
) -> None:
    nginx, root = stopped_nginx, mounted.point
    mounted.drop_caches()
    nginx.start(*changes)
    for _ in range(3):
        for name, kind in [
            ("2024/small.jpg", "image/jpeg"),
            ("2024/large.jpg", "image/jpeg"),
            ("logo.png", "image/png"),
            ("2024/huge.bin", "application/octet-stream"),
        ]:
            answer = nginx.ask(f"/{name}")
            status = os.stat(root / name)
            assert answer.status == 200
            assert answer.body == (root / name).read_bytes()
            assert answer.headers["Content-Type"] == kind
            assert answer.headers["ETag"] == f'"{int(status.st_mtime):x}-{status.st_size:x}"'
            assert answer.headers["Last-Modified"] == email.utils.formatdate(int(status.st_mtime), usegmt=True)
    assert nginx.error_log.read_text() == ""


@with_and_without_its_cache
def test_what_a_client_has_is_not_sent_again(
    stopped_nginx: Nginx, mounted: Mounted, cache: tuple[tuple[str, str], ...]
) -> None:
    nginx = stopped_nginx
    nginx.start(*cache)
    first = nginx.ask("/2024/small.jpg")
    tag, modified = first.headers["ETag"], first.headers["Last-Modified"]
    assert nginx.ask("/2024/small.jpg", If_None_Match=tag).status == 304
    assert nginx.ask("/2024/small.jpg", If_Modified_Since=modified).status == 304
    assert nginx.ask("/2024/small.jpg", If_None_Match='"other"').body == first.body
    nginx.stop()
    mounted.stop()
    mounted.start()
    nginx.start(*cache)
    assert nginx.ask("/2024/small.jpg", If_None_Match=tag).status == 304


def test_head_and_ranges(nginx: Nginx, mounted: Mounted) -> None:
    data = (mounted.point / "2024" / "huge.bin").read_bytes()
    head = nginx.ask("/2024/huge.bin", "HEAD")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(data)))
    for start, end in [(0, 0), (MIB - 1, MIB), (5 * MIB + 3, 6 * MIB), (len(data) - 1, len(data) - 1)]:
        part = nginx.ask("/2024/huge.bin", Range=f"bytes={start}-{end}")
        assert (part.status, part.body) == (206, data[start : end + 1])
        assert part.headers["Content-Range"] == f"bytes {start}-{end}/{len(data)}"
    assert nginx.ask("/2024/huge.bin", Range="bytes=-5").body == data[-5:]
    assert nginx.ask("/2024/huge.bin", Range=f"bytes={len(data)}-").status == 416


@with_and_without_its_cache
def test_what_is_not_there_is_404_until_it_is_there(
    stopped_nginx: Nginx, mounted: Mounted, cache: tuple[tuple[str, str], ...]
) -> None:
    nginx = stopped_nginx
    nginx.start(*cache)
    for _ in range(2):
        assert nginx.ask("/2024/absent.jpg").status == 404
        assert nginx.ask("/2024/small.jpg/below").status == 404
        assert nginx.ask("/absent/directory/image.jpg").status == 404
        assert nginx.ask("/" + "n" * 256).status == 404
    (mounted.point / "2024" / "absent.jpg").write_bytes(b"here")
    assert nginx.ask("/2024/absent.jpg").body == b"here"


def test_try_files_goes_on_to_the_next_name(nginx: Nginx, mounted: Mounted) -> None:
    original = (mounted.point / "2024" / "small.jpg").read_bytes()
    assert nginx.ask("/thumbs/2024/small.jpg").body == original
    (mounted.point / "thumbs" / "2024").mkdir(parents=True)
    (mounted.point / "thumbs" / "2024" / "small.jpg").write_bytes(b"thumbnail")
    assert nginx.ask("/thumbs/2024/small.jpg").body == b"thumbnail"
    assert nginx.ask("/thumbs/2024/absent.jpg").status == 404


def test_who_must_not_read_gets_403(nginx: Nginx, mounted: Mounted) -> None:
    os.chmod(mounted.point / "logo.png", 0o600)
    assert nginx.ask("/logo.png").status == 403
    os.chmod(mounted.point / "logo.png", 0o644)
    assert nginx.ask("/logo.png").status == 200


# -- uploads ----------------------------------------------------------------------------------------------------------


def test_an_upload_by_temporary_file_and_rename(stopped_nginx: Nginx, mounted: Mounted) -> None:
    """What an application does that runs as the web server's user."""
    nginx = stopped_nginx
    nginx.start(NO_CACHE)
    directory = mounted.point / "uploads"
    directory.mkdir()
    shutil.chown(directory, WORKER, WORKER)
    worker = pwd.getpwnam(WORKER)
    for data in (os.urandom(300_000), os.urandom(5 * MIB)):
        as_user(worker.pw_uid, worker.pw_gid, functools.partial(_upload, directory, data))
        answer = nginx.ask("/uploads/photo.jpg")
        assert answer.body == data
        assert answer.headers["Last-Modified"] == email.utils.formatdate(1_600_000_000, usegmt=True)
    status = (directory / "photo.jpg").stat()
    assert (status.st_uid, status.st_mtime_ns) == (worker.pw_uid, 1_600_000_000_123_456_789)
    assert os.listdir(directory) == ["photo.jpg"]


def _upload(directory: Path, data: bytes) -> None:
    temporary = directory / ".photo.jpg.tmp"
    with open(temporary, "xb") as file:
        file.write(data)
        os.fsync(file.fileno())
    os.chmod(temporary, 0o640)
    os.utime(temporary, ns=(0, 1_600_000_000_123_456_789))
    os.rename(temporary, directory / "photo.jpg")


@pytest.mark.parametrize("same_mount", [True, False])
def test_an_upload_by_put(stopped_nginx: Nginx, mounted: Mounted, same_mount: bool) -> None:
    nginx = stopped_nginx
    changes = [NO_CACHE]
    if not same_mount:
        changes.append((f"client_body_temp_path {mounted.point}/.incoming;", ""))
    for name in (".incoming", "upload"):
        (mounted.point / name).mkdir()
        shutil.chown(mounted.point / name, WORKER, WORKER)
    nginx.start(*changes, uploads=True)
    for status, data in ((201, os.urandom(700_000)), (204, os.urandom(6 * MIB))):
        assert nginx.ask("/upload/2025/photo.jpg", "PUT", data).status == status
        assert nginx.ask("/upload/2025/photo.jpg").body == data
    mounted.kill()
    nginx.stop()
    mounted.start()
    assert (mounted.point / "upload" / "2025" / "photo.jpg").read_bytes() == data
    assert os.listdir(mounted.point / ".incoming") == []


# -- damage -----------------------------------------------------------------------------------------------------------


@with_and_without_its_cache
def test_a_damaged_image_is_a_5xx_that_error_page_catches(
    stopped_nginx: Nginx, mounted: Mounted, cache: tuple[tuple[str, str], ...]
) -> None:
    nginx = stopped_nginx
    mounted.stop()
    with Store.open(str(mounted.store), writable=False) as store:
        place = store.locate(store.resolve(b"2024/large.jpg"))
    with open(mounted.store / "volumes" / f"{place.volume:08d}.vol", "r+b") as volume:
        volume.seek(place.data_offset + place.size // 2)
        byte = volume.read(1)[0]
        volume.seek(-1, os.SEEK_CUR)
        volume.write(bytes([byte ^ 1]))
    mounted.expected_log.append(r"open: volume \d+, offset \d+, inode 0x[0-9a-f]+: .* damaged")
    mounted.check_code = EXIT_DAMAGED
    mounted.start()
    nginx.start(*cache)
    for _ in range(2):
        answer = nginx.ask("/2024/large.jpg")
        assert answer.status == 503
        assert answer.body == b"This image cannot be read at the moment.\n"
        assert answer.headers["Cache-Control"] == "no-store"
        assert nginx.ask("/thumbs/2024/large.jpg").status == 503
        assert nginx.ask("/2024/small.jpg").status == 200
    assert "(5: Input/output error)" in nginx.error_log.read_text()
    assert "is damaged" in mounted.log.read_text()
    # A new copy heals it.
    (mounted.point / "2024" / "large.jpg").write_bytes(b"new copy")
    assert nginx.ask("/2024/large.jpg").body == b"new copy"
    mounted.check_code = EXIT_DAMAGED  # the old needle is still in its volume
