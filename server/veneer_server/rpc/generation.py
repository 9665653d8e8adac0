"""One generate request from admission to its end; both generate calls use it.

`Generator.admit` is the only place that takes what a request holds (the revision
lease and the engine's sequence) and the only place that gives it back.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, cast

from veneer_registry.adapter import AdapterRef, Tier
from veneer_registry.errors import ContextTooLong, DeadlineTooShort, InternalError, VeneerError
from veneer_registry.registry import Registry, RevisionLease

from veneer_server.engine.client import EngineClient
from veneer_server.engine.messages import SamplingParams, SequenceOutput, Tops
from veneer_server.logs import get_logger
from veneer_server.metrics import Metrics
from veneer_server.rpc.adapter_view import AdapterUse, source_of
from veneer_server.rpc.convert import (
    ChatMessages,
    FinishReason,
    GenerateCall,
    PromptText,
    Provenance,
    Sampling,
)
from veneer_server.rpc.threads import Background
from veneer_server.text.defaults import SamplingDefaults
from veneer_server.text.detokenizer import Detokenizer, StopStrings
from veneer_server.text.prompts import Prompt, Prompts

__all__ = ["Delta", "Generation", "Generator"]

_SEED_BITS: Final = 63

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Delta:
    """What came out since the last one. The last has `finish` set.

    Attributes:
        top_logprobs, prompt_top_logprobs: one entry for each log-probability beside it.
        index: the sample that it belongs to.
    """

    text: str
    tokens: list[int]
    logprobs: list[float] | None
    prompt_logprobs: list[float] | None
    finish: FinishReason | None
    top_logprobs: list[Tops] | None = None
    prompt_top_logprobs: list[Tops] | None = None
    index: int = 0


class Generation:
    """An admitted request. Iterate `deltas` once; the numbers are final after it."""

    def __init__(
        self,
        call: GenerateCall,
        prompt: Prompt,
        ref: AdapterRef | None,
        outputs: AsyncIterator[SequenceOutput],
        generator: Generator,
        arrived: float,
    ) -> None:
        self.prompt = prompt
        self.ref = ref
        self.completion_tokens = 0
        self.finish: FinishReason | None = None
        self.provenance = Provenance(base_model=generator.base_name)
        self._outputs = outputs
        self._metrics = generator.metrics
        self._detokenizer = Detokenizer(generator.prompts.tokenizer, continues=True)
        self._stops = StopStrings(call.stops)
        self._arrived = arrived
        self._submitted = time.perf_counter()
        self._first_token: SequenceOutput | None = None
        self._first_token_s = 0.0
        self._queue_s = 0.0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """One for each output of the engine. Raises what the engine raised."""
        metrics = self._metrics
        last = 0.0
        async for output in self._outputs:
            now = time.perf_counter()
            count = len(output.tokens)
            if self._first_token is None:
                self._first(output, now)
            else:
                for _ in range(count):
                    metrics.inter_token.observe((now - last) / count)
            last = now
            self.completion_tokens += count
            metrics.generation_tokens.inc(count)
            delta = self._delta(output)
            if delta.finish is not None:
                self.finish = delta.finish
                self.provenance = self._provenance(now)
            yield delta
            if delta.finish is not None:
                return
        raise InternalError("the engine ended a sequence without a finish reason")

    def _first(self, output: SequenceOutput, now: float) -> None:
        self._first_token = output
        self._first_token_s = now - self._arrived
        self._queue_s = output.queue_seconds + (self._submitted - self._arrived)
        self._metrics.queue_time.observe(self._queue_s)
        self._metrics.first_token.labels(output.tier or "none").observe(self._first_token_s)
        if output.tier is not None:
            self._metrics.adapter_found(output.tier)

    def _delta(self, output: SequenceOutput) -> Delta:
        stops = self._stops
        finish: FinishReason | None = output.finish
        text = stops.feed(self._detokenizer.feed(output.tokens))
        if finish is not None and not stops.stopped:
            text += stops.feed(self._detokenizer.flush())
            text += stops.flush()
        if stops.stopped:
            finish = "stop"
        return Delta(
            text,
            output.tokens,
            output.logprobs,
            output.prompt_logprobs,
            finish,
            top_logprobs=output.top_logprobs,
            prompt_top_logprobs=output.prompt_top_logprobs,
        )

    @property
    def tier(self) -> Tier | None:
        """Where the adapter was found; known with the first delta."""
        first = self._first_token
        return Tier(first.tier) if first is not None and first.tier is not None else None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; known with the first delta."""
        return self._first_token.cached_tokens if self._first_token is not None else 0

    def facts(self) -> dict[str, float]:
        """What the log says of it, finished or not; never its text."""
        first = self._first_token
        return {
            "prompt_tokens": len(self.prompt.ids),
            "new_tokens": self.completion_tokens,
            "queue_s": round(self._queue_s, 4),
            "load_s": round(first.load_seconds, 4) if first is not None else 0.0,
            "first_token_s": round(self._first_token_s, 4),
            "total_s": round(time.perf_counter() - self._arrived, 4),
        }

    def _provenance(self, now: float) -> Provenance:
        first, ref = self._first_token, self.ref
        assert first is not None, "an output came first"
        return Provenance(
            base_model=self.provenance.base_model,
            adapter=ref.name if ref else "",
            revision=ref.revision if ref else "",
            weights_digest=ref.weights_digest if ref else "",
            tier=self.tier,
            queue_s=self._queue_s,
            load_s=first.load_seconds,
            first_token_s=self._first_token_s,
            total_s=now - self._arrived,
        )


class Generator:
    """Admits requests: fixes the revision, makes the prompt, checks it fits, submits."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        registry: Registry,
        prompts: Prompts,
        defaults: SamplingDefaults,
        metrics: Metrics,
        use: AdapterUse,
        background: Background,
        base_name: str,
        step_seconds: Callable[[], float],
    ) -> None:
        """Args: step_seconds: how long a step takes of late, 0 if unknown."""
        self.prompts = prompts
        self.metrics = metrics
        self.base_name = base_name
        self._engine = engine
        self._registry = registry
        self._defaults = defaults
        self._use = use
        self._background = background
        self._step_seconds = step_seconds

    @asynccontextmanager
    async def admit(
        self, call: GenerateCall, *, time_remaining: float | None
    ) -> AsyncIterator[Generation]:
        """A submitted request; left, it holds nothing any more, however it ended.

        Args:
            time_remaining: seconds to the caller's deadline, None without one.

        Raises:
            AdapterNotFound, ContextTooLong, DeadlineTooShort, InvalidField,
            TemplateFailed: the request cannot be served as it is.
            QueueFull, EngineFailed: not now.
        """
        arrived = time.perf_counter()
        self._check_deadline(time_remaining)
        lease = self._registry.acquire(call.adapter) if call.adapter else None
        outputs: AsyncIterator[SequenceOutput] | None = None
        generation: Generation | None = None
        outcome = "cancelled"
        try:
            prompt = await self._prompt(call, lease)
            outputs = self._submit(call, prompt, lease)
            ref = lease.ref if lease is not None else None
            generation = Generation(call, prompt, ref, outputs, self, arrived)
            yield generation
            outcome = generation.finish or "cancelled"
        except VeneerError as error:
            outcome = error.reason
            raise
        finally:
            try:
                if outputs is not None:
                    await cast(AsyncGenerator[SequenceOutput, None], outputs).aclose()
            finally:
                if lease is not None:
                    lease.release()
                    if self._registry.needs_sweep:
                        self._background.start("sweep", self._registry.sweep)
                self._record(generation, lease, outcome)

    def _check_deadline(self, time_remaining: float | None) -> None:
        if time_remaining is not None and time_remaining <= self._step_seconds():
            raise DeadlineTooShort(
                f"the deadline leaves {max(0.0, time_remaining) * 1000:.0f} ms, less than one "
                "step takes: allow more time"
            )

    async def _prompt(self, call: GenerateCall, lease: RevisionLease | None) -> Prompt:
        match call.input:
            case PromptText(text):
                return await self.prompts.from_text(text)
            case ChatMessages(messages):
                template = lease.record.manifest.chat_template if lease is not None else None
                return await self.prompts.from_messages(messages, template)
            case tokens:
                return self.prompts.from_ids(
                    tokens.ids, vocab_size=self._engine.info.vocab_size, with_text=call.echo
                )

    def _submit(
        self, call: GenerateCall, prompt: Prompt, lease: RevisionLease | None
    ) -> AsyncIterator[SequenceOutput]:
        max_tokens = self._room(call.max_tokens, len(prompt.ids))
        source = None
        if lease is not None:
            source = source_of(self._registry, lease.record)
            self.metrics.adapter_request(lease.ref.name)
            self._use.touch(lease.ref)
        self.metrics.prompt_tokens.inc(len(prompt.ids))
        return self._engine.generate(
            prompt.ids,
            max_tokens=max_tokens,
            sampling=self._sampling(call.sampling),
            adapter=source,
            ignore_eos=call.ignore_eos,
            logprobs=call.logprobs,
            prompt_logprobs=call.logprobs and call.echo,
        )

    def _room(self, wanted: int | None, prompt_tokens: int) -> int:
        """Most new tokens of this request."""
        info = self._engine.info
        limit = min(info.context_length, info.kv_cache_tokens)
        room = limit - prompt_tokens
        numbers = {
            "prompt_tokens": str(prompt_tokens),
            "context_length": str(info.context_length),
            "kv_cache_tokens": str(info.kv_cache_tokens),
        }
        if room < 1:
            raise ContextTooLong(
                f"the prompt has {prompt_tokens} tokens, but prompt and completion together "
                f"may have {limit}: shorten the prompt to at most {limit - 1} tokens",
                metadata={"field": "prompt", **numbers},
            )
        if wanted is not None and wanted > room:
            raise ContextTooLong(
                f"max_tokens is {wanted}, but after a prompt of {prompt_tokens} tokens only "
                f"{room} of {limit} are left: ask for at most {room}, or leave it unset",
                metadata={"field": "stopping.max_tokens", "largest": str(room), **numbers},
            )
        return room if wanted is None else wanted

    def _sampling(self, given: Sampling) -> SamplingParams:
        base = self._defaults
        return SamplingParams(
            temperature=base.temperature if given.temperature is None else given.temperature,
            top_k=base.top_k if given.top_k is None else given.top_k,
            top_p=base.top_p if given.top_p is None else given.top_p,
            seed=secrets.randbits(_SEED_BITS) if given.seed is None else given.seed,
        )

    def _record(
        self, generation: Generation | None, lease: RevisionLease | None, outcome: str
    ) -> None:
        """Metrics and one log line for a request that has ended."""
        adapter = lease.ref.short if lease is not None else ""
        if generation is None:
            _log.info("request refused", outcome=outcome, adapter=adapter)
            return
        metrics, facts = self.metrics, generation.facts()
        if outcome in ("stop", "length", "cancelled"):
            metrics.requests.labels(outcome).inc()
            metrics.request_prompt_tokens.observe(facts["prompt_tokens"])
            metrics.request_generation_tokens.observe(facts["new_tokens"])
        if generation.finish is not None:
            metrics.latency.observe(facts["total_s"])
        _log.info("request", outcome=outcome, adapter=adapter, **facts)
