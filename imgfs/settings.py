"""The limits and intervals a store is run with, in one frozen object."""

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Settings:
    """How a store is run; `volume_bytes_max` is kept in the superblock, the rest holds for one opening."""

    volume_bytes_max: int = 1 * GIB
    """A volume is sealed before it grows past this, unless a single image is larger."""

    sync_interval_s: float = 5.0
    """What power loss can take of images that were closed but not synced; it is the mount that syncs so often."""

    headroom_bytes: int = 16 * MIB
    """Free space below which new images are refused, so that `rm` still finds room for its needle."""

    checkpoint_needles: int = 65_536
    """After so many needles the next sync writes a checkpoint: a start after a crash reads one by one what follows."""

    rest_slots: int = 4_096
    """Freed slots rest until so many others wait behind them, so that an old inode number stays unmistakable."""

    saved_slots_min: int = 65_536
    """A clean stop keeps the table in a file if it has so many slots; a smaller one is made again in no time."""
