"""Waits for requests, and keeps processors awake where it would take long to wake one.

Owns for how long nobody sleeps, what the kernel is asked for, and when. Must not know what comes.

To sleep and to be woken takes as long as an answer. So a worker that waits looks for a while without sleeping, if one
thread asks and there is a processor to spare. And whoever has asked has to be woken, too: in a virtual machine a
processor with nothing to do is given back to the hypervisor, and to have it back takes some 30 us. Whoever holds
/dev/cpu_dma_latency open tells the kernel how many us that may take (PM QoS,
https://docs.kernel.org/power/pm_qos_interface.html); at 0 a processor looks for work where it would have halted. That
takes nothing from anybody who has work; its price is power, and time of the host.

*Concurrency:* an object belongs to one thread. The kernel drops the wish of a process that dies.
"""

import os
import select
import struct
import time

from imgfs.processors import Processors

DEVICE = "/dev/cpu_dma_latency"
_AT_ONCE = struct.pack("=i", 0)
# After so many waits, each so long after the last at most, more are expected.
_WAITS, _BETWEEN_NS = 8, 2_000_000
# When nothing has come for so long, processors may halt.
PATIENCE_S = 0.01
# So long a worker looks without sleeping.
_LOOK_NS = 60_000


class Awake:
    """Waits for what can be read from a descriptor.

    *wanted*: keep processors from halting meanwhile. Without permission for *device*, which root has, none is kept.
    """

    def __init__(self, *, wanted: bool, device: str = DEVICE, processors: Processors | None = None) -> None:
        self._wanted = wanted
        self._device = device
        self._wish = -1
        self._waits, self._waited_ns = 0, 0
        self._thread = 0
        self.alone = False
        """Whether the last two requests came from one thread."""

        self._processors = processors or Processors()
        self._descriptor = -1
        self._poll = select.poll()

    def close(self) -> None:
        self.let_halt()
        self._processors.close()

    def listen_to(self, descriptor: int) -> None:
        """Wait for what can be read from *descriptor*, from now on."""
        self._descriptor = descriptor
        self._poll.register(descriptor, select.POLLIN)

    def asked(self, thread: int) -> None:
        """Note that *thread* has asked for something; 0 is nobody in particular."""
        if thread:
            self.alone, self._thread = thread == self._thread, thread

    def look(self) -> bool:
        """Return whether there is anything."""
        return bool(self._poll.poll(0))

    def wait(self, patience_ms: int) -> bool:
        """Return whether there is anything, within *patience_ms*."""
        self._expect_more()
        poll, found = self._poll.poll, None
        if self.alone and patience_ms and self._processors.spare():
            looked_ns = time.monotonic_ns() + _LOOK_NS
            while not (found := poll(0)) and time.monotonic_ns() < looked_ns:
                pass
        return bool(found or poll(patience_ms))

    def wait_until(self, deadline_ns: int) -> bool:
        """Return whether there is anything, until then, which is soon."""
        if self.alone and deadline_ns - time.monotonic_ns() < _LOOK_NS and self._processors.spare():
            poll = self._poll.poll
            while not (found := poll(0)) and time.monotonic_ns() < deadline_ns:
                pass
            return bool(found)
        patience_s = max(0, deadline_ns - time.monotonic_ns()) / 1e9
        return bool(select.select([self._descriptor], (), (), patience_s)[0])

    # -- processors -------------------------------------------------------------------------------------------

    @property
    def keeps(self) -> bool:
        """Whether processors are kept from halting."""
        return self._wish >= 0

    def _expect_more(self) -> None:
        """Keep processors from halting if something is waited for all the time."""
        if not self._wanted or self._wish >= 0:
            return
        now_ns = time.monotonic_ns()
        self._waits = self._waits + 1 if now_ns - self._waited_ns < _BETWEEN_NS else 0
        self._waited_ns = now_ns
        if self._waits >= _WAITS:
            self._keep()

    def _keep(self) -> None:
        self._waits = 0
        try:
            self._wish = os.open(self._device, os.O_WRONLY | os.O_CLOEXEC)
            os.write(self._wish, _AT_ONCE)
        except OSError:
            self._wanted = False
            self.let_halt()

    def let_halt(self) -> None:
        """Nothing is waited for any more: processors may halt."""
        if self._wish >= 0:
            os.close(self._wish)
            self._wish = -1
