"""What is shipped around the code works: the unit, the helper of mount(8), make's targets, the scripts.

That `mount -t fuse.imgfs` really mounts is tested in test_mount.py.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import imgfs
from imgfs.mountpoint import CLOSE_PATIENCE_S

PROJECT = Path(__file__).parent.parent
UNIT = PROJECT / "systemd" / "imgfs@.service"
SCRUB_UNIT = PROJECT / "systemd" / "imgfs-scrub@.service"
SCRUB_TIMER = PROJECT / "systemd" / "imgfs-scrub@.timer"
HELPER = PROJECT / "systemd" / "mount.fuse.imgfs"
MAKEFILE = PROJECT / "Makefile"


def run(*command: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run *command* to its end; return its exit code and what it wrote."""
    return subprocess.run(
        command,
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | (environment or {}),
    )


def settings(unit: str) -> dict[str, str]:
    """Return the settings of a unit file by name."""
    return dict(re.findall(r"^(\w+)=(.*)$", unit, flags=re.MULTILINE))


# -- systemd ----------------------------------------------------------------------------------------------------------


def verify(unit: str, directory: Path, name: str = UNIT.name) -> subprocess.CompletedProcess[str]:
    """Lint *unit* as if imgfs were installed."""
    command = directory / "imgfs"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    path = directory / name
    path.write_text(re.sub(r"^(Exec\w+=)imgfs ", rf"\1{command} ", unit, flags=re.MULTILINE))
    return run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path)


def test_the_unit_passes_the_lint_of_systemd(tmp_path: Path) -> None:
    done = verify(UNIT.read_text(), tmp_path)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_lint_finds_a_fault_planted_in_the_unit(tmp_path: Path) -> None:
    done = verify(UNIT.read_text().replace("KillMode=mixed", "KillMode=gently"), tmp_path)
    assert done.returncode == 1
    assert "kill mode" in done.stderr


def test_the_unit_has_no_option_that_would_hide_the_mount() -> None:
    text = UNIT.read_text()
    warned = set(re.findall(r"\w+", text.split("would see it:")[1].split("[Unit]")[0]))
    assert {"PrivateTmp", "ProtectSystem", "ProtectHome", "ReadWritePaths", "PrivateMounts"} <= warned
    assert not warned & settings(text).keys()


def test_the_unit_stops_the_daemon_in_order() -> None:
    unit = settings(UNIT.read_text())
    assert unit["Type"] == "notify"
    assert unit["KillMode"] == "mixed"
    assert int(unit["TimeoutStopSec"]) > CLOSE_PATIENCE_S


def test_the_units_of_the_scrub_pass_it_too(tmp_path: Path) -> None:
    # The timer is linted with the service that it starts beside it.
    for unit in (SCRUB_UNIT, SCRUB_TIMER):
        done = verify(unit.read_text(), tmp_path, unit.name)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = verify(SCRUB_TIMER.read_text().replace("=monthly", "=now and then"), tmp_path, SCRUB_TIMER.name)
    assert "Failed to parse calendar specification" in done.stderr


def test_the_scrub_unit_says_what_the_command_takes(tmp_path: Path) -> None:
    """Its command lines are run as systemd would, without systemd."""
    store, figures = tmp_path / "photos.imgfs", tmp_path / "photos.prom"
    imgfs_command = f"{sys.executable} -m imgfs"
    assert run(*imgfs_command.split(), "mkfs", store).returncode == 0
    unit = settings(SCRUB_UNIT.read_text())
    values = {"SCRUB_RATE": "50M", "STORE": str(store), "METRICS": str(figures)}
    assert "SCRUB_RATE=50M" in unit["Environment"].split()
    start = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], unit["ExecStart"])
    done = run(*start.replace("imgfs", imgfs_command, 1).split())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shell, option, line = unit["ExecStopPost"].split(" ", 2)
    text = line.strip("'").replace("$$", "$").replace("exec imgfs", f"exec {imgfs_command}")
    for metrics, written in (("", False), (str(figures), True)):
        done = run(shell, option, text, environment=values | {"METRICS": metrics})
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert figures.exists() == written
    assert "imgfs_last_scrub_damaged_places" in figures.read_text()


def test_what_is_shipped_for_systemd_is_installed() -> None:
    script = (PROJECT / "scripts" / "install-system.sh").read_text()
    for unit in (PROJECT / "systemd").glob("*@.*"):
        assert f"systemd/{unit.name} " in script


# -- mount(8) ---------------------------------------------------------------------------------------------------------


def help_to_mount(*arguments: str) -> list[str]:
    """Return the arguments with which the helper, called with *arguments*, calls imgfs."""
    done = run(HELPER, *arguments, environment={"IMGFS": r"printf %s\n"})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], ""),
        (["-o", "rw"], "rw"),
        (["-v", "-o", "ro,noatime,noexec,nodev,allow_other,_netdev,nofail,user,suid"], None),
        (["-s", "-n", "-v", "-o", "rw"], "rw"),
        (["-snv", "-t", "fuse.imgfs", "-o", "log=/var/log/a b"], "log=/var/log/a b"),
    ],
)
def test_the_helper_hands_over_what_mount_says(flags: list[str], options: str | None) -> None:
    said = help_to_mount("/srv/my store", "/srv/images", *flags)
    expected = flags[-1] if options is None else options
    assert said == ["mount", "--daemon", "-o", expected, "--", "/srv/my store", "/srv/images"]


def test_the_helper_only_pretends_with_f() -> None:
    assert help_to_mount("/srv/store", "/srv/images", "-f", "-o", "rw") == []


def test_the_helper_refuses_a_namespace_and_what_it_does_not_know() -> None:
    for flags in (["-N", "/proc/1/ns/mnt"], ["-z"]):
        done = run(HELPER, "/srv/store", "/srv/images", *flags, environment={"IMGFS": "false"})
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1


# -- make, scripts, the package ---------------------------------------------------------------------------------------


def test_make_help_lists_all_targets() -> None:
    done = run("make", "--no-print-directory", "help")
    assert (done.returncode, done.stderr) == (0, "")
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE.read_text(), flags=re.MULTILINE)
    assert phony is not None
    assert listed == phony[1].split()
    assert listed == re.findall(r"^([a-z-]+):", MAKEFILE.read_text(), flags=re.MULTILINE)
    for line in done.stdout.splitlines():
        assert len(line.split()) > 1, f"{line!r} says nothing"


def test_every_target_has_a_recipe_that_make_understands() -> None:
    for target in re.findall(r"^([a-z-]+):", MAKEFILE.read_text(), flags=re.MULTILINE):
        done = run("make", "--dry-run", target)
        assert done.returncode == 0, done.stderr


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit\nexit 1\n')
    old.chmod(0o755)
    done = run("scripts/install.sh", environment={"PYTHON": str(old)})
    assert done.returncode == 1
    assert re.fullmatch(r"imgfs: Python 3\.11 or newer is needed, \S+ is 3\.9\.2: .*\n", done.stderr)


def test_scripts_can_be_run_and_are_sound_shell() -> None:
    scripts = [*PROJECT.glob("scripts/*.sh"), PROJECT / "scripts" / "as_root", PROJECT / ".ci" / "run", HELPER]
    for script in scripts:
        assert os.access(script, os.X_OK), script
        interpreter = script.read_text().splitlines()[0].split()[-1].removeprefix("#!")
        assert interpreter in ("bash", "/bin/sh")
        done = run(interpreter, "-n", script)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "imgfs.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", imgfs.__version__)


def test_sample_photos_are_the_same_each_time_and_photos(tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = run(sys.executable, "scripts/make_photos.py", tmp_path / name, "--count", "3", "--seed", "5")
        assert (done.returncode, done.stderr) == (0, "")
    photos = sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(photos) == 3
    for photo in photos:
        twin = tmp_path / "two" / photo.relative_to(tmp_path / "one")
        assert photo.read_bytes() == twin.read_bytes()
        assert photo.stat().st_mtime_ns == twin.stat().st_mtime_ns
        with Image.open(photo) as image:
            image.load()
