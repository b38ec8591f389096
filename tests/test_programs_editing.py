"""Programs that change images where they lie leave on a mount what they leave on plain XFS."""

import os
import subprocess

import pytest
from beside import Beside
from mounted import failure, run, wait_until
from PIL import Image

pytestmark = [pytest.mark.mount, pytest.mark.root]

OLD = "2001-02-03 04:05:06.123456789"
VIM = ("vim", "-es", "-u", "NONE", "-i", "NONE", "-N")


def _put_text(beside: Beside) -> None:
    """Put a text with two names, an owner, a mode and attributes into both places."""
    beside.run("mkdir", "texts")
    for place in (beside.mount, beside.plain):
        text = place / "texts" / "text"
        text.write_text("".join(f"line {number}\n" for number in range(2000)))
        os.link(text, place / "texts" / "other name")
        os.chown(text, 33, 1234)
        os.chmod(text, 0o640)
        os.setxattr(text, "user.comment", b"kept?")
        os.utime(text, ns=(0, 10**18))


def _put_photos(beside: Beside, count: int) -> None:
    """Put the same photos into both places."""
    for number in range(count):
        photo = beside.outside / f"{number}.jpg"
        Image.effect_noise((304, 208), 50 + number).convert("RGB").save(photo, quality=90)
        os.utime(photo, ns=(0, 10**18 + number))
        beside.run("cp", "-p", photo, f"{number}.jpg")


# -- texts ------------------------------------------------------------------------------------------------------------

EDITORS = {
    "sed": ("sed", "-i", "s/line 7/LINE SEVEN/", "texts/text"),
    "sed, with a backup": ("sed", "-i.bak", "1~2d", "texts/text"),
    "perl": ("perl", "-i.orig", "-pe", "s/line/row/", "texts/text"),
    "vim, as it decides": (*VIM, "-c", "%s/line 7/LINE SEVEN/", "-c", "wq", "texts/text"),
    "vim, in place": (*VIM, "-c", "set backupcopy=yes backup", "-c", "2,1000d", "-c", "wq", "texts/text"),
    "vim, by renaming": (*VIM, "-c", "set backupcopy=no backup", "-c", "$put ='more'", "-c", "wq", "texts/text"),
    "vim, with the original": (*VIM, "-c", "set patchmode=.orig", "-c", "1d", "-c", "w", "-c", "q", "texts/text"),
}


@pytest.mark.parametrize("editor", EDITORS)
def test_editors(beside: Beside, editor: str) -> None:
    _put_text(beside)
    before = beside.check()
    numbers = {place: (place / "texts" / "text").stat().st_ino for place in (beside.mount, beside.plain)}
    beside.run(*EDITORS[editor])
    # An editor that keeps the inode here keeps it there.
    beside.each(lambda place: (place / "texts" / "text").stat().st_ino == numbers[place])
    after = beside.check()
    assert after[b"texts/text"].content != before[b"texts/text"].content
    assert not [path for path in after if path.endswith((b".swp", b"~~"))]


def test_vim_recovers_what_was_not_written(beside: Beside) -> None:
    """A swap file is kept beside the text, and found when the editor has been killed."""
    _put_text(beside)
    swap = ("-c", "set swapfile updatecount=200", "-c", "1s/.*/changed/", "-c", "preserve")
    for place in (beside.mount, beside.plain):
        vim = [*VIM, *swap, "-c", "call writefile([], 'preserved')", "-c", "sleep 60", "texts/text"]
        with subprocess.Popen(vim, cwd=place) as editor:
            try:
                wait_until((place / "preserved").exists, "the text is preserved", process=editor)
            finally:
                editor.kill()
        assert (place / "texts" / ".text.swp").stat().st_size > 10_000
    beside.run(*VIM, "-c", "recover", "-c", "wq! recovered", "texts/text", code=1)
    assert beside.each(lambda place: (place / "recovered").read_text()).startswith("changed\nline 1\n")


# -- photos -----------------------------------------------------------------------------------------------------------


def test_mogrify(beside: Beside) -> None:
    _put_photos(beside, 5)
    beside.run("mogrify", "-resize", "50%", *(f"{number}.jpg" for number in range(5)))
    beside.run("mogrify", "-format", "png", "-define", "png:exclude-chunks=date,time", "0.jpg")
    beside.check()
    assert sorted(os.listdir(beside.mount)) == ["0.jpg", "0.png", *(f"{number}.jpg" for number in range(1, 5))]
    for number in range(5):
        with Image.open(beside.mount / f"{number}.jpg") as photo:
            photo.load()
            assert photo.size == (152, 104)


def test_jpegtran(beside: Beside) -> None:
    _put_photos(beside, 2)
    beside.run("jpegtran", "-copy", "all", "-rotate", "90", "-outfile", "turned.jpg", "0.jpg")
    # Onto the image it reads, as its manual page allows.
    beside.run("jpegtran", "-optimize", "-progressive", "-outfile", "1.jpg", "1.jpg")
    beside.check()
    with Image.open(beside.mount / "turned.jpg") as photo:
        assert photo.size == (208, 304)


def test_exiftool(beside: Beside) -> None:
    _put_photos(beside, 3)
    beside.run("exiftool", "-q", "-P", "-Artist=Ä. Photographer", "-DateTimeOriginal=2020:01:02 03:04:05", "0.jpg")
    beside.run("exiftool", "-q", "-P", "-overwrite_original", "-Artist=A", "1.jpg")
    number = (beside.mount / "2.jpg").stat().st_ino
    beside.run("exiftool", "-q", "-overwrite_original_in_place", "-Artist=B", "2.jpg")
    assert (beside.mount / "2.jpg").stat().st_ino == number
    beside.run("exiftool", "-q", "-filename<%f/$Artist.%e", "1.jpg")
    found = beside.check()
    assert {b"0.jpg", b"0.jpg_original", b"1/A.jpg", b"2.jpg"} <= found.keys()
    # exiftool counts time in a double.
    assert found[b"1/A.jpg"].mtime_ns == 10**18
    assert beside.run("exiftool", "-s3", "-Artist", "-DateTimeOriginal", "0.jpg") == (
        "Ä. Photographer\n2020:01:02 03:04:05\n"
    )


# -- attributes -------------------------------------------------------------------------------------------------------


def test_touch(beside: Beside) -> None:
    beside.run("touch", "-d", OLD, "image")
    beside.run("touch", "-d", "1955-05-05 05:05:05", "before 1970")
    beside.run("mkdir", "directory")
    beside.run("touch", "-m", "-t", "203001020304.05", "directory")
    beside.run("touch", "-r", "image", "as image")
    beside.run("touch", "-c", "missing")
    beside.run("ln", "-s", "image", "link")
    beside.run("touch", "-h", "-d", "2002-02-02", "link")
    beside.run("touch", "now")
    for which in ("-m", "-a"):
        beside.run("touch", "-d", OLD, "one time")
        beside.run("touch", which, "-d", "2003-03-03", "one time")
        # A time of access that was set is not kept by the store, but remembered for a while.
        beside.run("stat", "--format=%x %y", "one time")
    found = beside.check()
    assert b"missing" not in found
    assert beside.run("stat", "--format=%y", "image") == f"{OLD} +0000\n"


def test_chmod_chown_and_setfattr(beside: Beside) -> None:
    beside.run("mkdir", "-p", "a/b")
    beside.run("sh", "-c", "for n in 1 2 3; do echo $n > a/$n; echo $n > a/b/$n; done; ln -s 1 a/link")
    beside.run("chown", "-R", "33:1234", "a")
    beside.run("chown", "-h", "1:2", "a/link")
    beside.run("chmod", "-R", "u=rwX,g=rX,o=", "a")
    beside.run("chmod", "7755", "a/1", "a/b")
    beside.run("chown", "34", "a/1")  # takes the set-id bits away
    beside.run("setfattr", "-n", "user.comment", "-v", "Über", "a/1", "a/b")
    beside.run("setfattr", "-n", "trusted.note", "-v", "0x00ff", "a/2")
    beside.run("setfattr", "-n", "user.gone", "-v", "", "a/1")
    beside.run("setfattr", "-x", "user.gone", "a/1")
    beside.run("setfattr", "-x", "user.gone", "a/1", code=1)
    # Attributes of users belong to images and directories alone.
    beside.run("setfattr", "-h", "-n", "user.comment", "-v", "x", "a/link", code=1)
    for place in (beside.mount, beside.plain):
        run("sh", "-c", f"getfattr -R -d -m - a > {beside.outside}/{place.name}.attributes", cwd=place)
    found = beside.check()
    assert found[b"a/1"].mode == 0o101755
    assert found[b"a/b"].attributes == (("user.comment", "Über".encode()),)
    # They come back from what getfattr wrote down.
    beside.run("setfattr", "-x", "user.comment", "a/b")
    for place in (beside.mount, beside.plain):
        run("setfattr", f"--restore={beside.outside}/{place.name}.attributes", cwd=place)
    assert beside.check()[b"a/b"].attributes == (("user.comment", "Über".encode()),)


def test_programs_run_from_the_mount(beside: Beside) -> None:
    beside.run("cp", "-p", "/bin/sleep", "sleep")
    beside.run("sh", "-c", "printf '#!/bin/sh\\necho ran $0\\n' > script; chmod +x script")
    assert beside.run("./script") == "ran ./script\n"
    for place in (beside.mount, beside.plain):
        with subprocess.Popen(["./sleep", "60"], cwd=place) as sleep:
            try:
                assert failure(os.open, place / "sleep", os.O_WRONLY) == "ETXTBSY"
                # A new one is put in place of one that runs.
                run("install", "/bin/true", "sleep", cwd=place)
                assert sleep.poll() is None
            finally:
                sleep.kill()
    assert beside.run("./sleep") == ""
    beside.check()
