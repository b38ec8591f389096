"""imgfs: an image store, packed into large volume files, that mounts as an ordinary directory."""

__version__ = "0.1.0"
