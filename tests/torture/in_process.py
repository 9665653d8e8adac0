"""Run the whole server inside this process: real sockets, front and step loop, no child
process.

The engine's loop runs on a thread instead of in a process, with the same client and the same
message encoding. So thousands of requests per minute pass through every part that keeps
adapters apart, and a bug can be planted by patching a function.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from transformers.utils import logging as transformers_logging
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc
from veneer_registry.errors import EngineFailed, VeneerError
from veneer_server.app import App
from veneer_server.config import load_config
from veneer_server.constraints.grammars import Grammars
from veneer_server.engine.loop import StepLoop
from veneer_server.engine.process import build_engine
from veneer_server.engine_client.client import EngineClient
from veneer_server.step.inbox import Inbox
from veneer_server.wire.frames import LENGTH
from veneer_server.wire.messages import (
    EngineConfig,
    EngineInfo,
    FromEngine,
    StepDone,
    Stop,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode,
)

from tests.torture.forms import TORCH, Form

STOP_SECONDS = 30


class InProcess:
    """A running server and stubs that talk to it.

    Attributes:
        engine_error: the error that ended the step loop, if any.
    """

    def __init__(self, app: App, client: _ThreadClient, channel: grpc.aio.Channel) -> None:
        self.app = app
        self._client = client
        # The stubs are typed for synchronous channels.
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        self.adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)

    @property
    def engine_error(self) -> BaseException | None:
        return self._client.thread.error

    @property
    def seen(self) -> Counter[str]:
        """Number of the engine's messages so far, by type."""
        return self._client.seen

    async def end(self) -> None:
        """Wait until nothing is in flight, end the step loop, and check that nothing is left.

        Raises:
            AssertionError: a block or hold is left.
            TimeoutError: a request stays in flight, or a revision stays leased.
        """
        async with asyncio.timeout(STOP_SECONDS):
            while self._client.in_flight or await self._leased():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await self._client.thread.stop()
        self._client.thread.loop.check_integrity()

    async def _leased(self) -> bool:
        """Return whether any current revision has a lease."""
        if self.engine_error is not None:
            return False
        asked = adapters_pb2.ListAdaptersRequest(page_size=100)
        answer: Any = await self.adapters.ListAdapters(asked)
        return any(adapter.leases for adapter in answer.adapters)


class _EngineThread:
    """Replaces `Supervisor`: the same calls, but the loop is a thread and is not restarted."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_message: Callable[[FromEngine], None],
        on_up: Callable[[EngineInfo], None],
        on_down: Callable[[VeneerError], None],
        on_health: Callable[[bool], None],
    ) -> None:
        self._config = config
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._on_health = on_health
        self.starts = 0
        self.healthy = False
        self.started = False
        self.connection: _EngineThread | None = None
        self.pid = None
        self.error: BaseException | None = None
        self._inbox: Inbox = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._grammars: Grammars | None = None

    async def start(self) -> None:
        self._here = asyncio.get_running_loop()
        parts = await asyncio.to_thread(build_engine, self._config, self._inbox)
        info, scheduler, residency, runner, memory, self._grammars = parts
        self.loop = StepLoop(
            inbox=self._inbox,
            scheduler=scheduler,
            residency=residency,
            runner=runner,
            memory=memory,
            grammars=self._grammars,
            send=self._send,
        )
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()
        self.connection, self.started, self.healthy = self, True, True
        self.starts += 1
        self._on_up(info)
        self._on_health(True)

    def settle(self) -> None:
        """Tell the loop to end, and wait until its thread has ended."""
        assert self._thread is not None
        self._inbox.put(Stop())
        self._thread.join(STOP_SECONDS)
        assert not self._thread.is_alive(), "the step loop does not end"
        if self._grammars is not None:
            self._grammars.close()
            self._grammars = None

    async def stop(self) -> None:
        if self._thread is None:
            return
        await asyncio.to_thread(self.settle)
        self._lost()

    def write(self, message: ToEngine) -> None:
        for decoded in decode_to_engine(encode([message])[LENGTH.size :]):
            self._inbox.put(decoded)

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:
            self.error = error
            self._here.call_soon_threadsafe(self._lost)

    def _send(self, messages: Sequence[FromEngine]) -> None:
        frame = encode(messages)[LENGTH.size :]
        self._here.call_soon_threadsafe(self._deliver, frame)

    def _deliver(self, frame: bytes) -> None:
        for message in decode_from_engine(frame):
            self._on_message(message)

    def _lost(self) -> None:
        self.connection = None
        self.healthy = False
        self._on_health(False)
        self._on_down(EngineFailed("the step loop ended", retry_after_s=1.0))


class _ThreadClient(EngineClient):
    """The front's engine client, with the loop on a thread."""

    def __init__(self, config: EngineConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.seen: Counter[str] = Counter()
        self.thread = _EngineThread(
            config,
            on_message=self.receive,
            on_up=self._up,
            on_down=self.fail_everything,
            on_health=options["on_health"],
        )
        self._supervisor: Any = self.thread

    def receive(self, message: FromEngine) -> None:
        self.seen[type(message).__name__] += 1
        if isinstance(message, StepDone):
            self.seen["prefix tokens"] += message.prefix_found
        super().receive(message)


@asynccontextmanager
async def in_process(
    base: Path, folder: Path, form: Form = TORCH, **flags: str
) -> AsyncIterator[InProcess]:
    """Serve ``base`` from this process until the block ends.

    Args:
        folder: existing folder for data, caches and the port file.
        flags: further settings of `load_config`, by option name.
    """
    transformers_logging.disable_progress_bar()
    for name in ("veneer_server", "veneer_registry"):
        # If a planted bug ends the engine, print nothing: the caller gets the error.
        logging.getLogger(name).addHandler(logging.NullHandler())
    port_file = folder / "ports.json"
    config = load_config(
        {
            "base": str(base),
            "listen": "127.0.0.1:0",
            "metrics_listen": "",
            "data_dir": str(folder / "data"),
            "cache_dir": str(form.cache(folder / "cache")),
            "port_file": str(port_file),
            "device": "cpu",
            "threads": "1",
            "grace": "5",
            **form.settings,
            **flags,
        },
        {},
    )
    clients: list[_ThreadClient] = []

    def make_client(*args: Any, **options: Any) -> _ThreadClient:
        clients.append(_ThreadClient(*args, **options))
        return clients[0]

    ready = asyncio.Event()
    app = App(config, lambda line: ready.set(), make_client)
    task = asyncio.create_task(app.run())
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiting.cancel()
        await task
    address = json.loads(port_file.read_text())["grpc"]
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            yield InProcess(app, clients[0], channel)
        finally:
            app.stop()
            await task
