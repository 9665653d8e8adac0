"""Cancels calls of AdapterService wherever they wait, and checks what is left.

The service, the registry (real SQLite, real files), `EngineClient`, the step loop and
residency are real; the engine's runner and memory are FAKE (`LoopConnection`) and run in this
event loop, one turn at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_registry.registry import Registry
from veneer_server.access.caller import Caller
from veneer_server.config import load_config
from veneer_server.engine_client import supervisor
from veneer_server.engine_client.client import EngineClient, EngineEvent
from veneer_server.rpc.adapter_service import AdapterService
from veneer_server.serving.changes import AdapterBudgets
from veneer_server.serving.downloads import Downloads
from veneer_server.serving.events import source_of
from veneer_server.serving.registering import Resolving, Transfers
from veneer_server.serving.tenants import Furnish, Tenants
from veneer_server.serving.uploads import UploadPlaces
from veneer_server.telemetry.adapter_log import AdapterLog
from veneer_server.telemetry.metrics import Metrics
from veneer_server.wire.messages import (
    EngineConfig,
    SamplingParams,
    SequenceRequest,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode,
)

from tests.unit.registry.kit import BASE
from tests.unit.server.engine.test_client_memory import LoopConnection
from tests.unit.server.rpc.front_harness import upload

BUDGET = 100_000
"""Bytes; an adapter of `registry.kit` takes some 10,000."""

T = TypeVar("T")


class Turns(LoopConnection):
    """FAKE, like its base class, but the loop's turns alternate with those of the front."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._left = 0

    def write(self, message: ToEngine) -> None:
        (decoded,) = decode_to_engine(encode([message])[4:])
        self.engine.inbox.put(decoded)
        if not self._left:
            asyncio.get_running_loop().call_soon(self._turn)
        self._left = 8

    def _turn(self) -> None:
        self.engine.turn()
        said, self.engine.sent[:] = list(self.engine.sent), []
        for each in decode_from_engine(encode(said)[4:]) if said else ():
            self.said.put_nowait(each)
        self._left -= 1
        if self._left:
            asyncio.get_running_loop().call_soon(self._turn)

    async def rest(self) -> None:
        """Run until it has nothing to do."""
        while self._left:  # noqa: ASYNC110 - turns have no event
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)


class Cancelled:
    """Awaits a coroutine and cancels its task once, at its k-th wait.

    Args:
        wait: the wait at which to cancel, from 0.
        later: turns of the event loop after the start of that wait.
        again: also cancel at every further wait.
    """

    def __init__(
        self, work: Coroutine[Any, Any, T], wait: int, *, later: int = 0, again: bool = False
    ) -> None:
        self.reached = False
        self._work = work
        self._wait = wait
        self._later = later
        self._again = again

    def __await__(self) -> Generator[Any, Any, Any]:
        count = 0
        error: BaseException | None = None
        while True:
            try:
                waited_for = self._work.send(None) if error is None else self._work.throw(error)
            except StopIteration as stop:
                return stop.value
            if count == self._wait or (self._again and count > self._wait):
                self.reached = True
                self._cancel_soon(self._later if count == self._wait else 0)
            count += 1
            error = None
            try:
                yield waited_for
            except BaseException as raised:
                error = raised

    def _cancel_soon(self, turns: int) -> None:
        task = asyncio.current_task()
        assert task is not None

        def next_turn(left: int) -> None:
            if not left:
                task.cancel()
            else:
                asyncio.get_running_loop().call_soon(next_turn, left - 1)

        next_turn(turns)


class Server:
    """The front's adapter part, without sockets."""

    def __init__(self, folder: Path) -> None:
        self.registry = Registry.open(folder, BASE)
        self.store = folder / "store" / "weights"
        self.tenants = Tenants(folder)
        self.engine = EngineClient(
            EngineConfig(
                "", "", "", "", host_adapter_bytes=BUDGET, device_adapter_bytes=BUDGET
            ),
            max_queue=8,
            on_event=self._on_event,
            hold=self.tenants.hold,
        )
        self.metrics = Metrics()
        self.budgets = AdapterBudgets(
            BUDGET,
            BUDGET,
            memory=(BUDGET, BUDGET),  # type: ignore[arg-type]  # the plan is what was planned
            engine=self.engine,
            metrics=self.metrics,
            plan=lambda host, device: (host, device),  # type: ignore[arg-type,return-value]
        )
        registering: Any = None  # no test here registers by URI
        self.service = AdapterService(
            self.tenants,
            budgets=self.budgets,
            transfers=Transfers(registering, Downloads(), Resolving("", registering)),
        )
        self._log = AdapterLog(self.tenants)
        self._requests = AsyncExitStack()
        self.context = SimpleNamespace(caller=Caller(actor="test", peer="here"))

    async def start(self) -> None:
        await self.engine.start()
        prompts: Any = None  # only a self-test has some
        await self.tenants.start(
            Furnish(load_config({}, {}), self.engine, prompts, UploadPlaces()),
            self.registry,
            open_=lambda folder, lock: Registry.open(folder, BASE, lock=lock),
            max_tenants=1,
        )
        self.events = self.tenants.default.events
        self._began = self.events.last

    def _on_event(self, event: EngineEvent) -> None:
        self._log.on_engine_event(event)
        self.tenants.on_engine_event(event)

    @property
    def connection(self) -> Turns:
        connection = Turns.made[-1]
        assert isinstance(connection, Turns)
        return connection

    async def push(self, folder: Path, name: str, **options: Any) -> Any:
        async def messages() -> AsyncIterator[Any]:
            for message in upload(folder, name, **options):
                yield message

        return await self.service.UploadAdapter(messages(), self.context)

    async def call(self, rpc: str, **fields: Any) -> Any:
        request = getattr(pb, f"{rpc}Request")(**fields)
        return await getattr(self.service, rpc)(request, self.context)

    async def request(self, name: str) -> None:
        """Start a request to an adapter, which runs until `end_requests`."""
        source = source_of(self.registry, self.registry.get(name))
        request = SequenceRequest([1, 2, 3], 900, SamplingParams(), adapter=source)
        outputs = self.engine.generate(request)
        self._requests.callback(self.registry.acquire(name).release)
        self._requests.push_async_callback(outputs.aclose)
        await anext(outputs)

    async def end_requests(self) -> None:
        await self._requests.aclose()

    # ------------------------------------------------------------------ what is there

    @property
    def residency(self) -> Any:
        return self.connection.engine.scheduler.residency

    def in_memory(self) -> dict[str, bool]:
        """Weights that the engine holds, loads or wants, and whether they are pinned."""
        entries = self.residency.ledger.entries
        return {digest: entry.pinned is not None for digest, entry in entries.items()}

    def means(self, name: str) -> str | None:
        """The current weights of a name."""
        if name not in self.registry:
            return None
        return self.registry.resolve(name).weights_digest

    def history(self, name: str) -> list[str]:
        return [line.event for line in self.registry.history(name)][::-1]

    def happened(self) -> list[str]:
        return [event.kind for event in self.events.after(self._began) or ()]

    async def check(self) -> None:
        """Check that engine, front, catalog and disk agree, and that nothing unneeded is
        left."""
        await self.connection.rest()
        memory = self.in_memory()
        front = {r.source.weights_digest: r.pin is not None for r in self.engine.resident_set()}
        assert front == memory, "the front knows of other adapters or pins than the engine"
        named = {d for d in memory if self.registry.names(d)}
        assert memory.keys() == named, "a copy of what nobody can ask for"
        await self.connection.rest()
        kept = {row.weights: row.pin is not None for row in self.registry.residents()}
        pins = {digest for digest, pinned in memory.items() if pinned}
        assert {d for d, pinned in kept.items() if pinned} == pins, "pins for the next start"
        digests = {path.name for path in self.store.iterdir()}
        assert digests == {d for d in digests if self.registry.names(d)}, "files of nobody"
        for digest in digests:
            assert not self.registry.leases(digest), "a lease without a request"
        assert not self.residency.operator_wants, "an operator's want without an operator"
        self.connection.engine.loop.check_integrity()


@asynccontextmanager
async def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(supervisor, "EngineConnection", Turns)
    made = Server(folder)
    try:
        await made.start()
        yield made
    finally:
        await made.tenants.stop()
        await made.engine.stop()
        made.registry.close()
