"""Copying and moving on a mount gives what it gives on plain XFS: cp, rsync, tar, mv, ln, install, dd."""

import os
import shutil
from pathlib import Path

import pytest
from beside import Beside, Facts, facts, make_photos, make_special
from mounted import run

from imgfs.settings import KIB, MIB

pytestmark = [pytest.mark.mount, pytest.mark.root]

TAR = ("tar", "--xattrs", "--xattrs-include=*", "--numeric-owner")
# Directories of other programs' making; what `rsync -i` says of a file that it would bring up to date.
RSYNC = ("rsync", "-aHX", "--modify-window=-1", "--numeric-ids")


def _source(beside: Beside) -> tuple[Path, dict[bytes, Facts]]:
    """Make a tree with all there can be in one, outside; return it and what is to be seen of it."""
    source = beside.outside / "source"
    source.mkdir()
    make_photos(source, seed=11)
    make_special(source / "special")
    return source, facts(source)


def _copied(beside: Beside, name: str, expected: dict[bytes, Facts]) -> None:
    """Check that the tree *name* is there in both places as *expected*."""
    assert beside.each(lambda place: facts(place / name)) == expected


# -- trees ------------------------------------------------------------------------------------------------------------


def test_cp_in_across_and_out(beside: Beside) -> None:
    source, expected = _source(beside)
    beside.run("cp", "-a", source, "in")
    beside.run("cp", "-a", "in", "across")
    _copied(beside, "in", expected)
    _copied(beside, "across", expected)
    run("cp", "-a", beside.mount / "across", beside.outside / "out")
    assert facts(beside.outside / "out") == expected


def test_cp_of_names_alone(beside: Beside) -> None:
    source, expected = _source(beside)
    beside.run("cp", "-a", source, "tree")
    beside.run("cp", "-al", "tree", "names")
    assert beside.run("find", "tree", "names", "-type", "f", "-links", "1") == ""
    assert beside.check()[b"tree/special/image"].links == 6
    beside.run("rm", "-rf", "tree")
    _copied(beside, "names", expected)


def test_rsync_in_and_out(beside: Beside) -> None:
    source, expected = _source(beside)
    beside.run(*RSYNC, f"{source}/", "in")
    _copied(beside, "in", expected)
    assert beside.run(*RSYNC, "-ic", "--delete", f"{source}/", "in") == ""
    run(*RSYNC, f"{beside.mount}/in/", beside.outside / "out")
    assert facts(beside.outside / "out") == expected


def test_rsync_of_what_changed(beside: Beside) -> None:
    """Links, attributes and kinds change; what had been a directory becomes an image, and the reverse."""
    source, _ = _source(beside)
    beside.run(*RSYNC, f"{source}/", "tree")
    special = source / "special"
    os.unlink(special / "other name")
    (special / "other name").write_bytes(b"an image of its own")
    os.setxattr(special / "image", "user.comment", b"another")
    os.removexattr(special / "image", "user.empty")
    os.unlink(special / "fifo")
    (special / "fifo").mkdir()
    (special / "fifo" / "image").write_bytes(b"new")
    shutil.rmtree(special / "below")
    os.link(special / "image", special / "below")
    for path in special.rglob("*"):
        os.utime(path, ns=(0, 9 * 10**17), follow_symlinks=False)
    os.utime(special, ns=(0, 9 * 10**17))
    beside.run(*RSYNC, "--delete", f"{source}/", "tree")
    _copied(beside, "tree", facts(source))


def test_rsync_in_place(beside: Beside) -> None:
    source = beside.outside / "source"
    source.mkdir()
    data = bytearray(os.urandom(3 * MIB))
    (source / "image").write_bytes(data)
    in_place = (*RSYNC, "--inplace", "--no-whole-file", "--block-size=4096", f"{source}/image", "image")
    beside.run(*in_place)
    number = (beside.mount / "image").stat().st_ino
    data[MIB : MIB + 10] = b"ten bytes."
    (source / "image").write_bytes(data + b"and more")
    beside.run(*in_place)
    assert (beside.mount / "image").stat().st_ino == number
    assert beside.each(lambda place: (place / "image").read_bytes()) == data + b"and more"
    (source / "image").write_bytes(data[: 2 * MIB])
    beside.run(*in_place)
    beside.check()
    assert (beside.mount / "image").read_bytes() == data[: 2 * MIB]


def test_tar_in_and_out(beside: Beside) -> None:
    source, _ = _source(beside)
    # What tar does not keep: sockets, and further names of what is neither an image nor a link.
    for path in (source / "special" / "socket", source / "special" / "below" / "fifo"):
        os.unlink(path)
        os.utime(path.parent, ns=(0, 10**18))
    expected = facts(source)
    archive = beside.outside / "a.tar"
    run(*TAR, "--format=posix", "-cf", archive, "-C", source, ".")
    beside.run("mkdir", "in")
    beside.run(*TAR, "-xpf", archive, "-C", "in")
    _copied(beside, "in", expected)
    assert beside.run(*TAR, "--compare", "-f", archive, "-C", "in") == ""
    run(*TAR, "--format=posix", "-cf", beside.outside / "b.tar", "-C", beside.mount / "in", ".")
    (beside.outside / "out").mkdir()
    run(*TAR, "-xpf", beside.outside / "b.tar", "-C", beside.outside / "out")
    assert facts(beside.outside / "out") == expected


def test_tar_brings_its_archive_up_to_date(beside: Beside) -> None:
    """An archive on the mount is appended to in place."""
    beside.run("mkdir", "photos")
    for number in range(5):
        data = os.urandom(50_000)
        beside.write(f"photos/{number}", data)
        beside.run("touch", "-d", f"2001-02-03 04:05:{number:02d}", f"photos/{number}")
        beside.run("tar", "--append", "-f", "photos.tar", f"photos/{number}")
    beside.run("tar", "--delete", "-f", "photos.tar", "photos/2")
    assert beside.run("tar", "-tf", "photos.tar") == "".join(f"photos/{number}\n" for number in (0, 1, 3, 4))
    assert beside.run("tar", "--compare", "-f", "photos.tar") == ""
    beside.check()


# -- one image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--sparse=always", "--sparse=never", "--sparse=auto", "--reflink=auto"])
def test_cp_of_an_image_with_holes(beside: Beside, how: str) -> None:
    source = beside.outside / "holes"
    with open(source, "wb") as file:
        for offset in (100 * KIB, 3 * MIB, 5 * MIB):
            file.seek(offset)
            file.write(os.urandom(70_000))
        file.truncate(7 * MIB)
    beside.run("cp", how, source, "in")
    beside.run("cp", how, "in", "across")
    run("cp", how, beside.mount / "across", beside.outside / "out")
    beside.check()
    for copy in (beside.mount / "in", beside.mount / "across", beside.outside / "out"):
        run("cmp", source, copy)


def test_install(beside: Beside) -> None:
    source = beside.outside / "image"
    source.write_bytes(b"image")
    os.utime(source, ns=(0, 1_234_567_890_987_654_321))
    os.chmod(source, 0o4777)
    beside.run("install", "-p", "-D", "-m", "640", "-o", "33", "-g", "1234", source, "a/b/image")
    beside.run("install", "-d", "-m", "2750", "-g", "33", "c/d")
    beside.run("install", "-p", source, "c/d")
    beside.run("install", "-b", "-p", "a/b/image", "c/d/image")
    beside.run("install", "-C", "a/b/image", "c/d/other")
    beside.run("install", "-C", "a/b/image", "c/d/other")
    found = beside.check()
    image = found[b"a/b/image"]
    assert (image.mode, image.uid, image.gid) == (0o100640, 33, 1234)
    assert image.mtime_ns == 1_234_567_890_987_654_321
    assert found[b"c/d"].mode == 0o42750
    assert found[b"c/d/image"].gid == 33


def test_dd_and_truncate(beside: Beside) -> None:
    source = beside.outside / "source"
    source.write_bytes(os.urandom(2 * MIB))
    dd = ("dd", "status=none", f"if={source}")
    beside.run(*dd, "of=whole", "bs=64K")
    beside.run(*dd, "of=direct", "bs=256K", "oflag=direct", "iflag=direct")
    beside.run(*dd, "of=part", "bs=1000", "count=3", "seek=5", "conv=notrunc,fsync")
    beside.run(*dd, "of=part", "bs=1000", "count=2", "skip=7", "seek=1", "conv=notrunc")
    beside.run(*dd, "of=part", "bs=100", "count=1", "oflag=append", "conv=notrunc")
    beside.run(*dd, "of=short", "bs=1000", "count=1", "seek=2")
    beside.run("truncate", "-s", "1234567", "whole")
    beside.run("truncate", "-s", "+10", "part")
    beside.run("truncate", "-r", "part", "new")
    beside.run("split", "-b", "100000", "whole", "part-of-whole-")
    beside.run("sh", "-c", "cat part-of-whole-* | cmp - whole && cat whole >> short && rm part-of-whole-*")
    beside.check()
    assert beside.each(lambda place: (place / "direct").read_bytes()) == source.read_bytes()


# -- names ------------------------------------------------------------------------------------------------------------


def test_mv_within_the_mount(beside: Beside) -> None:
    source, expected = _source(beside)
    beside.run("cp", "-a", source, "a")
    beside.run("mkdir", "b", "b/empty")
    number = (beside.mount / "a" / "special" / "image").stat().st_ino
    beside.run("mv", "a", "b")
    assert (beside.mount / "b" / "a" / "special" / "image").stat().st_ino == number
    beside.run("mv", "-T", "b/a", "b/empty")
    beside.run("mv", "b/empty/special/image", "b/empty/special/below/other name")
    # Two names of one image.
    beside.run("mv", "b/empty/special/below/other name", "b/empty/special/below/third name", code=1)
    beside.run("sh", "-c", "echo 1 > one; echo 2 > two; mv -n one two; mv -b two one; mv --update one two")
    beside.run("mv", "b", "b/empty/b", code=1)
    found = beside.check()
    assert found[b"b/empty/special/below/third name"].links == 3
    assert found[b"b/empty/a"].mtime_ns == expected[b"a"].mtime_ns


def test_mv_from_and_to_another_file_system(beside: Beside) -> None:
    source, expected = _source(beside)
    run("cp", "-a", source, beside.outside / "tree")
    run("mv", beside.outside / "tree", beside.mount / "in")
    assert not (beside.outside / "tree").exists()
    assert facts(beside.mount / "in") == expected
    run("mv", beside.mount / "in", beside.outside / "out")
    assert facts(beside.outside / "out") == expected
    assert os.listdir(beside.mount) == []


def test_ln(beside: Beside) -> None:
    beside.run("sh", "-c", "echo image > image; echo other > other; mkdir a a/b")
    beside.run("ln", "image", "a/b/hard")
    beside.run("ln", "-s", "../image", "a/soft")
    beside.run("ln", "-P", "a/soft", "a/hard link to soft")
    beside.run("ln", "-L", "a/soft", "a/third")
    beside.run("ln", "-f", "other", "a/third")
    beside.run("ln", "-sfn", "b", "a/soft")
    beside.run("ln", "-sr", "image", "a/b/relative")
    beside.run("ln", "image", "other", code=1)
    beside.run("ln", "a", "directory", code=1)
    beside.run("sh", "-c", "echo more >> a/b/hard")
    found = beside.check()
    assert found[b"image"].links == found[b"a/b/hard"].links == 2
    assert (beside.mount / "image").read_text() == "image\nmore\n"
    # The last name keeps the image, whichever was the first.
    beside.run("rm", "image")
    assert beside.check()[b"a/b/hard"].links == 1
    assert beside.run("cat", "a/b/hard") == "image\nmore\n"
    beside.run("rm", "-r", "a", "other")
    assert beside.check().keys() == {b"."}


# -- who may --------------------------------------------------------------------------------------------------------

BY_ROOT = """
    umask 022
    echo text > of-root; chmod 600 of-root
    echo text > of-all; chmod 666 of-all
    mkdir -m 1777 sticky; echo text > sticky/of-root; ln of-all sticky/of-all
    mkdir -m 2775 group; chgrp www-data group
    mkdir home; chown www-data home
"""
BY_USER = """
    umask 027
    cat of-root
    echo more >> of-all; echo more >> of-root
    touch of-all; touch -d 2001-01-01 of-all; chmod 644 of-all
    rm -f sticky/of-root; mv sticky/of-root sticky/other; mv sticky/of-all home
    echo mine > sticky/mine; mv sticky/mine home
    mkdir new; ln of-root home/link; ln -s ../of-root home/link; cat home/link
    cp -a of-all home/copy; cp -p of-root home/of-root
    mkdir group/below; echo mine > group/below/mine
    chmod 6755 home/copy; echo more >> home/copy; chown root home/copy; chgrp www-data home/copy
    setfattr -n user.note -v all of-all; setfattr -n user.note -v root of-root; setfattr -n trusted.note -v all of-all
    setfattr -n user.note -v sticky sticky; mkfifo home/fifo; mknod home/disk b 7 0
    sed -i s/text/TEXT/ home/copy
    rsync -a sticky/ home/sticky; tar -cf - home/copy group/below of-root > /dev/null
    rm -rf group of-all
    mkdir group/another; echo mine > group/another/mine
"""


def test_what_an_ordinary_user_may_do(beside: Beside) -> None:
    beside.run("sh", "-c", BY_ROOT)
    said = beside.run("sh", "-c", f"{{ {BY_USER} }} 2>&1; true", user="www-data")
    for refused in ("cat: of-root", "touch: ", "chmod: ", "mv: ", "mkdir: ", "ln: ", "cp: ", "chown: ", "setfattr: "):
        assert f"\n{refused}" in f"\n{said}"
    found = beside.check()
    assert found[b"group/another/mine"].gid == found[b"group"].gid
    assert found[b"of-all"].attributes == (("user.note", b"all"),)
    assert found[b"home/copy"].uid == found[b"home"].uid
