"""The manual page says what the command line understands, no more and no less."""

import re
import subprocess
from pathlib import Path

import click

from imgfs.cli import COMMANDS, EXIT_BROKEN_PIPE, EXIT_BUG, EXIT_INTERRUPTED, imgfs
from imgfs.errors import EXIT_CODES
from imgfs.mount import READER_TIMEOUT_S, TIMEOUT_S
from imgfs.options import _FLAGS, _VALUES, MountOptions, parse
from imgfs.settings import Settings

PAGE = Path(__file__).parent.parent / "docs" / "imgfs.1"


def sections(macro: str) -> dict[str, str]:
    """Return the source of each section that *macro* begins, by its title."""
    parts = re.split(rf"^\.{macro} (.*)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def documented_options(source: str) -> set[str]:
    """Return the options that head an entry of a list in *source*."""
    found = set()
    for item in re.findall(r"^\.It (Fl .*)$", source, flags=re.MULTILINE):
        for option in item.split(" , "):
            long, short = re.match(r"Fl Fl (\S+)", option), re.match(r"Fl (\w)\b", option)
            found.add(f"--{long[1]}" if long else f"-{short[1]}" if short else option)
    return found


def options(command: click.Command) -> set[str]:
    below = command.commands.values() if isinstance(command, click.Group) and command is not imgfs else ()
    return {
        name
        for each in (command, *below)
        for parameter in each.params
        if isinstance(parameter, click.Option)
        for name in [*parameter.opts, *parameter.secondary_opts]
    }


def test_every_command_has_a_section() -> None:
    assert [title.removeprefix("imgfs ") for title in sections("Ss")] == list(COMMANDS)


def test_every_option_is_explained_under_its_command() -> None:
    context = click.Context(imgfs)
    for name in COMMANDS:
        command = imgfs.get_command(context, name)
        assert command is not None
        source = re.split(r"^\.Sh ", sections("Ss")[f"imgfs {name}"], flags=re.MULTILINE)[0]
        assert documented_options(source) == options(command), name


def mount_options() -> dict[str, str]:
    """Return what the page says of each option of `-o`, by the name of the option."""
    inner = sections("Ss")["imgfs mount"].split(".It Fl o")[1].split(".El")[0]
    parts = re.split(r"^\.It Cm (.*)$", inner, flags=re.MULTILINE)[1:]
    found = {}
    for head, text in zip(parts[::2], parts[1::2], strict=True):
        for item in head.split(" , ") if " Ns = " not in head else [head.split(" Ns = ")[0]]:
            found[item] = text
    return found


def test_every_mount_option_is_explained() -> None:
    explained = set(mount_options())
    assert explained >= {*_FLAGS, *_VALUES}
    for name in explained - set(_VALUES):
        parse([name])


def test_the_defaults_of_mount_options_are_told() -> None:
    texts, defaults = mount_options(), MountOptions()
    assert f"; {TIMEOUT_S:.0f} (a day) unless given, {READER_TIMEOUT_S:.0f} for" in texts["timeout"]
    assert f"; {Settings().sync_interval_s:.0f} unless given" in texts["sync_interval"]
    assert f"; {defaults.read_ahead_kib} unless given" in texts["read_ahead"]
    assert "refuse them, which is the default" in texts["noxattr"]
    assert not defaults.xattrs
    assert "created, which is the default" in texts["publish"]
    assert not defaults.publish_at_close


def test_the_options_of_imgfs_itself_are_explained() -> None:
    source = sections("Sh")["DESCRIPTION"].split(".Ss ")[0]
    assert documented_options(source) == options(imgfs) | {"-h", "--help"}


def test_every_command_stands_in_the_synopsis() -> None:
    assert re.findall(r"^\.Ic (\S+)$", sections("Sh")["SYNOPSIS"], flags=re.MULTILINE) == list(COMMANDS)


def test_every_exit_code_is_explained() -> None:
    codes = {int(code) for code in re.findall(r"^\.It (\d+)$", sections("Sh")["EXIT STATUS"], flags=re.MULTILINE)}
    assert codes == {*EXIT_CODES, EXIT_BUG, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE}


def test_man_renders_it_without_a_warning() -> None:
    command = ["man", "--warnings", "--encoding=UTF-8", "--local-file", str(PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.stderr == ""
    assert "rebuild-index" in done.stdout
