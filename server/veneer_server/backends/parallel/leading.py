"""One process leads and the others follow: their decoders get the same calls in the same order.

The engine runs in the leader, which sends each step to the followers before it enqueues the
step itself. So all processes enqueue the same steps, and their all-reduces match. Adapters
travel over a separate connection, so that a long copy delays no step. `LeadingAdapters.place`
returns once every process has the adapter.

Messages name adapters by number, since each process has its own tables.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Final, Protocol

import torch
from veneer_registry.errors import VeneerError

from veneer_server.models.loader import DecoderWeights
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.ahead import AheadBackend, Sampled, Submitted
from veneer_server.step.arrays import Segment, StepArrays
from veneer_server.step.choice import TokenChoice
from veneer_server.step.inbox import NoSlot
from veneer_server.step.layout import Layout


class PartMemory(Protocol):
    """A process's memory for its parts of adapters."""

    def place(self, layout: Layout, run: torch.Tensor) -> AdapterTable:
        """See `adapters.memory.Placer`."""

    def part(self, layout: Layout) -> int:
        """See `adapters.memory.Placer`."""

    def release(self, table: AdapterTable) -> None:
        """See `adapters.memory.Placer`."""


class PartDecoder(AheadBackend, Protocol):
    """The decoder of one process."""

    @property
    def weights(self) -> DecoderWeights:
        """This process's part of the base."""

    @property
    def adapters(self) -> PartMemory:
        """This process's parts of adapters."""

    def prepare(self) -> int:
        """See `CudaDecoder.prepare`."""


@dataclass(frozen=True, slots=True)
class MemberLink:
    """The connections between the leader and one follower.

    Attributes:
        steps: written by the thread that executes steps.
        copies: written by the thread that places adapters, which reads the answers from it.
    """

    steps: Connection
    copies: Connection

    def close(self) -> None:
        self.steps.close()
        self.copies.close()


Numbered = tuple[int, int, int]
"""A segment: begin, end, the adapter's number."""
_NUMBERS: Final = torch.int16
"""numpy has no bfloat16, so numbers are sent with the same bits in this dtype."""


class LeadingAdapters:
    """The leader's `PartMemory`: places and releases an adapter in all processes."""

    def __init__(self, own: PartMemory, links: Sequence[MemberLink]) -> None:
        self._own, self._links = own, links
        self._count = itertools.count(1)
        self._numbers: weakref.WeakKeyDictionary[AdapterTable, int] = (
            weakref.WeakKeyDictionary()
        )

    def place(self, layout: Layout, run: torch.Tensor) -> AdapterTable:
        """Place an adapter in every process, or in none. Not for concurrent calls.

        Raises:
            NoSlot: it does not fit into a follower's memory.
            VeneerError: this process refuses it.
        """
        number = next(self._count)
        numbers = run.view(_NUMBERS).numpy()
        for link in self._links:
            link.copies.send(("place", number, layout, numbers))
        table, failed = None, None
        try:
            table = self._own.place(layout, run)
        except VeneerError as error:
            failed = error
        answers = [link.copies.recv() for link in self._links]
        # If only a follower refuses, it has no room: the processes differ only in where their
        # memory has gaps.
        failed = failed or next((NoSlot(answer) for answer in answers if answer), None)
        if table is not None and failed is None:
            self._numbers[table] = number
            return table
        for link, answer in zip(self._links, answers, strict=True):
            if not answer:
                link.copies.send(("release", number))
        if table is not None:
            self._own.release(table)
        assert failed is not None
        raise failed

    def part(self, layout: Layout) -> int:
        """See `PartMemory.part`. All processes' parts of an adapter have the same size."""
        return self._own.part(layout)

    def release(self, table: AdapterTable) -> None:
        """See `PartMemory.release`."""
        number = self._numbers.pop(table)
        for link in self._links:
            link.steps.send(("release", number))
        self._own.release(table)

    def number(self, table: AdapterTable) -> int:
        """The number by which followers know an adapter."""
        return self._numbers[table]


class Leading:
    """Implements `AheadBackend` over all processes: this one's decoder and its followers'.

    Attributes:
        adapters: places adapters in all processes.
        weights: this process's part of the base.
    """

    def __init__(self, decoder: PartDecoder, links: Sequence[MemberLink]) -> None:
        self._decoder, self._links = decoder, links
        self.weights = decoder.weights
        self.adapters = LeadingAdapters(decoder.adapters, links)

    @property
    def last_logits(self) -> torch.Tensor:
        """See `AheadBackend.last_logits`."""
        return self._decoder.last_logits

    def prepare(self) -> int:
        """See `CudaDecoder.prepare`."""
        self._tell("prepare")
        return self._decoder.prepare()

    def execute(self, step: StepArrays) -> torch.Tensor:
        """See `Backend.execute`."""
        self._tell("execute", *self._numbered(step))
        return self._decoder.execute(step)

    def finite(self, logits: torch.Tensor) -> list[bool]:
        """See `Backend.finite`."""
        self._tell("finite")
        return self._decoder.finite(logits)

    def clear(self, blocks: list[int]) -> None:
        """See `Backend.clear`."""
        self._tell("clear", blocks)
        self._decoder.clear(blocks)

    def submit(
        self,
        step: StepArrays,
        choices: Sequence[TokenChoice],
        tops: Sequence[int],
        carried: Sequence[int] = (),
        handed: Sequence[int] = (),
        scored: Sequence[int] = (),
    ) -> Submitted:
        """See `AheadBackend.submit`. Followers sample too, since the next step may carry tokens
        over from this one."""
        more = [list(each) for each in (choices, tops, carried, handed, scored)]
        self._tell("submit", *self._numbered(step), more)
        return self._decoder.submit(step, choices, tops, carried, handed, scored)

    def read(self, submitted: Submitted) -> Sampled:
        """See `AheadBackend.read`."""
        self._tell("read", submitted)
        return self._decoder.read(submitted)

    def _numbered(self, step: StepArrays) -> tuple[StepArrays, list[Numbered]]:
        number = self.adapters.number
        segments = [(s.begin, s.end, number(s.table)) for s in step.segments]
        return replace(step, segments=()), segments

    def _tell(self, *what: Any) -> None:
        for link in self._links:
            link.steps.send(what)


class PartMember:
    """A follower: carries out the leader's messages with ``decoder``.

    Args:
        pinned: allocates host memory [numbers] bfloat16, from which adapters are copied to
            the device.
    """

    def __init__(self, decoder: PartDecoder, pinned: Any) -> None:
        self._decoder, self._pinned = decoder, pinned
        self._tables: dict[int, AdapterTable] = {}

    def step(self, name: str, *given: Any) -> None:
        """Carry out one message from `MemberLink.steps`."""
        match name, given:
            case "prepare", ():
                self._decoder.prepare()
            case "execute", (step, segments):
                self._decoder.execute(self._with(step, segments))
            case "finite", ():
                self._decoder.finite(self._decoder.last_logits)
            case "clear", (blocks,):
                self._decoder.clear(blocks)
            case "submit", (step, segments, more):
                self._decoder.submit(self._with(step, segments), *more)
            case "read", (submitted,):
                self._decoder.read(submitted)
            case "release", (number,):
                self._decoder.adapters.release(self._tables.pop(number))
            case _:
                raise AssertionError(f"the leader says {name}")

    def copy(self, copies: Connection) -> None:
        """Carry out and answer the messages from `MemberLink.copies` until the leader closes
        it."""
        while True:
            try:
                name, number, *given = copies.recv()
            except (EOFError, OSError):
                return
            if name == "release":
                self._decoder.adapters.release(self._tables.pop(number))
                continue
            layout, numbers = given
            run = self._pinned(len(numbers))
            run.view(_NUMBERS).numpy()[:] = numbers
            try:
                self._tables[number] = self._decoder.adapters.place(layout, run)
            except VeneerError as error:
                copies.send(str(error))
            else:
                copies.send("")

    def _with(self, step: StepArrays, segments: Sequence[Numbered]) -> StepArrays:
        tables = self._tables
        return replace(step, segments=tuple(Segment(b, e, tables[n]) for b, e, n in segments))


def follow(decoder: PartDecoder, link: MemberLink, pinned: Any, ended: Any) -> None:
    """Run a follower: carry out the leader's messages forever. Needs a process of its own.

    Args:
        pinned: see `PartMember`.
        ended: called in another thread when the leader has closed its connections or died.
            This thread may then be stuck in an all-reduce that other processes never join.
    """
    follower = PartMember(decoder, pinned)
    told: SimpleQueue[tuple[Any, ...]] = SimpleQueue()

    def listen() -> None:
        while True:
            try:
                told.put(link.steps.recv())
            except (EOFError, OSError):
                ended()
                return

    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=follower.copy, args=(link.copies,), daemon=True).start()
    while True:
        follower.step(*told.get())
