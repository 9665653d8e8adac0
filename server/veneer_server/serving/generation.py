"""Runs an admitted generate request; tracks running calls; shortens conversations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any, Final

from veneer_registry.adapter import Tier
from veneer_registry.errors import Draining, ModelLoading

from veneer_server.engine_client.client import EngineClient
from veneer_server.engine_client.places import Place
from veneer_server.quotas.meter import Counted
from veneer_server.serving.records import (
    FinishReason,
    GenerateCall,
    Provenance,
)
from veneer_server.serving.samples import Delta, Sample, SampleStreams, sample_request
from veneer_server.serving.tool_use import ReplyReader
from veneer_server.telemetry.metrics import Metrics
from veneer_server.text.prompts import Prompt
from veneer_server.wire.messages import SequenceOutput, SequenceRequest


class Generation:
    """An admitted generate request. Iterate `deltas` once; after that the numbers are final.

    The other samples are submitted after the first sample's first token: the prompt is then in
    the prefix cache, and is not computed again for each of them.
    """

    def __init__(
        self,
        call: GenerateCall,
        prompt: Prompt,
        provenance: Provenance,
        request: SequenceRequest,
        engine: EngineClient,
        arrived: float,
        counted: Counted,
        place: Place,
        *,
        metrics: Metrics,
        reader: ReplyReader,
        fetch_s: float | None = None,
    ) -> None:
        """Args:
        request: the first sample's request; `sample_request` derives the others.
        reader: makes the parsers of the samples' texts.
        fetch_s: seconds it took to fetch the adapter's weights; None if they were stored here.
        """
        self.counted = counted
        self.prompt = prompt
        self.completion_tokens = 0
        self.accepted_tokens = self.rejected_tokens = 0
        """Those of them that speculation had drafted, and tokens that it drafted in vain."""
        self.finish: FinishReason | None = None
        """The finish reason of the last sample to end; None until all have ended."""
        self.provenance = provenance
        """Its timings are filled in once all samples have ended."""
        self.tenant = request.tenant
        self._request = request
        self._fetch_s = fetch_s
        self._engine = engine
        self._place = place
        self._metrics = metrics
        self._samples = [
            Sample(
                index,
                reader.tokens,
                stops=call.stops,
                stop_token_ids=call.stop_token_ids,
                min_tokens=call.min_tokens,
                tops=None
                if call.prompt_logprobs is None
                else (call.top_logprobs, call.prompt_logprobs),
                parser=reader.parser(),
                ends_with_calls=reader.ends_with_calls,
                show_reasoning=call.include_reasoning,
                only_prompt=call.max_tokens == 0,
            )
            for index in range(call.n)
        ]
        self._streams = SampleStreams()
        self._arrived = arrived
        self._submitted = time.perf_counter()
        self._first_output: SequenceOutput | None = None
        self._first_token_s = 0.0
        self._queue_s = 0.0

    @property
    def tier(self) -> Tier | None:
        """The tier where the adapter was found; known from the first delta on."""
        first = self._first_output
        if first is None or first.tier is None:
            return None
        return Tier.REMOTE if self._fetch_s is not None else Tier(first.tier)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first sample found in the prefix cache; known from the
        first delta on."""
        return self._first_output.cached_tokens if self._first_output is not None else 0

    @property
    def reasoning_tokens(self) -> int:
        """The number of `completion_tokens` that are reasoning."""
        return sum(sample.thought for sample in self._samples)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield one delta per engine output. Raises the engine's errors; if one sample fails,
        the request fails."""
        outputs = self._engine.generate(self._request, self._place, counts=self.counted)
        self._streams.add(0, outputs)
        ended = 0
        while ended < len(self._samples):
            index, output = await self._streams.next()
            now = time.perf_counter()
            sample = self._samples[index]
            delta = sample.delta(output)
            self._count(sample, output, len(delta.tokens), now)
            if delta.finish is not None:
                ended += 1
                await self._streams.close(index)
            if ended == len(self._samples):
                self.finish = delta.finish
                self.provenance = self._provenance(now)
            yield delta

    async def close(self) -> None:
        """Cancel the samples that have not ended."""
        if self.finish is None:
            self.counted.left()
        try:
            await self._streams.aclose()
        finally:
            self.counted.unread(self._streams.dropped)

    def _count(self, sample: Sample, output: SequenceOutput, count: int, now: float) -> None:
        """Update metrics and counts for an output of which the caller gets ``count`` tokens."""
        if self._first_output is None:
            self._first(output, now)
        elif sample.last_output is not None:
            for _ in range(count):
                self._metrics.inter_token.observe((now - sample.last_output) / count)
        sample.last_output = now
        self.completion_tokens += count
        self.accepted_tokens += min(output.accepted, count)
        self.rejected_tokens += output.rejected
        self._metrics.generation_tokens.inc(count)
        self.counted.generated(count)

    def _first(self, output: SequenceOutput, now: float) -> None:
        self._first_output = output
        self.counted.first_output(output.cached_tokens)
        self._first_token_s = now - self._arrived
        before = self._submitted - self._arrived - (self._fetch_s or 0.0)
        self._queue_s = output.queue_seconds + before
        self._metrics.queue_time.observe(self._queue_s)
        self._metrics.tenants.waited(self._request.tenant, self._queue_s)
        tier = self.tier
        found = "none" if tier is None else tier.value
        self._metrics.first_token.labels(found).observe(self._first_token_s)
        if tier is not None:
            self._metrics.adapter_found(tier)
        for sample in self._samples[1:]:
            request = sample_request(self._request, sample.index)
            outputs = self._engine.generate(
                request, self._place, sibling=True, counts=self.counted
            )
            self._streams.add(sample.index, outputs)

    @property
    def _load_s(self) -> float:
        """Seconds it took to fetch and load the adapter."""
        first = self._first_output
        return (self._fetch_s or 0.0) + (first.load_seconds if first is not None else 0.0)

    def facts(self) -> dict[str, float]:
        """Log fields of the request, finished or not; never its text."""
        return {
            "prompt_tokens": len(self.prompt.ids),
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.completion_tokens,
            "queue_s": round(self._queue_s, 4),
            "load_s": round(self._load_s, 4),
            "first_token_s": round(self._first_token_s, 4),
            "total_s": round(time.perf_counter() - self._arrived, 4),
        }

    def _provenance(self, now: float) -> Provenance:
        first = self._first_output
        assert first is not None, "a request ends with an output"
        return replace(
            self.provenance,
            tier=self.tier,
            queue_s=self._queue_s,
            load_s=self._load_s,
            first_token_s=self._first_token_s,
            total_s=now - self._arrived,
        )


# -------------------- calls
# Tracks running calls, and admits new ones by phase: loading, serving, draining.

READER_LIMIT_S: Final = 30.0
"""Default limit on how long a caller may take to send or read a message."""

_CANCEL_WAIT_S: Final = 2.0

_QUIET_S, _QUIET_MOST_S = 0.1, 1.0
"""A drain ends when no call has arrived for `_QUIET_S`, but after `_QUIET_MOST_S` at the
latest. gRPC hands calls over one by one; calls that it still holds when it is stopped end with
CANCELLED, which clients do not retry, instead of UNAVAILABLE."""


class Phase(Enum):
    """What the server does with a new call."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Calls:
    """Admits calls by phase and tracks the running ones, so that a drain can end them.

    Belongs to one event loop. Every call runs inside `running`, in its own task.
    """

    def __init__(self, doing: Callable[[], str] = str) -> None:
        """Args: doing: describes what is being loaded; may return an empty string."""
        self.doing = doing
        self._phase = Phase.LOADING
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut_off = False
        self._arrived = float("-inf")

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def count(self) -> int:
        """Calls running now."""
        return len(self._tasks)

    def serve(self) -> None:
        """Admit calls from now on, unless the server is already draining."""
        if self._phase is Phase.LOADING:
            self._phase = Phase.SERVING

    def check_phase(self) -> None:
        """Raise unless the server serves now. Must be called for each call as it arrives.

        Raises:
            ModelLoading, Draining: the phase admits no call.
        """
        self._arrived = time.monotonic()
        if self._phase is Phase.LOADING:
            doing = self.doing()
            raise ModelLoading(
                f"the server is still loading{f' ({doing})' if doing else ''}: retry in a few "
                "seconds",
                metadata={"doing": doing} if doing else None,
                retry_after_s=1.0,
            )
        if self._phase is Phase.DRAINING:
            raise Draining(
                "the server is stopping: retry on another server, or when it has restarted",
                retry_after_s=1.0,
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the current task as a call while the block runs.

        Raises:
            ModelLoading, Draining: the phase admits no call.
        """
        self.check_phase()
        task = asyncio.current_task()
        assert task is not None, "calls run in tasks"
        self._tasks.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if self._cut_off:
                raise Draining(
                    "the server stopped before this request was finished: send it again, "
                    "or start the server with a larger --grace",
                    retry_after_s=1.0,
                ) from None
            raise
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

    def drain(self) -> None:
        """Admit no new calls from now on; running calls continue."""
        self._phase = Phase.DRAINING
        self._arrived = time.monotonic()  # more calls may be on their way

    async def finish(self, grace_s: float) -> int:
        """Wait for running calls, and cancel those still running after ``grace_s``; then wait
        for the calls on their way, which are refused. Returns how many were cancelled."""
        cancelled = await self._finish_running(grace_s)
        give_up = time.monotonic() + _QUIET_MOST_S
        # We wait for calls to stop arriving: no event tells us that.
        while (left := min(self._arrived + _QUIET_S, give_up) - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        return cancelled

    async def _finish_running(self, grace_s: float) -> int:
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
            return 0
        except TimeoutError:
            pass
        self._cut_off = True
        rest = list(self._tasks)
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=_CANCEL_WAIT_S)
        return len(rest)


# -------------------- shortening
# Decides which of the oldest turns of a conversation can be dropped until the rest fits;
# `Generator` then renders and counts the rest.

ANSWER_TOKENS: Final = 512
"""Tokens reserved for the answer if the caller does not say how many; a quarter of the context
if that is less."""

Messages = Sequence[Mapping[str, Any]]


def starts(messages: Messages) -> list[int]:
    """Return the message indices at which a shortened conversation may begin, the longest
    first: 0, then the start of each later user turn. If the last turn alone is too long, as an
    agent's may be, its oldest tool calls are dropped together with their results."""
    users = [at for at, message in enumerate(messages) if message["role"] == "user"]
    last = users[-1] if users else 0
    steps = [
        at
        for at, message in enumerate(messages)
        if at > last + 1 and message["role"] == "assistant"
    ]
    return [0, *users[1:], *steps]


def without_oldest(messages: Messages, start: int) -> tuple[Mapping[str, Any], ...]:
    """Return the messages from ``start`` on, preceded by the earlier system messages. If
    ``start`` is within the last turn, that turn's user message is kept as well."""
    older = messages[:start]
    kept = [message for message in older if message["role"] == "system"]
    if not any(message["role"] == "user" for message in messages[start:]):
        kept += [message for message in older if message["role"] == "user"][-1:]
    return (*kept, *messages[start:])
