"""What the C library does with memory that was freed.

Owns some of its settings (mallopt(3)). Must not know who needs memory, nor what for.

Left to itself, malloc asks the kernel for large blocks one by one and gives them back when they are freed; but once it
has freed one it takes blocks of that size, up to 32 MiB, from its heap, which shrinks only as far as nothing small lies
behind. Arrays with a part of every record are such blocks.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE_BYTES = 256 << 10
# Larger than what a request takes, so that the next one finds it.
_KEPT_BYTES = 8 << 20

_libc = ctypes.CDLL(None)


def give_back() -> None:
    """Give large blocks back as soon as they are freed: for who needs them now and then. So do its children."""
    _set(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    _set(_M_TRIM_THRESHOLD, _LARGE_BYTES)


def keep() -> None:
    """Keep some MiB of what was freed for what is needed next: for who serves one request after another."""
    _set(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    # Else each thread that ever waited for the disk leaves a heap of its own behind.
    _set(_M_ARENA_MAX, 1)
    _set(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)


def trim() -> None:
    """Give back what was kept, once nobody is served that needs so much."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def _set(what: int, value: int) -> None:
    # Only glibc has it; others give back by themselves.
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(what, value)
