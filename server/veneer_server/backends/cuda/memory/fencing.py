"""What a stream must wait for before it uses memory that another one used: decisions only.

A device executes steps on one stream and copies of adapters on another, each in its order and
neither in the other's. The host runs ahead of both. So memory that it gives to a new owner may
still be read by a step, or written by a copy, that was started for the old one. Every operation
has a number on its stream. For each region the last number of each stream is kept, and an
operation waits, on the device, for the last one of the other stream that used a region of its.

A region is anything that is used as a whole: a chunk, pinned memory that a copy reads, a buffer
of a step's inputs. All uses count as writes. Memory that the host itself writes is free once
`pending` is empty.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import Enum


class DeviceStream(Enum):
    """Where operations execute in their order."""

    STEPS = "steps"
    COPIES = "copies"

    @property
    def other(self) -> DeviceStream:
        """The stream that an operation of this one may have to wait for."""
        return DeviceStream.COPIES if self is DeviceStream.STEPS else DeviceStream.STEPS


@dataclass(frozen=True, slots=True)
class Issued:
    """An operation that may be enqueued now.

    Attributes:
        number: on its stream, from 1.
        wait: it must begin after this number of the other stream; 0 if it need not wait, also
            because an operation before it on its stream has waited.
    """

    number: int
    wait: int


class Fences:
    """Numbers of operations by stream and region. One thread at a time."""

    def __init__(self) -> None:
        self._last = dict.fromkeys(DeviceStream, 0)
        self._done = dict.fromkeys(DeviceStream, 0)
        self._waited = dict.fromkeys(DeviceStream, 0)
        """By stream: it has waited for this number of the other."""
        self._uses: dict[Hashable, dict[DeviceStream, int]] = {}

    def issue(self, stream: DeviceStream, regions: Iterable[Hashable]) -> Issued:
        """The next operation on a stream, which uses these regions."""
        number = self._last[stream] = self._last[stream] + 1
        other = stream.other
        wait = 0
        for region in regions:
            uses = self._uses.setdefault(region, {})
            wait = max(wait, uses.get(other, 0))
            uses[stream] = number
        if wait <= max(self._done[other], self._waited[stream]):
            return Issued(number, 0)
        self._waited[stream] = wait
        return Issued(number, wait)

    def done(self, stream: DeviceStream, number: int) -> None:
        """The device has executed this operation, and so all before it on its stream."""
        assert number <= self._last[stream], "an operation that was never issued"
        self._done[stream] = max(self._done[stream], number)

    def last(self, stream: DeviceStream) -> int:
        """The last number that was issued."""
        return self._last[stream]

    def pending(self, region: Hashable) -> dict[DeviceStream, int]:
        """The last operations that use a region and are not known to be done."""
        uses = self._uses.get(region, {})
        return {s: number for s, number in uses.items() if number > self._done[s]}

    def forget(self, region: Hashable) -> None:
        """A region ceases to exist: memory that nobody gets again, such as a copy's source."""
        assert not self.pending(region), "a region that is still in use"
        self._uses.pop(region, None)
