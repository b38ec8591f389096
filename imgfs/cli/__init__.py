"""The command line: `imgfs COMMAND ...`; each group of commands is a module of this package.

Owns how a command ends: here, and nowhere else, an error becomes one line and an exit code. Must not do anything a
command does. The modules of the commands import the store, and so NumPy: only the one that is asked for is imported,
so that `imgfs --help` answers at once.
"""

import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import click

from imgfs import __version__, logs
from imgfs.cli.text import complain
from imgfs.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_BUG,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_NO_SPACE,
    EXIT_OK,
    EXIT_USAGE,
    ImgfsError,
)

# Each command: its module, and what the list of commands says of it; in the order in which one meets them.
COMMANDS = {
    "mkfs": ("upkeep", "Make a new, empty store."),
    "mount": ("mounting", "Mount a store as a directory."),
    "umount": ("mounting", "Unmount a store."),
    "upgrade": ("mounting", "Let the installed release take a mount over."),
    "import": ("copying", "Copy a directory tree into a store."),
    "export": ("copying", "Copy a whole store out into a directory."),
    "snapshot": ("snapshot", "Copy a store, mounted or not, as it is at one moment."),
    "ls": ("looking", "List images and directories."),
    "stat": ("looking", "Show all about one image, and where it lies."),
    "info": ("looking", "Show what a store holds, its limits and its state."),
    "map": ("mapping", "Draw which bytes of the volumes are live, dead or free."),
    "trash": ("trash", "List, bring back, or give up what was deleted."),
    "check": ("upkeep", "Read everything and verify every checksum."),
    "scrub": ("health", "Verify every byte from the disk, also beside a mount."),
    "salvage": ("health", "Copy what is left of a damaged image out."),
    "metrics": ("health", "Print figures of a store for Prometheus."),
    "compact": ("compacting", "Rewrite the volumes that hold little of use."),
    "rebuild-index": ("upkeep", "Make the index files anew from the volumes."),
    "dump": ("dumping", "Print any file of a store as text."),
}


class _LazyGroup(click.Group):
    """The group of `COMMANDS`; imports the module of a command when somebody asks for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"imgfs.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_") + "_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="imgfs", message="%(prog)s %(version)s")
def imgfs() -> None:
    """Keep millions of images in a few large files, and mount them as an ordinary directory.

    \b
    A first store:
      imgfs mkfs /srv/photos.imgfs
      imgfs import ~/Pictures /srv/photos.imgfs
      imgfs mount --daemon /srv/photos.imgfs /srv/photos
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; *arguments* are those behind the program's name."""
    logs.to_stderr(logging.WARNING)
    try:
        with imgfs.make_context("imgfs", list(sys.argv[1:] if arguments is None else arguments)) as context:
            imgfs.invoke(context)
        # What cannot be written must be noticed here, not in the interpreter's shutdown.
        sys.stdout.flush()
        return EXIT_OK
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        complain(_usage_message(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        return EXIT_INTERRUPTED
    except ImgfsError as error:
        complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more when it flushes at exit: give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            return _bug()
        complain(_system_message(error))
        return EXIT_NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else EXIT_FAILURE
    except Exception:
        return _bug()


def _usage_message(error: click.ClickException) -> str:
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{message} (see {error.ctx.command_path} --help)"
    return message


def _system_message(error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    return f"{os.fsdecode(error.filename)}: {reason}" if error.filename is not None else reason


def _bug() -> int:
    traceback.print_exc()
    complain("this is a bug in imgfs; please report it with the lines above")
    return EXIT_BUG
