"""imgfs: an image store, packed into large volume files, that mounts as an ordinary directory."""

import os

__version__ = "0.1.0"

# NumPy multiplies no matrices here, but its library for that starts a thread for each processor when it is loaded: some
# 100 ms of processor time whenever a process starts, and in the way of a fork. This must come before NumPy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
