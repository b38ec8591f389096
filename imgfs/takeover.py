"""`python -m imgfs.takeover`: the release that takes the place of a running one, or first tries whether it could.

Owns nothing; a running daemon starts it. Must not know how the mount is served.
"""

import sys

from imgfs import mount
from imgfs.errors import EXIT_OK, ImgfsError
from imgfs.handover import GO, Handover


def main() -> int:
    """Do what the running release asks for; return the exit code."""
    mode, descriptor = sys.argv[1], int(sys.argv[2])
    try:
        state = Handover.read(descriptor)
        if mode == GO:
            return mount.take_over(state)
        mount.try_to_take_over(state)
        return EXIT_OK
    except ImgfsError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
