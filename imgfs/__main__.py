"""Runs the command line for `python -m imgfs`."""

import sys

from imgfs.cli import main

if __name__ == "__main__":
    sys.exit(main())
