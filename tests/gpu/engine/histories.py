"""Random histories of chunks and fences on a FAKE device whose streams run when they like.

The host loads adapters, evicts them, runs steps and maps KV blocks as fast as it can. The
device executes later what was enqueued, one stream ahead of the other or behind, but for the
waits that `Fences` ordered. Each unit of memory knows what was written to it last, so an
operation that reads what is not there yet, or no longer, is noticed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from random import Random
from typing import Final

from veneer_server.backends.cuda.memory import chunks, fencing
from veneer_server.backends.cuda.memory.fencing import DeviceStream

from tests.planted import planted

CHUNKS: Final = 6
UNITS: Final = 4
PAGES: Final = 2
BLOCKS: Final = 5
"""Of the KV cache: they need 3 chunks, which are promised."""
PROMISED: Final = 3
SLOTS: Final = 4
"""Buffers for a step's inputs."""


@dataclass
class _Adapter:
    """An adapter's pieces, with the first unit and the units of each."""

    tag: Hashable
    places: list[tuple[int, int]]
    left: deque[tuple[int, int]] = field(default_factory=deque)
    """Not enqueued yet."""


@dataclass
class _Device:
    """FAKE: executes operations in the order of their stream, after what they wait for."""

    queues: dict[DeviceStream, deque[tuple[int, int, Callable[[], None]]]] = field(
        default_factory=lambda: {stream: deque() for stream in DeviceStream}
    )
    done: dict[DeviceStream, int] = field(
        default_factory=lambda: dict.fromkeys(DeviceStream, 0)
    )

    def step(self, stream: DeviceStream) -> bool:
        """Execute the next operation of a stream; False if it has none or must wait."""
        queue = self.queues[stream]
        if not queue or queue[0][1] > self.done[stream.other]:
            return False
        number, _, run = queue.popleft()
        run()
        self.done[stream] = number
        return True

    def until(self, stream: DeviceStream, number: int) -> None:
        """Execute as little as possible until an operation is done."""
        while self.done[stream] < number:
            if not self.step(stream):
                assert self.step(stream.other), "both streams wait for each other"


class _World:
    """The host's side of a history."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.pool = chunks.ChunkPool(CHUNKS, UNITS, PROMISED)
        self.pages = chunks.KvPages(self.pool, PAGES)
        self.fences = fencing.Fences()
        self.device = _Device()
        self.memory: list[Hashable] = [None] * (CHUNKS * UNITS)
        self.sources: dict[Hashable, Hashable] = {}
        """What pinned memory holds, by adapter."""
        self.inputs: list[Hashable] = [None] * SLOTS
        self.adapters: list[_Adapter] = []
        self.kept: dict[int, Hashable] = {}
        """What the last step that used a KV block left in it."""
        self.count = 0
        self.haste = random.random()
        """How much faster copies are than steps, in this history."""

    def _enqueue(
        self, stream: DeviceStream, regions: list[Hashable], run: Callable[[], None]
    ) -> None:
        issued = self.fences.issue(stream, regions)
        self.device.queues[stream].append((issued.number, issued.wait, run))

    def load(self) -> None:
        sizes = [self.random.randint(1, 6) for _ in range(self.random.randint(1, 2))]
        firsts = self.pool.take(sizes)
        if firsts is None:
            return
        self.count += 1
        places = list(zip(firsts, sizes, strict=True))
        adapter = _Adapter(("adapter", self.count), places, deque(places))
        self.sources[adapter.tag] = adapter.tag
        self.adapters.append(adapter)

    def copy(self) -> None:
        """Enqueue some pieces of an adapter, as many as fit between two steps."""
        adapter = self._some(lambda a: bool(a.left))
        if adapter is None:
            return
        for _ in range(self.random.randint(1, len(adapter.left))):
            place, size = adapter.left.popleft()

            def run(place: int = place, size: int = size, tag: Hashable = adapter.tag) -> None:
                read = self.sources[tag]
                assert read == tag, "a copy read pinned memory that has a new owner"
                self.memory[place : place + size] = [tag] * size

            regions: list[Hashable] = [*self.pool.chunks_of([(place, size)]), adapter.tag]
            self._enqueue(DeviceStream.COPIES, regions, run)

    def run_step(self) -> None:
        self.count += 1
        number, slot = self.count, self.count % SLOTS
        for stream, last in self.fences.pending(("inputs", slot)).items():
            self.device.until(stream, last)
            self.fences.done(stream, last)
        self.inputs[slot] = number
        ready = [a for a in self.adapters if not a.left]
        used = self.random.sample(ready, min(len(ready), self.random.randint(0, 2)))
        blocks = self.random.sample(range(BLOCKS), self.random.randint(1, 3))
        reads: list[tuple[int, int, Hashable]] = [
            (place, size, a.tag) for a in used for place, size in a.places
        ]
        writes: list[tuple[int, Hashable]] = []
        regions: list[Hashable] = [("inputs", slot)]
        regions += self.pool.chunks_of([p for a in used for p in a.places])
        width = UNITS // PAGES
        for block in blocks:
            page = self.pages.map(block)
            assert page is not None, "no room for KV, although it was promised"
            if block in self.kept:
                reads.append((page * width, width, self.kept[block]))
            self.kept[block] = ("kv", block, number)
            writes.append((page * width, self.kept[block]))
            regions.append(page // PAGES)

        def run() -> None:
            assert self.inputs[slot] == number, "a step read the inputs of another"
            for place, size, tag in reads:
                found = self.memory[place : place + size]
                assert found == [tag] * size, f"a step read {found} instead of {tag}"
            for place, tag in writes:
                self.memory[place : place + width] = [tag] * width

        self._enqueue(DeviceStream.STEPS, regions, run)

    def evict(self) -> None:
        adapter = self._some(lambda a: True)
        if adapter is not None:
            self.adapters.remove(adapter)
            self.pool.give(adapter.places)

    def reuse_source(self) -> None:
        """HOST drops an adapter: its memory gets something else as soon as it may."""
        for tag in list(self.sources):
            loading = any(a.tag == tag and a.left for a in self.adapters)
            if not loading and not self.fences.pending(tag):
                self.sources[tag] = "something else"
                if self.random.random() < 0.5:
                    self.fences.forget(tag)
                return

    def unmap(self) -> None:
        block = self.random.randrange(BLOCKS)
        self.pages.unmap([block])
        self.kept.pop(block, None)

    def poll(self) -> None:
        for stream in DeviceStream:
            self.fences.done(stream, self.device.done[stream])

    def execute(self) -> None:
        stream = (
            DeviceStream.COPIES if self.random.random() < self.haste else DeviceStream.STEPS
        )
        for _ in range(self.random.randint(1, 4)):
            self.device.step(stream)

    def _some(self, fits: Callable[[_Adapter], bool]) -> _Adapter | None:
        found = [a for a in self.adapters if fits(a)]
        return self.random.choice(found) if found else None

    def end(self) -> None:
        """All is executed, and what was taken is given back."""
        for stream in DeviceStream:
            self.device.until(stream, self.fences.last(stream))
        self.poll()
        for adapter in self.adapters:
            self.pool.give(adapter.places)
        self.pages.unmap(range(BLOCKS))
        assert self.pool.free_chunks == CHUNKS, "chunks have leaked"
        assert self.pool.promised == PROMISED, "a promise has changed"


def check(seed: str, actions: int = 60) -> None:
    """One history.

    Raises:
        AssertionError: something was read that was not there.
    """
    random = Random(seed)
    world = _World(random)
    moves = [
        world.load,
        world.copy,
        world.copy,
        world.run_step,
        world.run_step,
        world.evict,
        world.reuse_source,
        world.unmap,
        world.poll,
        world.execute,
    ]
    for _ in range(actions):
        random.choice(moves)()
    world.end()


BUGS: Final = (
    (
        "a copy does not wait for steps",
        fencing,
        "wait = max(wait, uses.get(other, 0))",
        "wait = max(wait, uses.get(other, 0)) if stream is DeviceStream.STEPS else 0",
    ),
    (
        "a step does not wait for copies",
        fencing,
        "wait = max(wait, uses.get(other, 0))",
        "wait = max(wait, uses.get(other, 0)) if stream is DeviceStream.COPIES else 0",
    ),
    (
        "only the last region counts",
        fencing,
        "wait = max(wait, uses.get(other, 0))",
        "wait = uses.get(other, 0)",
    ),
    (
        "a region's first use is kept, not its last",
        fencing,
        "uses[stream] = number",
        "uses.setdefault(stream, number)",
    ),
    (
        "what is done is looked up on the wrong stream",
        fencing,
        "max(self._done[other], self._waited[stream])",
        "max(self._done[stream], self._waited[stream])",
    ),
    (
        "what was waited for is noted on the wrong stream",
        fencing,
        "self._waited[stream] = wait",
        "self._waited[other] = wait",
    ),
    (
        "the operation before the last is waited for",
        fencing,
        "return Issued(number, wait)",
        "return Issued(number, wait - 1)",
    ),
    (
        "the host is told too early that memory is free",
        fencing,
        "if number > self._done[s]",
        "if number > self._done[s] + 1",
    ),
    (
        "a piece that crosses into the next chunk counts for one",
        chunks,
        "here = min(size, (chunk + 1) * self.units - place)",
        "here = size",
    ),
    (
        "only a piece's first chunk is fenced",
        chunks,
        "(place + size - 1) // self.units + 1))",
        "place // self.units + 1))",
    ),
    (
        "adapters take what is promised to KV",
        chunks,
        "if place < 0 or self.free_chunks < self.promised:",
        "if place < 0:",
    ),
    (
        "pages of a chunk that was given back are handed out",
        chunks,
        "self._free = [p for p in self._free if p // self._pages != chunk]",
        "pass",
    ),
)
"""Name, module, its line, what is planted instead."""


def caught(number: int, seed: str, histories: int) -> str:
    """How the planted bug was noticed, or ""."""
    _, module, old, new = BUGS[number]
    with planted(module, old, new):
        for history in range(histories):
            try:
                check(f"{seed}/{history}")
            except (AssertionError, KeyError) as error:
                return f"history {history}: {error or 'an assertion of the code'}"
    return ""
