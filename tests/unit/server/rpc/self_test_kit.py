"""A self-test on a real engine with a tiny base.

The step loop runs on a thread of this process, so that a test can access resident adapters.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from veneer_registry.adapter import AdapterRef, BaseFingerprint, BaseSpec
from veneer_registry.registry import Registry
from veneer_server.engine_client.client import EngineClient
from veneer_server.models.config import read_decoder_config
from veneer_server.serving.events import AdapterUse, source_of
from veneer_server.serving.self_test import SelfTest, SelfTestReport
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.text.prompts import Prompts
from veneer_server.wire.messages import EngineConfig, SequenceRequest, ToEngine

from tests.engine_harness import GREEDY, EngineHarness, engine
from tests.tiny_llama import make_lora, make_tiny_llama
from tests.unit.registry.kit import push

NAMES = ("one", "two", "three")


class LoopThread:
    """Replaces `Supervisor`: the engine's loop is a thread and is never restarted."""

    connection, started, healthy = object(), True, True

    def __init__(self, harness: EngineHarness) -> None:
        self.harness = harness

    def write(self, message: ToEngine) -> None:
        self.harness.tell(message)


class Bench:
    """A self-test with access to its engine and registry."""

    def __init__(
        self, harness: EngineHarness, client: EngineClient, registry: Registry, base: Path
    ) -> None:
        self.harness = harness
        self.client = client
        self.registry = registry
        self.prompts = Prompts(base)
        self.use = AdapterUse()
        self.self_test = SelfTest(registry, client, self.prompts, self.use, dtype="float32")

    def ref(self, name: str) -> AdapterRef:
        return self.registry.resolve(name)

    @property
    def tables(self) -> dict[str, AdapterTable]:
        return self.harness.memory.tables

    def table(self, name: str) -> AdapterTable:
        return self.tables[self.ref(name).weights_digest]

    async def run(self, *names: str) -> SelfTestReport:
        return await self.self_test.run(names)

    async def score(self, name: str) -> list[int]:
        """Send a request to an adapter."""
        adapter = source_of(self.registry, self.registry.get(name))
        outputs = self.client.generate(SequenceRequest([5, 6], 1, GREEDY, adapter=adapter))
        return [token async for output in outputs for token in output.tokens]

    async def failed(self, *names: str) -> list[str]:
        """Plain names of failed adapters; ``base`` for the base."""
        report = await self.run(*names)
        failed = [v.name.partition("@")[0] or "base" for v in report.verdicts if not v.passed]
        assert report.passed == (not failed)
        return failed


def settings(base: Path, **changes: Any) -> EngineConfig:
    options: dict[str, Any] = {
        "weights_fingerprint": "",
        "quantization": "none",
        "dtype": "float32",
        "kv_cache_bytes": 8 << 20,
    }
    return EngineConfig(
        base_folder=str(base),
        cache_folder=str(base / "cache"),
        base_name="tiny",
        device="cpu",
        **options | changes,
    )


@contextmanager
def pumped(harness: EngineHarness, client: EngineClient) -> Iterator[None]:
    """Passes the engine's messages to the client, in the client's event loop."""
    here = asyncio.get_running_loop()

    def pump() -> None:
        while (message := harness.out.get()) is not None:
            here.call_soon_threadsafe(client.receive, message)

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield
    finally:
        harness.out.put(None)  # type: ignore[arg-type]  # the end of this pump
        thread.join()


@asynccontextmanager
async def bench(
    folder: Path, names: Sequence[str] = NAMES, **changes: Any
) -> AsyncIterator[Bench]:
    base = make_tiny_llama(folder / "base")
    decoder = read_decoder_config(base)
    fingerprint = BaseFingerprint("a" * 64, "b" * 64)
    spec = BaseSpec(
        name="tiny",
        num_layers=decoder.num_layers,
        shapes=decoder.shapes,
        fingerprint=fingerprint,
        serving_dtype="float32",
    )
    config = settings(base, **changes)
    with engine(config) as harness, Registry.open(folder / "data", spec) as registry:
        for seed, name in enumerate(names):
            push(registry, name, make_lora(folder / name, seed=seed, rank=2 + 2 * seed))
        client = EngineClient(config, max_queue=8)
        # private: the engine is a thread of this process, which nobody supervises
        client._supervisor = LoopThread(harness)  # type: ignore[assignment]
        client.info = harness.info
        with pumped(harness, client):
            made = Bench(harness, client, registry, base)
            yield made
            await made.prompts.close()
        assert client.in_flight == 0
        leases = [registry.leases(made.ref(n).weights_digest) for n in names if n in registry]
        assert leases == [0] * len(leases)
