"""One generate request from admission to its end; both generate calls use it.

Only `Generator.admit` acquires and releases what a request holds: the revision lease and
the engine's sequence.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext

import msgspec
from veneer_registry.adapter import AdapterRef, Tier
from veneer_registry.errors import ContextTooLong, DeadlineTooShort, VeneerError
from veneer_registry.lease import RevisionLease
from veneer_registry.registry import Registry

from veneer_server.access.principal import PRINCIPAL
from veneer_server.engine_client.client import EngineClient
from veneer_server.engine_client.places import Place
from veneer_server.logs import get_logger
from veneer_server.queues.fairness import FAIRNESS
from veneer_server.serving.adapters.use import AdapterUse, source_of
from veneer_server.serving.limits import (
    check_constraint_size,
    check_ids,
    most_prompt_tokens,
    resolve_sampling,
    room,
)
from veneer_server.serving.records import (
    ChatMessages,
    FinishReason,
    GenerateCall,
    PromptText,
    Provenance,
)
from veneer_server.serving.samples import Delta, Sample, SampleStreams, sample_seed
from veneer_server.serving.threads import Background
from veneer_server.serving.who import CALLER
from veneer_server.telemetry.metrics import Metrics
from veneer_server.text.defaults import RequestDefaults
from veneer_server.text.prompts import Prompt, Prompts, Room
from veneer_server.text.tokenizer import TooManyTokens
from veneer_server.wire.messages import SequenceOutput, SequenceRequest

__all__ = ["Delta", "Generation", "Generator"]


_log = get_logger(__name__)


class Generation:
    """An admitted request. Iterate `deltas` once; after that the numbers are final.

    The other samples are submitted after the first sample's first token: the prompt is
    then in the prefix cache, and is not computed again for each of them.
    """

    def __init__(
        self,
        call: GenerateCall,
        prompt: Prompt,
        ref: AdapterRef | None,
        request: SequenceRequest,
        engine: EngineClient,
        generator: Generator,
        arrived: float,
        place: Place,
    ) -> None:
        """Args: request: that of the first sample; `_of_sample` derives the others."""
        self.prompt = prompt
        self.ref = ref
        self.completion_tokens = 0
        self.finish: FinishReason | None = None
        """That of the last sample to end, once all have ended."""
        self.provenance = Provenance(base_model=generator.base_name)
        self.tenant = request.tenant
        self._request = request
        self._engine = engine
        self._place = place
        self._metrics = generator.metrics
        self._samples = [
            Sample(
                index,
                generator.prompts.tokenizer,
                stops=call.stops,
                stop_token_ids=call.stop_token_ids,
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
        return Tier(first.tier) if first is not None and first.tier is not None else None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first sample found in the prefix cache; known from the
        first delta on."""
        return self._first_output.cached_tokens if self._first_output is not None else 0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """One delta per output of the engine. Raises what the engine raises; if one
        sample fails, the request fails."""
        self._streams.add(0, self._engine.generate(self._request, self._place))
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
        await self._streams.aclose()

    def _count(self, sample: Sample, output: SequenceOutput, count: int, now: float) -> None:
        """Update metrics and counts for an output; ``count``: tokens that the caller gets."""
        if self._first_output is None:
            self._first(output, now)
        elif sample.last_output is not None:
            for _ in range(count):
                self._metrics.inter_token.observe((now - sample.last_output) / count)
        sample.last_output = now
        self.completion_tokens += count
        self._metrics.generation_tokens.inc(count)

    def _first(self, output: SequenceOutput, now: float) -> None:
        self._first_output = output
        self._first_token_s = now - self._arrived
        self._queue_s = output.queue_seconds + (self._submitted - self._arrived)
        self._metrics.queue_time.observe(self._queue_s)
        self._metrics.tenants.waited(self._request.tenant, self._queue_s)
        self._metrics.first_token.labels(output.tier or "none").observe(self._first_token_s)
        if output.tier is not None:
            self._metrics.adapter_found(output.tier)
        for sample in self._samples[1:]:
            request = _of_sample(self._request, sample.index)
            self._streams.add(sample.index, self._engine.generate(request, self._place))

    def facts(self) -> dict[str, float]:
        """Log fields of the request, finished or not; never its text."""
        first = self._first_output
        return {
            "prompt_tokens": len(self.prompt.ids),
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.completion_tokens,
            "queue_s": round(self._queue_s, 4),
            "load_s": round(first.load_seconds, 4) if first is not None else 0.0,
            "first_token_s": round(self._first_token_s, 4),
            "total_s": round(time.perf_counter() - self._arrived, 4),
        }

    def _provenance(self, now: float) -> Provenance:
        first, ref = self._first_output, self.ref
        assert first is not None, "a request ends with an output"
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
    """Admits requests: resolves the revision, builds the prompt, checks its size, submits."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        registry: Registry,
        prompts: Prompts,
        defaults: RequestDefaults,
        metrics: Metrics,
        use: AdapterUse,
        background: Background,
        base_name: str,
        step_seconds: Callable[[], float],
        constraint_bytes: int = 32 << 10,
    ) -> None:
        """Args:
        step_seconds: recent duration of a step; 0 if unknown.
        constraint_bytes: size of the largest constraint allowed.
        """
        self.prompts = prompts
        self.metrics = metrics
        self.base_name = base_name
        self._engine = engine
        self._registry = registry
        self._defaults = defaults
        self._use = use
        self._background = background
        self._step_seconds = step_seconds
        self._constraint_bytes = constraint_bytes

    @asynccontextmanager
    async def admit(
        self, call: GenerateCall, *, time_remaining: float | None, place: Place | None = None
    ) -> AsyncIterator[Generation]:
        """Submit a request. When the block ends, however it ends, everything is released.

        Args:
            time_remaining: seconds to the caller's deadline; None if there is none.
            place: the engine's places for the request, if the caller holds them already.

        Raises:
            AdapterNotFound, ContextTooLong, DeadlineTooShort, InvalidField,
            TemplateFailed: the request cannot be served as it is.
            QueueFull, EngineFailed: the request cannot be served now.
        """
        arrived = time.perf_counter()
        # A point in time, not a duration: the clock runs while the request waits.
        deadline = None if time_remaining is None else time.monotonic() + time_remaining
        self._check_deadline(time_remaining)
        if call.constraint is not None:
            check_constraint_size(call.constraint, self._constraint_bytes)
        lease = None
        if call.adapter:
            lease = self._registry.acquire(call.adapter, call.session_key)
        generation: Generation | None = None
        outcome = "cancelled"
        try:
            # Before any work: requests that wait for it then count towards the queue limit.
            with (
                self.place(call.n, time_remaining)
                if place is None
                else nullcontext(place) as held
            ):
                prompt = await self._prompt(call, lease)
                request = self._resolve(call, prompt, lease, deadline)
                ref = lease.ref if lease is not None else None
                generation = Generation(
                    call, prompt, ref, request, self._engine, self, arrived, held
                )
                try:
                    yield generation
                finally:
                    await generation.close()
            outcome = generation.finish or "cancelled"
        except VeneerError as error:
            outcome = error.reason
            raise
        finally:
            if lease is not None:
                lease.release()
                if self._registry.needs_sweep:
                    self._background.start("sweep", self._registry.sweep)
            self._record(generation, lease, outcome)

    def place(self, count: int, within_s: float | None = None) -> AbstractContextManager[Place]:
        """Places for ``count`` sequences of the current call, see `Places.hold`."""
        return self._engine.places.hold(count, FAIRNESS.get(), within_s=within_s)

    def check_text(self, text: bytes) -> None:
        """Raise ContextTooLong for a UTF-8 prompt that cannot fit, before it is copied as
        protobuf, text and tokens."""
        self.prompts.check_bytes(text, most_prompt_tokens(self._engine.info), "prompt")

    def check_count(self, tokens: int) -> None:
        """Raise ContextTooLong if a prompt has too many token ids, before they are used."""
        room(self._engine.info, None, tokens)

    @property
    def ready(self) -> bool:
        """Whether the engine's limits are known."""
        return self._engine.healthy

    def _check_deadline(self, time_remaining: float | None) -> None:
        if time_remaining is not None and time_remaining <= self._step_seconds():
            raise DeadlineTooShort(
                f"the deadline leaves {max(0.0, time_remaining) * 1000:.0f} ms, less than one "
                "step takes: allow more time"
            )

    async def _prompt(self, call: GenerateCall, lease: RevisionLease | None) -> Prompt:
        info = self._engine.info
        space = Room(info.vocab_size, most_prompt_tokens(info))
        try:
            match call.input:
                case PromptText(text):
                    return await self.prompts.from_text(text, space)
                case ChatMessages(messages):
                    template = None if lease is None else lease.record.manifest.chat_template
                    return await self.prompts.from_messages(
                        messages, template, space, CALLER.get()
                    )
                case tokens:
                    room(info, call.max_tokens, len(tokens.ids))  # before they are copied
                    return await self.prompts.from_ids(tokens.ids, space, with_text=call.echo)
        except TooManyTokens as error:
            count = error.count
        if count is not None:
            room(info, call.max_tokens, count)
        raise ContextTooLong(
            f"the prompt has far more tokens than the {space.tokens} that fit: shorten it",
            metadata={"field": "prompt", "largest": str(space.tokens)},
        )

    def _resolve(
        self,
        call: GenerateCall,
        prompt: Prompt,
        lease: RevisionLease | None,
        deadline: float | None,
    ) -> SequenceRequest:
        """The request for the engine, with all defaults filled in.

        Args:
            deadline: the caller's deadline, on the monotonic clock.
        """
        info = self._engine.info
        max_tokens = room(info, call.max_tokens, len(prompt.ids), self._defaults.max_tokens)
        check_ids(info, "sampling.logit_bias", call.sampling.logit_bias)
        check_ids(info, "stopping.stop_token_ids", call.stop_token_ids)
        source = None
        if lease is not None:
            source = source_of(self._registry, lease.record)
            self.metrics.adapters.requested(lease.ref.name)
            self._use.touch(lease.ref)
        self.metrics.prompt_tokens.inc(len(prompt.ids))
        fairness = FAIRNESS.get()
        return SequenceRequest(
            prompt.ids,
            max_tokens=max_tokens,
            sampling=resolve_sampling(call.sampling, self._defaults),
            adapter=source,
            ignore_eos=call.ignore_eos,
            logprobs=call.logprobs,
            prompt_logprobs=call.logprobs and call.echo,
            top_logprobs=call.top_logprobs,
            stop_token_ids=list(call.stop_token_ids),
            constraint=call.constraint,
            use_prefix_cache=call.use_prefix_cache is not False,
            # How many tokens were cached tells what somebody else has asked.
            cache_scope=PRINCIPAL.get().tenant,
            deadline=deadline,
            caller=CALLER.get(),
            tenant=fairness.tenant,
            fairness_id=fairness.fairness_id,
            weight=fairness.weight,
            priority=call.priority or fairness.priority,
        )

    def _record(
        self, generation: Generation | None, lease: RevisionLease | None, outcome: str
    ) -> None:
        """Metrics and one log line for a request that has ended."""
        if generation is None:
            return  # the call's own log line says why it was refused
        metrics, facts = self.metrics, generation.facts()
        if outcome in ("stop", "length", "cancelled"):
            metrics.requests.labels(outcome).inc()
            metrics.request_prompt_tokens.observe(facts["prompt_tokens"])
            metrics.request_generation_tokens.observe(facts["new_tokens"])
        if generation.finish is not None:
            metrics.latency.observe(facts["total_s"])
        _log.info(
            "request",
            outcome=outcome,
            tenant=generation.tenant,
            adapter=lease.ref.short if lease is not None else "",
            tier=generation.tier.value if generation.tier is not None else "",
            **facts,
        )


def _of_sample(request: SequenceRequest, index: int) -> SequenceRequest:
    """The request of a later sample: its own seed, no prompt log-probabilities (the first
    sample gives them), and no deadline (the first sample's first token has met it)."""
    sampling = msgspec.structs.replace(
        request.sampling, seed=sample_seed(request.sampling.seed, index)
    )
    return msgspec.structs.replace(
        request, sampling=sampling, prompt_logprobs=False, deadline=None
    )
