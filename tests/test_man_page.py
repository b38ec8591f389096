"""The manual page says what the command line understands, no more and no less."""

import re
import subprocess
from pathlib import Path

import click

from imgfs.cli import COMMANDS, EXIT_BROKEN_PIPE, EXIT_BUG, EXIT_INTERRUPTED, imgfs
from imgfs.errors import EXIT_CODES

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
    return {
        name
        for parameter in command.params
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
