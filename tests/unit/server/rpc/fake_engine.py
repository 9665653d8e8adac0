"""FAKE engine: `EngineClient`'s methods without a process, a model or a GPU.

Tokens are a function of SHA-256(weights digest, prompt, seed), so that any mix-up
is an exact mismatch. Tests control it through `pace` and `script`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Literal

from veneer_registry.errors import (
    AdapterBudgetExceeded,
    AdapterInUse,
    EngineFailed,
    QueueFull,
    VeneerError,
)
from veneer_server.engine_client.client import EngineEvent, TokenCounter
from veneer_server.engine_client.places import Place, Places, Refusal, Seat
from veneer_server.engine_client.resident_set import Resident
from veneer_server.wire.messages import (
    AdapterSource,
    BudgetsState,
    EngineConfig,
    EngineInfo,
    EvictMode,
    Occupancy,
    ResidencyChanged,
    SequenceOutput,
    SequenceRequest,
    StepDone,
    TierName,
    pack_tops,
)

VOCABULARY = 49152
CONTEXT = 64


def fake_tokens(digest: str, prompt: list[int], seed: int, count: int) -> list[int]:
    """The fake's answer: ordinary tokens, never special ones."""
    key = hashlib.sha256(f"{digest}|{prompt}|{seed}".encode()).digest()
    return [1000 + key[i % 32] * 7 + i for i in range(count)]


def _tops(token: int, count: int) -> list[tuple[int, float]]:
    """Likeliest first: the token itself, then made-up ones."""
    return [(token + i, -0.5 - i) for i in range(count)]


class _Ended(asyncio.Queue["VeneerError | None"]):
    """What ends a stream from outside."""

    def fail(self, error: VeneerError) -> None:
        self.put_nowait(error)


class FakeEngine:
    """Replaces `EngineClient`; see the module docstring."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_queue: int,
        max_wait_s: float = 0.0,
        on_refused: Callable[[str, Refusal], None] = lambda tenant, why: None,
        on_event: Callable[[EngineEvent], None],
        on_health: Callable[[bool], None],
        hold: Callable[[AdapterSource], AbstractContextManager[object]],
    ) -> None:
        self.config = config
        self.info = EngineInfo(
            device="fake",
            backend="fake",
            architecture="FakeForCausalLM",
            parameters=1,
            weights_bytes=1,
            context_length=CONTEXT,
            vocab_size=VOCABULARY,
            kv_cache_tokens=1000,
            longest_sequence=min(CONTEXT, 1000),
            adapter_itemsize=2,
            load_seconds=0.0,
            max_batch_tokens=32,
            max_prefill_tokens=16,
            longest_step_seconds=2.5,
            threads=3,
            why_threads="it is fake",
        )
        self.quantization, self.tensor_parallel = config.quantization, config.tensor_parallel
        self.starts = 0
        self.healthy = False
        self.in_flight = 0
        self.pid: int | None = None
        self.places = Places(
            config.max_running, max_queue, max_wait_s=max_wait_s, on_refused=on_refused
        )
        self.load_gate = asyncio.Event()
        self.load_gate.set()
        self.residency: dict[str, ResidencyChanged] = {}
        self.sources: dict[str, AdapterSource] = {}
        self.budgets = (config.host_adapter_bytes, config.device_adapter_bytes)
        self.expected: list[Resident] = []
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.reset()
        self._on_event = on_event
        self._on_health = on_health
        self.hold = hold
        self._streams: set[_Ended] = set()

    def reset(self) -> None:
        """Reset all state of tests."""
        self.submitted: list[SequenceRequest] = []
        self.evictions: list[tuple[str, str]] = []
        self.counted: list[TokenCounter] = []
        """Of the first samples, in the order in which they were submitted."""
        self.cancelled = self.resets = 0
        self.activations: list[str] = []
        self.activating: asyncio.Event | None = None
        """If set, activations wait for it."""
        self.pace: asyncio.Semaphore | None = None
        """If set, each output waits for a permit."""
        self.script: list[SequenceOutput | VeneerError] | None = None
        """If set, the outputs of every sequence."""

    async def start(self) -> EngineInfo:
        await self.load_gate.wait()
        self.starts += 1
        self.set_health(True)
        return self.info

    async def stop(self) -> None:
        self.set_health(False)

    def set_health(self, healthy: bool) -> None:
        self.healthy = healthy
        self._on_health(healthy)

    def step(self, seconds: float) -> None:
        """Report a decode step of 4 rows and 2 adapters."""
        self._on_event(StepDone(1, seconds, 0, 4, 2))
        self._on_event(Occupancy(4, 3, 1, 5, 10))

    def tell(self, event: EngineEvent) -> None:
        """Report any event."""
        self._on_event(event)

    def crash(self) -> None:
        """End every stream as a dead engine process does."""
        self.set_health(False)
        for stream in self._streams:
            stream.fail(EngineFailed("the engine ended; retry", retry_after_s=2.0))

    async def generate(
        self,
        request: SequenceRequest,
        place: Place | None = None,
        *,
        sibling: bool = False,
        counts: TokenCounter | None = None,
    ) -> AsyncIterator[SequenceOutput]:
        assert place is not None, "a request without a place"
        seat = self.places.take(place)
        while True:
            while seat is None or seat.returned:
                seat = await self.places.turn(place, sibling=sibling, after=seat)
            try:
                if counts is not None and not sibling:
                    self.counted.append(counts)
                async with aclosing(self._run(request, seat)) as outputs:
                    async for output in outputs:
                        yield output
                return
            except QueueFull:
                if not seat.returned:
                    raise
            finally:
                self.places.leave(seat)

    async def _run(
        self, request: SequenceRequest, seat: Seat
    ) -> AsyncGenerator[SequenceOutput, None]:
        self.submitted.append(request)
        outputs: Sequence[SequenceOutput | VeneerError] = self.script or self._outputs(request)
        crashed = _Ended()
        self._streams.add(crashed)
        seat.stream = crashed
        self.places.resolved(seat.place, request)
        self.in_flight += 1
        ended = False
        try:
            for output in outputs:
                await self.resumed.wait()
                if self.pace is not None:
                    await self._permit(crashed)
                if isinstance(output, VeneerError):
                    ended = True
                    raise output
                self.places.started(seat)
                ended = output.finish is not None
                yield output
        finally:
            self.in_flight -= 1
            self._streams.discard(crashed)
            self.cancelled += not ended

    def _outputs(self, request: SequenceRequest) -> list[SequenceOutput]:
        digest = request.adapter.weights_digest if request.adapter is not None else ""
        weights = request.adapter.digest if request.adapter is not None else ""
        tokens = fake_tokens(weights, request.prompt, request.sampling.seed, request.max_tokens)
        prompt, count, top_logprobs = request.prompt, request.max_tokens, request.top_logprobs
        tier: TierName = "disk"
        if digest in self.residency:
            tier = self.residency[digest].tier
        elif digest:
            self._set_tier(digest, "device", pinned=False)
        return [
            SequenceOutput(
                sequence=1,
                tokens=[token],
                logprobs=[-0.5] if request.logprobs else None,
                prompt_logprobs=[-1.0] * (len(prompt) - 1)
                if request.prompt_logprobs and not i
                else None,
                tier=tier if digest and not i else None,
                load_seconds=0.25 if digest and not i else 0.0,
                queue_seconds=0.0 if i else 0.125,
                top_logprobs=[_tops(token, top_logprobs)] if top_logprobs else None,
                prompt_top_logprobs=[pack_tops(_tops(id_, top_logprobs)) for id_ in prompt[1:]]
                if request.prompt_logprobs and top_logprobs and not i
                else None,
                prompt_ranks=[7 + at for at in range(len(prompt) - 1)]
                if request.prompt_ranks and not i
                else None,
                cached_tokens=0 if i else 16,
                finish="length" if i == count - 1 else None,
            )
            for i, token in enumerate(tokens)
        ]

    async def _permit(self, crashed: _Ended) -> None:
        assert self.pace is not None
        permit = asyncio.ensure_future(self.pace.acquire())
        crash = asyncio.ensure_future(crashed.get())
        try:
            await asyncio.wait({permit, crash}, return_when=asyncio.FIRST_COMPLETED)
            if crash.done() and (error := crash.result()) is not None:
                raise error
        finally:
            permit.cancel()
            crash.cancel()

    def _set_tier(self, digest: str, tier: TierName, *, pinned: bool) -> None:
        event = ResidencyChanged(
            digest, tier, pinned, 10, 10, 10 * (tier == "device"), 1, int(tier == "device")
        )
        if tier == "disk":
            self.residency.pop(digest, None)
        else:
            self.residency[digest] = event
        self._on_event(event)

    async def activate(
        self, adapter: AdapterSource, *, tier: Literal["host", "device"], pin: bool
    ) -> bool:
        self.sources[adapter.weights_digest] = adapter
        self.activations.append(adapter.weights_digest)
        if self.activating is not None:
            await self.activating.wait()
        keeps = adapter.weights_digest in self.pins
        self._set_tier(adapter.weights_digest, tier, pinned=pin or keeps)
        return pin

    async def evict(
        self,
        weights_digest: str,
        *,
        mode: EvictMode,
        unpin: bool,
    ) -> tuple[bool, int]:
        self.evictions.append((weights_digest, mode))
        if mode == "fail_if_busy" and self.in_flight:
            raise AdapterInUse("busy: wait, or use another mode")
        self._set_tier(weights_digest, "disk", pinned=False)
        return True, 10

    @property
    def paused(self) -> bool:
        return not self.resumed.is_set()

    async def pause(self, paused: bool) -> None:
        (self.resumed.clear if paused else self.resumed.set)()

    async def reset_prefix_cache(self) -> None:
        self.resets += 1

    async def unpin(self, weights_digest: str) -> None:
        if (state := self.residency.get(weights_digest)) is not None:
            self._set_tier(weights_digest, state.tier, pinned=False)

    async def reference(self, tokens: list[int], adapter: AdapterSource | None) -> list[float]:
        """What `_outputs` says too."""
        return [-1.0] * (len(tokens) - 1)

    async def update_budgets(
        self, *, host_bytes: int | None, device_bytes: int | None
    ) -> BudgetsState:
        if device_bytes is not None and device_bytes < 10 * len(self.pins):
            raise AdapterBudgetExceeded("pins take more: unpin one")
        host, device = self.budgets
        self.budgets = (
            host if host_bytes is None else host_bytes,
            device if device_bytes is None else device_bytes,
        )
        return BudgetsState(*self.budgets, 10, 10)

    @property
    def pins(self) -> list[str]:
        return [digest for digest, state in self.residency.items() if state.pinned]

    @property
    def residents_version(self) -> int:
        return hash(self.resident_set())

    def resident(self) -> list[str]:
        return list(self.residency)

    def resident_set(self) -> tuple[Resident, ...]:
        return tuple(
            Resident(
                self.sources[digest],
                "device" if state.tier == "device" else "host",
                "device" if state.pinned else None,
            )
            for digest, state in self.residency.items()
            if digest in self.sources
        )

    def expect_residents(self, residents: Iterable[Resident]) -> None:
        self.expected += residents

    def tier(self, weights_digest: str) -> ResidencyChanged | None:
        return self.residency.get(weights_digest)
