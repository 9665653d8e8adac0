"""Decides what a stream must wait for before it reuses memory that the other stream used.

A device executes steps on one stream and copies of adapters on another. Each stream runs in
order, but the two are not ordered with each other, and the host runs ahead of both. So when
the host gives memory to a new owner, a step or copy for the old owner may still be using it.
Operations are numbered on each stream. For each region the number of each stream's last
operation that used it is kept. A new operation waits, on the device, for the other stream's
last operation that used any of its regions.

A region is anything that is used as a whole: a chunk, pinned memory that a copy reads, a buffer
of a step's inputs. All uses count as writes. The host itself may write to a region once
`pending` is empty for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import Enum


class DeviceStream(Enum):
    """A stream of the device, which executes its operations in order."""

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
        number: the operation's number on its stream, from 1.
        wait: number of the operation of the other stream after which it must begin; 0 if it
            need not wait, or if an earlier operation of its own stream has waited already.
    """

    number: int
    wait: int


class Fences:
    """The last operations of each stream and region. Not thread-safe."""

    def __init__(self) -> None:
        self._last = dict.fromkeys(DeviceStream, 0)
        self._done = dict.fromkeys(DeviceStream, 0)
        self._waited = dict.fromkeys(DeviceStream, 0)
        """For each stream, the operation of the other stream that it has waited for."""
        self._uses: dict[Hashable, dict[DeviceStream, int]] = {}

    def issue(self, stream: DeviceStream, regions: Iterable[Hashable]) -> Issued:
        """Number the next operation on a stream, which uses these regions."""
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
        """Note that the device has executed this operation, and so all before it on its
        stream."""
        assert number <= self._last[stream], "an operation that was never issued"
        self._done[stream] = max(self._done[stream], number)

    def last(self, stream: DeviceStream) -> int:
        """The number of the last operation issued on a stream."""
        return self._last[stream]

    def pending(self, region: Hashable) -> dict[DeviceStream, int]:
        """Return each stream's last operation on a region, if it is not known to be done."""
        uses = self._uses.get(region, {})
        return {s: number for s, number in uses.items() if number > self._done[s]}

    def forget(self, region: Hashable) -> None:
        """Drop a region that will not be used again, such as the source of a copy."""
        assert not self.pending(region), "a region that is still in use"
        self._uses.pop(region, None)
