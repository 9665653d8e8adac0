"""Admits generate requests, for both generate calls.

Only `Generator.admit` acquires and releases what a request holds: the revision lease and
the engine's sequence.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from typing import get_args

from veneer_registry.errors import ContextTooLong, DeadlineTooShort, VeneerError
from veneer_registry.lease import RevisionLease

from veneer_server.access.principal import PRINCIPAL
from veneer_server.engine_client.client import EngineClient
from veneer_server.engine_client.places import Place
from veneer_server.logs import REQUEST_ID, get_logger
from veneer_server.queues.fairness import FAIRNESS
from veneer_server.quotas.meter import Meter, Metered
from veneer_server.serving import checks
from veneer_server.serving.adapters.use import source_of
from veneer_server.serving.answer_room import AnswerRoom, AnswerSize, Held
from veneer_server.serving.generation import Generation
from veneer_server.serving.limits import (
    check_constraint_size,
    check_ids,
    kept_tokens,
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
from veneer_server.serving.spare_time import SpareTime
from veneer_server.serving.tenants.tenant import Tenant
from veneer_server.serving.tenants.tenants import Tenants
from veneer_server.serving.tenants.visible import Visible
from veneer_server.serving.threads import Background
from veneer_server.serving.tools.reading import Plan, ReplyReader
from veneer_server.serving.tools.use import about_tools
from veneer_server.serving.transfer.resolving import Resolving
from veneer_server.serving.who import sender
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.tracing import Phases, Tracing
from veneer_server.text.defaults import RequestDefaults
from veneer_server.text.prompts import Prompt, Prompts, Room
from veneer_server.text.tokenizer import TooManyTokens
from veneer_server.wire.messages import Constraint, SequenceRequest

__all__ = ["Generator"]


_log = get_logger(__name__)


class Generator:
    """Admits requests: resolves the revision, builds the prompt, checks its size, submits."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        tenants: Tenants,
        prompts: Prompts,
        defaults: RequestDefaults,
        metrics: Metrics,
        background: Background,
        base_name: str,
        step_seconds: Callable[[], float],
        meter: Meter,
        resolving: Resolving | None = None,
        tracing: Tracing | None = None,
        constraint_bytes: int = 32 << 10,
        tool_parser: str = "auto",
    ) -> None:
        """Args:
        step_seconds: recent duration of a step; 0 if unknown.
        resolving: fetches unknown adapters; None fetches none.
        tracing: None makes no spans.
        constraint_bytes: size of the largest constraint allowed.
        tool_parser: as the flag has it.
        """
        self.prompts = prompts
        self.answers = AnswerRoom()
        self.spare_time = SpareTime()
        self.metrics = metrics
        self.base_name = base_name
        self._meter = meter
        self._tracing = tracing or Tracing()
        self._resolving = resolving
        self._engine = engine
        self._tenants = tenants
        self._visible = Visible(tenants)
        self._defaults = defaults
        self._background = background
        self._step_seconds = step_seconds
        self._constraint_bytes = constraint_bytes
        self._tool_parser = tool_parser

    @asynccontextmanager
    async def admit(
        self,
        call: GenerateCall,
        *,
        time_remaining: float | None,
        counted: Metered | None = None,
        place: Place | None = None,
        held: Held | None = None,
    ) -> AsyncIterator[Generation]:
        """Submit a request. When the block ends, however it ends, everything is released.

        Args:
            time_remaining: seconds to the caller's deadline; None if there is none.
            counted, place: of the request of which this is a part; None if it is the whole.
            held: the room of the answer, for callers that keep it until it has been read.

        Raises:
            RateLimitExceeded, QuotaExceeded: its caller may not have it, now or ever.
            AdapterNotFound, ContextTooLong, DeadlineTooShort, InvalidField,
            TemplateFailed: the request cannot be served as it is.
            QueueFull, EngineFailed, Unavailable: the request cannot be served now.
        """
        arrived = time.perf_counter()
        # A point in time, not a duration: the clock runs while the request waits.
        deadline = None if time_remaining is None else time.monotonic() + time_remaining
        owner, lease, shown = None, None, ""
        generation: Generation | None = None
        plan: Plan | None = None
        outcome, failed = "cancelled", ""
        try:
            self._check_deadline(time_remaining)
            forced = call.tools is not None and call.tools.forced
            self._check_size(call.constraint, by_tools=forced)
            if call.adapter:
                home = await self._tenants.current()
                if self._resolving is not None and not self._visible.knows(home, call.adapter):
                    await self._resolving.fetch(home, call.adapter)
                owner, lease = self._visible.acquire(home, call.adapter, call.session_key)
                shown = self._visible.shown(home, owner, lease.ref.name)
            # Before any work: requests that wait for it then count towards the queue limit.
            with (
                self.count(call.n) if counted is None else nullcontext(counted) as measured,
                self.place(call.n, time_remaining)
                if place is None
                else nullcontext(place) as placed,
                self.answers.answer(sender()) if held is None else nullcontext(held) as answer,
            ):
                plan = self._plan(call, lease)
                prompt = await self._prompt(call, lease)
                fetch_s = None
                if owner is not None and lease is not None:
                    fetch_s = await _brought(owner, lease)
                counts = await measured.prompt(len(prompt.ids), call.n)
                call = await self._fitting(call, prompt, answer)
                request = self._resolve(call, prompt, plan, owner, lease, deadline)
                ref = lease.ref if lease is not None else None
                generation = Generation(
                    *(call, prompt, Provenance.of(self.base_name, ref, shown), request),
                    *(self._engine, arrived, counts, placed),
                    metrics=self.metrics,
                    reader=ReplyReader.of(self.prompts.tokenizer, prompt, plan),
                    fetch_s=fetch_s,
                )
                try:
                    yield generation
                finally:
                    await generation.close()
            outcome = generation.finish or "cancelled"
        except VeneerError as error:
            outcome, failed = error.reason, error.message
            if plan is not None and plan.by_tools:
                raise about_tools(error) from error
            raise
        finally:
            if owner is not None and lease is not None:
                lease.release()
                if owner.registry.needs_sweep:
                    self._background.start(f"sweep {owner.name}", owner.registry.sweep)
            trace = self._trace(generation, lease, outcome, failed)
            self._record(generation, lease, outcome, trace)

    async def _fitting(self, call: GenerateCall, prompt: Prompt, held: Held) -> GenerateCall:
        """The call, with fewer tokens if it leaves their number to the server and its answer
        would become too large. Waits for the room that its answer takes. Raises InvalidField
        if it asks for too large an answer."""
        if not call.scored:
            return call
        size = AnswerSize.of(
            call.form,
            self.prompts.names,
            prompt_tokens=len(prompt.ids),
            prompt_tops=call.prompt_tops,
            tops=call.top_logprobs if call.logprobs else None,
            echoed=len(prompt.text) * call.n if call.echo else 0,
        )
        wanted = 1 if call.max_tokens == 0 else call.max_tokens
        most = room(self._engine.info, wanted, len(prompt.ids), self._defaults.max_tokens)
        fitting = await held.fits(size, call.form, call.max_tokens, most, call.n)
        return call if fitting == most else replace(call, max_tokens=fitting)

    def count(self, samples: int, prompts: int = 1) -> Metered:
        """Count a request of the current caller. See `Meter.request`."""
        who = PRINCIPAL.get()
        return self._meter.request(who.accounts, who.tenant, samples, prompts)

    def place(self, count: int, within_s: float | None = None) -> AbstractContextManager[Place]:
        """Places for ``count`` samples of the current call, see `Places.hold`."""
        return self._engine.places.hold(count, FAIRNESS.get(), within_s=within_s)

    def check_text(self, text: bytes, *, cut: bool = False) -> None:
        """Raise ContextTooLong for a UTF-8 prompt that cannot fit, before it is copied as
        protobuf, text and tokens.

        Args:
            cut: only its last tokens will be kept.
        """
        info = self._engine.info
        space = Room(info.vocab_size, most_prompt_tokens(info))
        self.prompts.check_bytes(text, (space.to_cut if cut else space).tokens, "prompt")

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
                "step takes: increase the deadline"
            )

    def _check_size(self, constraint: Constraint | None, *, by_tools: bool) -> None:
        """Raises InvalidField for a constraint that is too long, before any work."""
        if constraint is None:
            return
        try:
            check_constraint_size(constraint, self._constraint_bytes)
        except VeneerError as error:
            raise about_tools(error) if by_tools else error from None

    def _plan(self, call: GenerateCall, lease: RevisionLease | None) -> Plan:
        """How the answer may look. Raises InvalidField if nobody could read its calls."""
        family, tokenizer = None, self.prompts.tokenizer
        if call.tools is not None:
            family = self.prompts.family(_template(lease), self._tool_parser)
        plan = Plan.of(call.tools, family, call.constraint, tokenizer)
        self._check_size(plan.constraint, by_tools=plan.by_tools)
        return plan

    async def _prompt(self, call: GenerateCall, lease: RevisionLease | None) -> Prompt:
        info = self._engine.info
        space = Room(info.vocab_size, most_prompt_tokens(info))
        if call.truncate_prompt is not None:
            kept = kept_tokens(info, call.truncate_prompt, call.max_tokens)
            prompt = await self._read(call, lease, space.to_cut, kept)
            return await self.prompts.last(prompt, kept, sender(), with_text=call.echo)
        return await self._read(call, lease, space, None)

    async def _read(
        self, call: GenerateCall, lease: RevisionLease | None, space: Room, kept: int | None
    ) -> Prompt:
        """The whole prompt; of token ids only the last ``kept``, if it is set."""
        info, whose, echo = self._engine.info, sender(), call.echo
        try:
            match call.input:
                case PromptText(text):
                    return await self.prompts.from_text(text, space, whose)
                case ChatMessages(messages=messages, options=options, tools=tools):
                    return await self.prompts.from_messages(
                        *(messages, _template(lease), space, whose),
                        tools=[tool.for_template() for tool in tools],
                        options=options,
                    )
                case tokens:
                    ids = tokens.ids if kept is None else tokens.ids[-kept:]
                    room(info, call.max_tokens, len(ids))  # before they are copied
                    return await self.prompts.from_ids(ids, space, whose, with_text=echo)
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
        plan: Plan,
        owner: Tenant | None,
        lease: RevisionLease | None,
        deadline: float | None,
    ) -> SequenceRequest:
        """The request for the engine, with all defaults filled in.

        Args:
            owner: whose adapter it is.
            deadline: the caller's deadline, on the monotonic clock.
        """
        info = self._engine.info
        wanted = 1 if call.max_tokens == 0 else call.max_tokens  # it is not shown
        max_tokens = room(info, wanted, len(prompt.ids), self._defaults.max_tokens)
        checks.check_min_tokens(call.min_tokens, max_tokens)
        check_ids(info, "sampling.logit_bias", call.sampling.logit_bias)
        check_ids(info, "stopping.stop_token_ids", call.stop_token_ids)
        source = None
        if owner is not None and lease is not None:
            source = source_of(owner.registry, lease.record).of(owner.name)
            self.metrics.adapters.requested(owner.name, lease.ref.name)
            owner.use.touch(lease.ref)
        self.metrics.prompt_tokens.inc(len(prompt.ids))
        fairness = FAIRNESS.get()
        return SequenceRequest(
            prompt.ids,
            max_tokens=max_tokens,
            sampling=resolve_sampling(call.sampling, self._defaults),
            adapter=source,
            ignore_eos=call.ignore_eos,
            logprobs=call.logprobs,
            prompt_logprobs=call.prompt_tops is not None,
            prompt_ranks=call.prompt_logprobs is not None,
            top_logprobs=max(call.top_logprobs, call.prompt_tops or 0),
            stop_token_ids=list(call.stop_token_ids),
            min_tokens=call.min_tokens,
            constraint=plan.constraint,
            use_prefix_cache=call.use_prefix_cache is not False,
            # How many tokens were cached tells what somebody else has asked.
            cache_scope=PRINCIPAL.get().tenant,
            deadline=deadline,
            sender=sender(),
            tenant=fairness.tenant,
            fairness_id=fairness.fairness_id,
            weight=fairness.weight,
            priority=call.priority or fairness.priority,
        )

    def _record(
        self,
        generation: Generation | None,
        lease: RevisionLease | None,
        outcome: str,
        trace: str,
    ) -> None:
        """Metrics and one log line for a request that has ended; ``trace`` is its id."""
        if generation is None:
            return  # the call's own log line says why it was refused
        metrics, facts = self.metrics, generation.facts()
        if outcome in get_args(FinishReason):
            ended = "stop" if outcome == "tool_calls" else outcome
            metrics.requests.labels(ended).inc()
            metrics.request_prompt_tokens.observe(facts["prompt_tokens"])
            metrics.request_generation_tokens.observe(facts["new_tokens"])
        if generation.finish is not None:
            metrics.latency.observe(facts["total_s"])
        _log.info(
            "request",
            outcome=outcome,
            tenant=generation.tenant,
            adapter=""
            if lease is None
            else replace(lease.ref, name=generation.provenance.adapter).short,
            tier=generation.tier.value if generation.tier is not None else "",
            **facts,
            **({"trace": trace} if trace else {}),
        )

    def _trace(
        self,
        generation: Generation | None,
        lease: RevisionLease | None,
        outcome: str,
        failed: str,
    ) -> str:
        """Spans of a request that has ended, under the names of OpenTelemetry's conventions for
        generative models where it has some. Returns the trace's id, "" without tracing."""
        attributes: dict[str, str | int | tuple[str, ...]] = {
            "gen_ai.system": "veneer",
            "gen_ai.request.model": self.base_name,
            "gen_ai.request.id": REQUEST_ID.get(),
            "veneer.tenant": PRINCIPAL.get().tenant,
        }
        if lease is not None:
            attributes |= {
                "veneer.adapter": generation.provenance.adapter
                if generation
                else lease.ref.name,
                "veneer.adapter.revision": lease.ref.revision,
            }
        if generation is None:
            return self._tracing.request(None, outcome, attributes, failed=failed)
        facts = generation.facts()
        if generation.tier is not None:
            attributes["veneer.adapter.tier"] = generation.tier.value
        if generation.finish is not None:
            attributes["gen_ai.response.finish_reasons"] = (generation.finish,)
        attributes |= {
            "gen_ai.usage.input_tokens": int(facts["prompt_tokens"]),
            "gen_ai.usage.output_tokens": int(facts["new_tokens"]),
            "veneer.cached_prompt_tokens": int(facts["cached_tokens"]),
        }
        phases = Phases(
            facts["queue_s"], facts["load_s"], facts["first_token_s"], facts["total_s"]
        )
        return self._tracing.request(phases, outcome, attributes, failed=failed)


def _template(lease: RevisionLease | None) -> str | None:
    """The chat template that an adapter brings along."""
    return None if lease is None else lease.record.manifest.chat_template


async def _brought(owner: Tenant, lease: RevisionLease) -> float | None:
    """Bring an adapter's weights to this machine. Returns seconds; None if they were here."""
    began = time.perf_counter()
    fetched = await owner.registry.present(lease.ref)
    return time.perf_counter() - began if fetched else None
