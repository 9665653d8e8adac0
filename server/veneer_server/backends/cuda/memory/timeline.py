"""Enqueues operations on a device's streams, with the waits that `Fences` demands."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Final

from veneer_server.backends.cuda.device import Device, Event
from veneer_server.backends.cuda.memory.fencing import DeviceStream, Fences

BYTES_PER_STEP: Final = 32 << 20
"""Bytes of adapters that may be copied beside one step: about a millisecond of PCIe 4.0 x16."""


class DeviceTimeline:
    """Orders a device's operations by events. Thread-safe.

    Attributes:
        lock: held while an operation is enqueued, and while memory changes its owner.
    """

    def __init__(self, device: Device, bytes_per_step: int = BYTES_PER_STEP) -> None:
        self.lock = threading.RLock()
        self._device = device
        self._fences = Fences()
        self._events: dict[DeviceStream, deque[tuple[int, Event]]] = {
            s: deque() for s in DeviceStream
        }
        """The events of operations that are not known to be done."""
        self._most = bytes_per_step
        self._left = bytes_per_step

    @contextmanager
    def operation(self, stream: DeviceStream, regions: Iterable[Hashable]) -> Iterator[None]:
        """Context for one operation: all that is enqueued within it counts as one, which uses
        these regions."""
        copies = stream is DeviceStream.COPIES
        with self.lock, self._device.copying() if copies else nullcontext():
            self.poll()
            issued = self._fences.issue(stream, regions)
            if not copies:
                self._left = self._most
            if issued.wait:
                self._device.wait(self._event(stream.other, issued.wait))
            try:
                yield
            finally:
                self._events[stream].append((issued.number, self._device.record()))

    def poll(self) -> None:
        """Note which operations the device has finished, without waiting."""
        with self.lock:
            for stream, events in self._events.items():
                while events and self._device.done(events[0][1]):
                    self._fences.done(stream, events.popleft()[0])

    def until_free(self, region: Hashable) -> None:
        """Block the host until no operation uses a region. The lock is not held meanwhile."""
        while True:
            with self.lock:
                self.poll()
                pending = self._fences.pending(region)
                if not pending:
                    return
                events = [self._event(stream, number) for stream, number in pending.items()]
            for event in events:
                self._device.sync(event)

    def forget(self, region: Hashable) -> None:
        """See `Fences.forget`."""
        with self.lock:
            self._fences.forget(region)

    def allow_copy(self, size: int) -> None:
        """Block the host until a copy of ``size`` bytes may be enqueued. While steps run,
        copies are limited, since both share the bus; on an idle device they are not."""
        while True:
            with self.lock:
                self.poll()
                steps = self._events[DeviceStream.STEPS]
                if not steps or self._left > 0:
                    self._left -= size
                    return
                event = steps[-1][1]
            self._device.sync(event)

    def _event(self, stream: DeviceStream, number: int) -> Event:
        return next(event for at, event in self._events[stream] if at >= number)
