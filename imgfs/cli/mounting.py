"""`imgfs mount` and `imgfs umount`.

Owns their options. Must not know how a mount works.
"""

import click

from imgfs.cli.text import echo, path_argument
from imgfs.handover import ask
from imgfs.mountpoint import unmount
from imgfs.options import parse


@click.command("mount")
@path_argument("store_path", "STORE")
@path_argument("mountpoint", "MOUNTPOINT")
@click.option("-o", "options", metavar="OPTS", multiple=True, help="Mount options as in fstab, separated by commas.")
@click.option("--daemon", is_flag=True, help="Return when the store is mounted, and serve it in the background.")
@click.option("--read-only", is_flag=True, help="Refuse every change; the same as -o ro.")
@click.option("--workers", metavar="N", help="Serve with N processes; by default one per two processors, at most 4.")
def mount_command(
    store_path: str, mountpoint: str, options: tuple[str, ...], daemon: bool, read_only: bool, workers: str | None
) -> None:
    """Mount STORE at MOUNTPOINT and serve it until it is unmounted.

    Without --daemon it stays in the foreground; Ctrl-C unmounts. With `-o allow_other` other users, such as a web
    server's, get in as far as the mode bits let them.

    \b
    Example:
      imgfs mount --daemon -o allow_other /srv/photos.imgfs /srv/photos
    """
    parsed = parse([*options, *(["ro"] if read_only else []), *([f"workers={workers}"] if workers else [])])
    # Only here, because pyfuse3 needs libfuse, which who only imports and exports need not have.
    from imgfs.mount import mount

    raise click.exceptions.Exit(mount(store_path, mountpoint, parsed, daemon=daemon))


@click.command("umount")
@path_argument("mountpoint", "MOUNTPOINT")
@click.option("--lazy", is_flag=True, help="Take it away at once; what is open there stays usable until it is closed.")
def umount_command(mountpoint: str, lazy: bool) -> None:
    """Unmount the store at MOUNTPOINT, when all of it is on the disk; a dead mountpoint is cleared.

    \b
    Example:
      imgfs umount /srv/photos
    """
    unmount(mountpoint, lazy=lazy)
    echo(f"unmounted {mountpoint}")


@click.command("upgrade")
@click.argument("mountpoint", metavar="MOUNTPOINT")
def upgrade_command(mountpoint: str) -> None:
    """Let the release of imgfs that is installed now serve MOUNTPOINT; who uses it notices a pause at most.

    It is tried first. If it cannot take over, the running release goes on, and the command says why.

    \b
    Example:
      imgfs upgrade /srv/photos
    """
    ask(mountpoint)
    echo(f"{mountpoint} is served by the installed release")
