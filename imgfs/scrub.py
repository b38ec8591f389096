"""Scrubs a store: reads every byte of it from the disk, also beside a daemon, and keeps a list of what is damaged.

Owns the order of the steps: what was found is durable before how far it is. Takes no lock of the store and changes
nothing of it. Must not know how it is shown. The bytes are verified in reading.py; which image needs what is damaged is
asked of the store, opened for reading for that only (check.py).

*Concurrency:* one scrub of a store at a time, by a lock of its own. What it reads does not change: sealed volumes, and
the last one up to its highest durable mark; but blocks may be freed, and whole volumes removed.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

from imgfs.check import Checked
from imgfs.direct import BLOCK_BYTES, DirectDisk, RateLimit
from imgfs.disk import Disk
from imgfs.errors import Busy, Damaged, NoStore, disk_error
from imgfs.format import NEEDLES_START, VOLUME_BYTES_LIMIT, IndexState, VolumeHeader
from imgfs.index import checkpoint_state, empty_state, index_paths
from imgfs.index_reading import IndexReading
from imgfs.known_damage import SCRUB_LOCK, KnownDamage, path_in
from imgfs.opening import SUPERBLOCK, owner
from imgfs.reading import VolumeReading
from imgfs.scrub_state import Round, State, read_state, write_state
from imgfs.store import Store
from imgfs.superblock import unpack_superblock
from imgfs.survey import Damage
from imgfs.volume import Gap, Volume
from imgfs.volumes import SUFFIX, VOLUMES, volume_path

DEFAULT_RATE_BYTES_S = 50 << 20
# A scrub that is killed reads so much again, at most.
SAVE_INTERVAL_S = 2.0


class Scrub:
    """One run of a scrub; it carries on where a run that was killed was."""

    def __init__(
        self,
        path: str,
        rate_bytes_s: int = 0,
        *,
        disk: Disk | None = None,
        direct: DirectDisk | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*rate_bytes_s*: read no faster; 0: as fast as it goes."""
        self._path = path
        self._disk = disk or Disk()
        self._direct = direct or DirectDisk(RateLimit(rate_bytes_s))
        self._clock = clock
        self._opened: Store | None = None
        self._headers: dict[int, VolumeHeader | None] = {}
        # What is read so far, in this round.
        self._state = State()
        self._needles = self._bytes = self._places = 0
        self._save_at = 0.0

    def run(self) -> Iterator[Checked | Damage]:
        """Scrub to the end; yield what is damaged, and how far it is, with what earlier runs of this round read.

        Raises:
            NoStore: there is none.
            Busy: another scrub of it is at work.
            NewerFormat: a newer release wrote it.
            DiskFailure, StoreFull: as the disk says.
        """
        if not self._disk.exists(f"{self._path}/{VOLUMES}"):
            raise NoStore(f"there is no store at {self._path}; make one with: imgfs mkfs {self._path}")
        try:
            with ExitStack() as stack:
                lock = self._disk.lock(f"{self._path}/{SCRUB_LOCK}")
                if lock is None:
                    raise Busy(f"another scrub of {self._path} is at work; wait for it, or stop it")
                stack.callback(self._disk.close, lock)
                stack.callback(self._close_store)
                self._state = read_state(self._path, self._disk)
                self._known = KnownDamage(self._path, self._disk)
                yield from self._round()
        except OSError as error:
            raise disk_error(error, self._path) from error

    @property
    def result(self) -> Round:
        """What the round came to that `run` has finished."""
        assert self._state.last is not None
        return self._state.last

    @property
    def total_bytes(self) -> int:
        """Roughly what there is to read; 0 where there is no store."""
        if not self._disk.exists(f"{self._path}/{VOLUMES}"):
            return 0
        return sum(self._size(f"{self._path}/{VOLUMES}/{name}") for name in self._volume_names())

    def path(self, damage: Damage) -> bytes | None:
        """Return the path of the image that has *damage*, which `run` has just yielded; None if it has none."""
        return path_in(self._opened, damage.inode) if self._opened is not None else None

    # -- one round --------------------------------------------------------------------------------------------

    def _round(self) -> Iterator[Checked | Damage]:
        state = self._state
        self._save_at = self._clock() + SAVE_INTERVAL_S
        if state.now is None:
            state.now, state.volume, state.position = Round(time.time_ns()), 0, IndexState(0, 0, 0, 0, 0)
            yield from self._tell(self._superblock())
        else:
            self._needles, self._bytes = state.now.needles, state.now.read_bytes
            self._places = state.now.damaged_places
        if state.position.end:
            yield from self._volume(state.volume, state.position)
        while (following := self._following(state.volume)) is not None:
            yield from self._volume(following, empty_state(following))
        started_ns = state.now.started_ns
        self._known.settle(started_ns)
        self._known.save()
        state.last = Round(started_ns, time.time_ns(), self._bytes, self._needles, self._places)
        state.now = None
        write_state(self._path, self._disk, state)

    def _following(self, volume_id: int) -> int | None:
        """Return the id of the volume to read after that one."""
        ids = [int(name.removesuffix(SUFFIX)) for name in self._volume_names()]
        return min((each for each in ids if each > volume_id), default=None)

    def _volume_names(self) -> list[str]:
        names = self._disk.names(f"{self._path}/{VOLUMES}")
        return [name for name in names if name.endswith(SUFFIX) and name.removesuffix(SUFFIX).isdigit()]

    def _size(self, path: str) -> int:
        try:
            file = self._disk.open(path)
        except FileNotFoundError:
            return 0
        try:
            return self._disk.size(file)
        finally:
            self._disk.close(file)

    def _superblock(self) -> list[Damage]:
        path = f"{self._path}/{SUPERBLOCK}"
        text = "the superblock is missing; it is made anew when the store is opened for writing"
        size = self._size(path)
        if size:
            file = self._direct.open(path)
            try:
                data = self._direct.read(file, 0, size)
            finally:
                self._direct.close(file)
            try:
                unpack_superblock(data)
                if data == (json.dumps(json.loads(data), indent=2) + "\n").encode():
                    return []
            except Damaged:
                pass
            text = "the superblock is damaged; it is made anew when the store is opened for writing"
        return [Damage(0, 0, size, text)]

    def _tell(self, found: list[Damage]) -> Iterator[Damage]:
        """Enter what was *found* into the list, durably, and yield it."""
        for number, damage in enumerate(found):
            if self._is_unreadable(damage):
                found[number] = replace(damage, text=f"{damage.text}; the disk cannot read it")
        for damage in found:
            self._known.see(damage, self.path(damage))
        self._places += len(found)
        if found:
            self._known.save()
        yield from found

    def _is_unreadable(self, damage: Damage) -> bool:
        """Return whether the disk refused to read some of it."""
        file, end = f"{self._path}/{damage.file}", damage.offset + damage.length
        blocks = [at for path, at in self._direct.unreadable if path == file]
        return any(at < end and damage.offset < at + BLOCK_BYTES for at in blocks)

    # -- one volume -------------------------------------------------------------------------------------------

    def _volume(self, volume_id: int, start: IndexState) -> Iterator[Checked | Damage]:
        path = volume_path(f"{self._path}/{VOLUMES}", volume_id)
        ends, last = self._layout()
        try:
            volume = Volume.open(self._direct, path)
        except FileNotFoundError:
            pass  # removed by a compaction since
        except Damaged as error:
            found = [Damage(volume_id, 0, self._size(path), str(error))]
            yield from self._tell(found)
        else:
            try:
                yield from self._parts(volume, start, ends.get(volume_id), last=volume_id == last)
            finally:
                volume.close()
        assert self._state.now is not None
        self._known.settle(self._state.now.started_ns, volume_id)
        self._note(volume_id, start._replace(end=0))

    def _parts(
        self, volume: Volume, start: IndexState, previous: IndexState | None, *, last: bool
    ) -> Iterator[Checked | Damage]:
        """Read *volume* from *start* on; note how far it is now and then. *previous*: it ends there, without a seal."""
        end = previous.end if previous is not None else volume.size()
        index_end = VOLUME_BYTES_LIMIT
        if last:
            end, vouched = _promised(volume, start.end, end)
            if owner(self._path, self._disk) is None:
                index_end = vouched  # what a crash left of the index is made whole when the store is opened
        while True:
            index = self._index(volume, start)
            if index is None and start.end == NEEDLES_START < index_end and self._disk.exists(volume.path):
                text = "the index is missing; it is made anew when the store is opened for writing"
                yield from self._tell([Damage(volume.header.volume_id, 0, 0, text, suffix=".idx", readable=True)])
            try:
                one = VolumeReading(volume, index, start.end, end, index_end=index_end)
                for position in one.read():
                    yield Checked(self._needles + one.needles, self._bytes + position - start.end)
                    if one.at_needle and one.position == position and self._clock() >= self._save_at:
                        break
                ended = one.position >= end
                must_end = ended and not last
                if must_end:
                    one.must_be_sealed(previous)
                yield from self._tell(self._judge(one, start, previous, must_end=must_end))
                self._needles += one.needles
                self._bytes += one.position - start.end
                start = index.state(one.position) if index is not None else start._replace(end=one.position)
            finally:
                if index is not None:
                    index.close()
            if ended:
                return
            self._note(volume.header.volume_id, start)

    def _index(self, volume: Volume, start: IndexState) -> IndexReading | None:
        header = volume.header
        try:
            return IndexReading(self._direct, index_paths(volume.path), header.store_id, header.volume_id, start)
        except FileNotFoundError:
            return None

    def _note(self, volume_id: int, position: IndexState) -> None:
        """Make durable that all before *position* was read, if it is time for it."""
        state = self._state
        assert state.now is not None
        state.volume, state.position = volume_id, position
        state.now = Round(state.now.started_ns, 0, self._bytes, self._needles, self._places)
        if self._clock() >= self._save_at:
            self._known.save()
            write_state(self._path, self._disk, state)
            self._save_at = self._clock() + SAVE_INTERVAL_S

    # -- what is needed ---------------------------------------------------------------------------------------

    def _layout(self) -> tuple[dict[int, IndexState], int]:
        """Return where volumes end that the next one ends in place of a seal, and which volume is the last."""
        directory = f"{self._path}/{VOLUMES}"
        for volume_id in {int(name.removesuffix(SUFFIX)) for name in self._volume_names()} - self._headers.keys():
            try:
                volume = Volume.open(self._disk, volume_path(directory, volume_id))
            except FileNotFoundError:
                continue
            except Damaged:
                self._headers[volume_id] = None
                continue
            volume.close()
            self._headers[volume_id] = volume.header
        headers = [header for header in self._headers.values() if header is not None]
        ends = {each.previous.volume_id: each.previous.index_state for each in headers if each.previous is not None}
        # As recovery orders them: the log goes on in the one with the highest sequence numbers.
        last = max(headers, key=lambda each: (each.first_sequence, each.volume_id), default=None)
        return ends, last.volume_id if last is not None else 0

    def _judge(
        self, one: VolumeReading, start: IndexState, previous: IndexState | None, *, must_end: bool
    ) -> list[Damage]:
        """Return the damage that *one*, which began at *start*, has found."""
        if not one.suspicious or not self._judged(one):
            return []
        # Read it again: what was freed while it was read is no damage, nor is what a cable or memory did.
        try:
            volume = Volume.open(self._direct, one.volume.path)
        except FileNotFoundError:
            return []  # removed by a compaction meanwhile
        index = self._index(volume, start)
        try:
            again = VolumeReading(volume, index, start.end, one.position, index_end=one.index_end)
            for _ in again.read():
                pass
            if must_end:
                again.must_be_sealed(previous)
            return self._judged(again)
        finally:
            volume.close()
            if index is not None:
                index.close()

    def _judged(self, one: VolumeReading) -> list[Damage]:
        """Return what of it is damage, by what the store says that anybody needs."""
        if self._opened is not None and all(item.hole for item in one.bad()):
            # Nobody needed these bytes when they were freed, and nobody will: an older look at the table does.
            found = self._opened.judge(one, upto=one.position)
            if found is not None and not found:
                return []
        self._close_store()
        self._opened = Store.open(self._path, writable=False, disk=self._disk)
        # A volume that the store does not know is about to be removed by a compaction.
        return self._opened.judge(one, upto=one.position) or []

    def _close_store(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def _promised(volume: Volume, start: int, size: int) -> tuple[int, int]:
    """Return up to where the last volume is durable, and its index vouched for; both are looked for from *start* on."""
    durable = vouched = start
    for item in volume.scan(start, size):
        if not isinstance(item, Gap):
            durable = max(durable, min(item[1].durable, size))
            state = checkpoint_state(item[1])
            vouched = max(vouched, state.end if state is not None else 0)
    return durable, vouched
