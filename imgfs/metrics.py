"""Figures of a store for a monitoring system, in the text format of Prometheus.

Owns their names. Must not know who reads them; a store is opened for reading, also beside a mount.
"""

import os

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.exposition import write_to_textfile

from imgfs.disk import Disk
from imgfs.known_damage import KnownDamage
from imgfs.opening import owner
from imgfs.scrub_state import read_state
from imgfs.store import Store

_NS = 1e-9
_LABEL = ("store",)


def collect(store: Store, disk: Disk | None = None) -> CollectorRegistry:
    """Return the figures of *store*, each labelled with its path. OSError as the disk says."""
    disk = disk or Disk()
    registry = CollectorRegistry()
    path = os.path.abspath(store.path)

    def gauge(name: str, value: float, text: str) -> None:
        Gauge(f"imgfs_{name}", text, _LABEL, registry=registry).labels(path).set(value)

    counts, space, report = store.counts(), store.space(), store.report
    gauge("images", counts.images, "Images, and special files.")
    gauge("directories", counts.directories, "Directories.")
    gauge("symlinks", counts.symlinks, "Symbolic links.")
    gauge("volumes", counts.volumes, "Volumes.")
    gauge("volume_bytes", counts.volume_bytes, "Bytes of all volumes, holes included.")
    gauge("disk_bytes", counts.disk_bytes, "Bytes that all volumes take of the disk.")
    gauge("live_bytes", counts.live_bytes, "Bytes of the data of images that are there.")
    gauge("free_bytes", space.available * space.block_size, "Bytes free on the file system that holds the store.")
    gauge(
        "torn_bytes", report.torn_bytes, "Bytes at the end of the log that a crash tore, and that were never promised."
    )
    gauge("in_use", owner(store.path, disk) is not None, "1 if a daemon, or another writer, has the store open.")

    known = [item for item in KnownDamage(store.path, disk) if item.is_current(store)]
    lost = {item.damage.inode for item in known if item.damage.inode and not item.damage.readable}
    gauge("damaged_images", len(lost), "Images that the last scrub, or check, found damaged, and that are still there.")
    gauge("damaged_places", len(known), "All places known to be damaged: of images, headers, indexes, the superblock.")

    state = read_state(store.path, disk)
    now, last = state.now, state.last
    gauge("scrub_unfinished", now is not None, "1 if a scrub was begun and is not finished.")
    read_bytes = now.read_bytes if now is not None else last.read_bytes if last is not None else 0
    gauge("scrub_read_bytes", read_bytes, "Bytes read by the scrub that is not finished, or else by the last one.")
    if now is not None:
        gauge("scrub_started_timestamp_seconds", now.started_ns * _NS, "When the unfinished scrub was begun.")
    if last is not None:
        text = "When the last scrub was finished."
        gauge("last_scrub_timestamp_seconds", last.finished_ns * _NS, text)
        gauge("last_scrub_duration_seconds", (last.finished_ns - last.started_ns) * _NS, "From its start to its end.")
        gauge("last_scrub_damaged_places", last.damaged_places, "Places it found damaged; 0 is a clean store.")
    return registry


def as_text(registry: CollectorRegistry) -> str:
    """Return the figures in the text format."""
    return generate_latest(registry).decode()


def write(registry: CollectorRegistry, path: str) -> None:
    """Replace the file at *path* by them, so that nobody reads half of it. OSError as the disk says."""
    write_to_textfile(path, registry)
