"""The engine client and the step loop together: budgets and a pause that survive an engine,
adapters that survive a server, and what is counted of a call. `LoopConnection` is a FAKE: the
real loop and residency in this process, with a runner and a memory that take no time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import ClassVar

import msgspec
import pytest
from veneer_registry.errors import AdapterBudgetExceeded, EngineFailed
from veneer_server.engine_client import supervisor
from veneer_server.engine_client.client import EngineClient, EngineEvent
from veneer_server.engine_client.resident_set import Resident
from veneer_server.queues.fairness import Fairness
from veneer_server.wire.messages import (
    BudgetsState,
    EngineConfig,
    FromEngine,
    ResidencyChanged,
    SamplingParams,
    SequenceRequest,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode,
)

from tests.refused import refused
from tests.unit.server.engine.test_loop import Engine
from tests.unit.server.engine.test_supervisor import INFO
from tests.unit.server.engine.world import SIZE, adapter

CONFIG = EngineConfig(
    "", "", "", "", host_adapter_bytes=4 * SIZE, device_adapter_bytes=4 * SIZE
)


class LoopConnection:
    """FAKE: see the module. Messages go through the wire's encoding."""

    made: ClassVar[list[LoopConnection]] = []

    def __init__(self, config: EngineConfig) -> None:
        self.info = msgspec.structs.replace(INFO, adapter_itemsize=1)
        self.pid = 1
        self.config = config
        self.engine = Engine(context=1000, blocks=1000)
        self.engine.scheduler.residency.set_budgets(
            host=config.host_adapter_bytes, device=config.device_adapter_bytes
        )
        self.said: asyncio.Queue[FromEngine | None] = asyncio.Queue()
        self.made.append(self)

    @classmethod
    async def open(cls, config: EngineConfig) -> LoopConnection:
        return cls(config)

    def write(self, message: ToEngine) -> None:
        (decoded,) = decode_to_engine(encode([message])[4:])
        self.engine.inbox.put(decoded)
        for _ in range(6):
            self.engine.turn()
        said, self.engine.sent[:] = list(self.engine.sent), []
        for each in decode_from_engine(encode(said)[4:]):
            self.said.put_nowait(each)

    async def messages(self) -> AsyncIterator[FromEngine]:
        while (message := await self.said.get()) is not None:
            yield message

    def kill(self) -> None:
        self.said.put_nowait(None)

    async def close(self) -> None:
        pass


class Server:
    """A client, and a way to wait for what it tells."""

    def __init__(self) -> None:
        self.told = asyncio.Condition()
        self.client = EngineClient(CONFIG, max_queue=4, on_event=self._note)
        self.tasks: set[asyncio.Task[None]] = set()

    def _note(self, event: EngineEvent) -> None:
        if isinstance(event, ResidencyChanged):
            task = asyncio.create_task(self._tell())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _tell(self) -> None:
        async with self.told:
            self.told.notify_all()

    async def until(self, tiers: dict[str, str], *, starts: int = 1) -> None:
        """Until adapters are in these tiers of the engine that was started so often."""

        def reached() -> bool:
            found = {name: self.client.tier(name) for name in tiers}
            there = {name: r.tier for name, r in found.items() if r is not None}
            return there == tiers and self.client.starts == starts

        async with self.told:
            await self.told.wait_for(reached)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopConnection, "made", [])
    monkeypatch.setattr(supervisor, "EngineConnection", LoopConnection)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF", 0.001)


@pytest.mark.timeout(30)
async def test_an_engine_that_is_started_again_gets_the_budgets_of_now() -> None:
    server = Server()
    await server.client.start()
    for name in "abc":
        await server.client.activate(adapter(name), tier="device", pin=False)
    state = await server.client.update_budgets(host_bytes=None, device_bytes=2 * SIZE)
    assert state == BudgetsState(4 * SIZE, 2 * SIZE, 3 * SIZE, 2 * SIZE)
    await server.client.activate(adapter("c"), tier="device", pin=True)
    await server.client.activate(adapter("b"), tier="device", pin=True)
    with refused(AdapterBudgetExceeded, budget=SIZE, pinned=2 * SIZE, tier="device"):
        await server.client.update_budgets(host_bytes=None, device_bytes=SIZE)
    first, *_ = LoopConnection.made
    first.kill()
    await server.until({"b": "device", "c": "device", "a": "host"}, starts=2)
    second = LoopConnection.made[1]
    assert second.config.device_adapter_bytes == 2 * SIZE
    assert second.config.host_adapter_bytes == 4 * SIZE
    assert {r.source.name: r.pin for r in server.client.resident_set()} == {
        "a": None,
        "b": "device",
        "c": "device",
    }
    await server.client.stop()


@pytest.mark.timeout(30)
async def test_a_server_that_is_started_again_gets_its_adapters_back() -> None:
    server = Server()
    await server.client.start()
    versions = {server.client.residents_version}
    await server.client.activate(adapter("a"), tier="device", pin=False)
    versions.add(server.client.residents_version)
    await server.client.activate(adapter("b"), tier="host", pin=True)
    versions.add(server.client.residents_version)
    await server.client.activate(adapter("c"), tier="device", pin=False)
    assert len(versions) == 3
    kept = server.client.resident_set()
    await server.client.stop()
    assert server.client.resident_set() == kept, "stopping is no eviction"
    again = Server()
    again.client.expect_residents(kept)
    await again.client.start()
    await again.until({"a": "device", "b": "host", "c": "device"})
    assert again.client.resident_set() == kept
    assert Resident(adapter("b"), "host", "host") in kept
    await again.client.stop()


@pytest.mark.timeout(30)
async def test_a_pause_survives_an_engine_and_ends_without_one() -> None:
    server = Server()
    await server.client.start()
    await server.client.activate(adapter("a"), tier="device", pin=False)

    async def new_tokens() -> int:
        request = SequenceRequest([1] * 9, 2, SamplingParams())
        return sum([len(output.tokens) async for output in server.client.generate(request)])

    await server.client.pause(True)
    first, *_ = LoopConnection.made
    waiting = asyncio.create_task(new_tokens())
    await asyncio.sleep(0)
    assert (first.engine.scheduler.waiting, first.engine.loop.steps) == (1, 0)
    first.kill()
    with refused(EngineFailed):
        await waiting
    await server.until({"a": "device"}, starts=2)
    second = LoopConnection.made[1]
    waiting = asyncio.create_task(new_tokens())
    await asyncio.sleep(0)
    assert (second.engine.scheduler.waiting, second.engine.loop.steps) == (1, 0)
    await server.client.pause(False)
    assert await waiting == 2
    assert second.engine.loop.steps > 0
    await server.client.stop()
    await server.client.pause(False)
    assert not server.client.paused
    with refused(EngineFailed):
        await server.client.pause(True)
    assert not server.client.paused


class Told:
    """What is counted of a call."""

    def __init__(self) -> None:
        self.prefill: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self.tokens = 0

    def prefilled(self, tokens: int, cached: int) -> None:
        self.prefill.put_nowait((tokens, cached))

    def unread(self, tokens: int) -> None:
        self.tokens += tokens


def asked(prompt: int, new: int) -> SequenceRequest:
    return SequenceRequest([1] * prompt, new, SamplingParams())


@pytest.mark.timeout(30)
async def test_what_its_caller_does_not_read_keeps_no_place() -> None:
    """Samples that the engine has ended: they kept their places from everybody, until they were
    read. Further samples of the same request wait until then."""
    config = msgspec.structs.replace(CONFIG, max_running=2)
    client = EngineClient(config, max_queue=2, on_event=lambda event: None)
    await client.start()
    places = client.places
    with places.hold(4, Fairness("hog")) as place:
        samples = [client.generate(asked(9, 3), place) for _ in range(4)]
        reads = [asyncio.create_task(anext(sample)) for sample in samples]
        await asyncio.wait(reads[:2])
        for _ in range(1000):  # whatever else could run has run
            await asyncio.sleep(0)
        with places.hold(1, Fairness("light")), places.hold(1, Fairness("light")):
            assert places.taken == 2
            assert not any(read.done() for read in reads[2:])
        for sample, read in zip(samples, reads, strict=True):
            assert (await read).finish == "length"
            await sample.aclose()
    assert places.taken == places.samples == 0
    await client.stop()


@pytest.mark.timeout(30)
async def test_a_further_sample_has_waited_since_it_was_asked_for() -> None:
    """It goes by its request's arrival in the queue; what happened before it was asked for is
    counted by whoever asks, and was counted twice."""
    config = msgspec.structs.replace(CONFIG, max_running=2)
    client = EngineClient(config, max_queue=2, on_event=lambda event: None)
    await client.start()
    LoopConnection.made[-1].engine.now = time.monotonic()
    with client.places.hold(2) as place:
        place.since -= 1000.0
        for _ in range(2):
            async with aclosing(client.generate(asked(9, 3), place)) as outputs:
                waited = (await anext(outputs)).queue_seconds
                assert 0 <= waited < 500
    await client.stop()


@pytest.mark.timeout(30)
async def test_what_was_computed_counts_when_its_caller_leaves() -> None:
    """Six steps of 32 tokens, then it leaves: before its first token, and with tokens that it
    has not read."""
    server, told = Server(), Told()
    await server.client.start()
    outputs = server.client.generate(asked(990, 1), counts=told)
    reading = asyncio.ensure_future(anext(outputs))
    found = [(await told.prefill.get())[0] for _ in range(6)]
    reading.cancel()
    await asyncio.wait({reading})
    while found[-1] != found[-2]:  # its last message, after it has left
        found.append((await told.prefill.get())[0])
    assert found[:-1] == list(range(32, found[-1] + 32, 32))
    assert found[-1] < 990
    told = Told()
    outputs = server.client.generate(asked(9, 40), counts=told)
    read = len((await anext(outputs)).tokens)
    assert await told.prefill.get() == (9, 8), "two blocks are those of the prompt before"
    for _ in range(1000):  # until the rest of the six tokens has arrived
        await asyncio.sleep(0)
    await outputs.aclose()
    assert 6 <= read + told.tokens < 40
    await server.client.stop()
