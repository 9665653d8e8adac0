"""Admits generate requests from all APIs, streamed or not.

Only `Generator.admit` acquires and releases a request's resources: the revision lease and the
engine's sequences.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from typing import get_args

import msgspec
from veneer_registry.errors import ContextTooLong, DeadlineTooShort, VeneerError
from veneer_registry.lease import RevisionLease

from veneer_server.access.caller import Caller
from veneer_server.engine_client.client import EngineClient
from veneer_server.engine_client.places import Place
from veneer_server.logs import get_logger
from veneer_server.queues.fairness import Sender
from veneer_server.quotas.meter import Meter, Metered
from veneer_server.serving import checks
from veneer_server.serving.answer_room import AnswerBytes, AnswerRoom, AnswerSize
from veneer_server.serving.events import source_of
from veneer_server.serving.generation import ANSWER_TOKENS, Generation, starts, without_oldest
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
from veneer_server.serving.registering import Resolving
from veneer_server.serving.spare_time import Background, SpareTime
from veneer_server.serving.tenants import Tenant, Tenants
from veneer_server.serving.tool_use import AnswerPlan, ReplyReader, about_constraint
from veneer_server.serving.visible import Visible
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.tracing import Phases, Tracing
from veneer_server.text.defaults import RequestDefaults
from veneer_server.text.prompts import Prompt, Prompts, Room
from veneer_server.text.tokenizer import TooManyTokens
from veneer_server.wire.messages import SequenceRequest

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
        tracing: makes spans; None makes none.
        constraint_bytes: size of the largest constraint allowed.
        tool_parser: value of ``--tool-parser``.
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
        caller: Caller,
        *,
        counted: Metered | None = None,
        place: Place | None = None,
        held: AnswerBytes | None = None,
    ) -> AsyncIterator[Generation]:
        """Submit a request. When the block ends, however it ends, everything is released.

        Args:
            counted, place: the parent request's, if this request is part of another one; None
                if it stands alone.
            held: the room of the answer, for callers that keep it until it has been read.

        Raises:
            RateLimitExceeded, QuotaExceeded: the caller's limits forbid it, now or for good.
            AdapterNotFound, ContextTooLong, DeadlineTooShort, InvalidField,
            TemplateFailed: the request cannot be served as it is.
            QueueFull, EngineFailed, Unavailable: the request cannot be served now.
        """
        arrived = time.perf_counter()
        owner, lease, shown = None, None, ""
        generation: Generation | None = None
        forced = call.tools is not None and call.tools.forced
        constrains = "tools" if forced else call.constraint_field
        outcome, failed = "cancelled", ""
        sender = caller.sender
        try:
            self._check_deadline(caller.time_left)
            check_constraint_size(call.constraint, self._constraint_bytes)
            if call.adapter:
                home = await self._tenants.current(caller)
                if self._resolving is not None and not self._visible.knows(home, call.adapter):
                    await self._resolving.fetch(home, call.adapter, caller)
                owner, lease = self._visible.acquire(home, call.adapter, call.session_key)
                shown = self._visible.shown(home, owner, lease.ref.name)
            # Taken before any work, so that requests that wait for that work count towards the
            # queue limit.
            with (
                self.count(caller, call.n)
                if counted is None
                else nullcontext(counted) as measured,
                self.place(caller, call.n) if place is None else nullcontext(place) as placed,
                self.answers.answer(sender) if held is None else nullcontext(held) as answer,
            ):
                plan = self._plan(call, lease)
                if plan.by_tools:
                    constrains = "tools"
                check_constraint_size(plan.constraint, self._constraint_bytes)
                prompt = await self._prompt(call, lease, sender)
                fetch_s = None
                if owner is not None and lease is not None:
                    fetch_s = await _brought(owner, lease)
                counts = await measured.prompt(len(prompt.ids), call.n)
                call = await self._fitting(call, prompt, answer)
                request = self._resolve(call, caller, sender, prompt, plan, owner, lease)
                if call.prediction and self._engine.info.speculation:
                    request = await self._expecting(request, call.prediction)
                ref = lease.ref if lease is not None else None
                generation = Generation(
                    call,
                    prompt,
                    Provenance.of(self.base_name, ref, shown),
                    request,
                    self._engine,
                    arrived,
                    counts,
                    placed,
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
            if (told := about_constraint(error, constrains)) is not error:
                raise told from error
            raise
        finally:
            if owner is not None and lease is not None:
                lease.release()
                if owner.registry.needs_sweep:
                    self._background.start(f"sweep {owner.name}", owner.registry.sweep)
            trace = self._trace(caller, generation, lease, outcome, failed)
            self._record(generation, lease, outcome, trace)

    async def _expecting(self, request: SequenceRequest, prediction: str) -> SequenceRequest:
        """Add the answer that the caller expects."""
        info = self._engine.info
        space = Room(info.vocab_size, info.longest_sequence)
        expected = await self.prompts.expected(prediction, space, request.sender)
        return msgspec.structs.replace(request, prediction=expected)

    async def _fitting(
        self, call: GenerateCall, prompt: Prompt, held: AnswerBytes
    ) -> GenerateCall:
        """Wait until there is room for the answer's log-probabilities and token ids. Returns
        the call, with fewer tokens if it leaves their number to the server and its answer could
        become too large. Raises InvalidField if it asks for too large an answer."""
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
        most = self._most_tokens(call, len(prompt.ids))
        fitting = await held.fits(size, call.form, call.max_tokens, most, call.n)
        return call if fitting == most else replace(call, max_tokens=fitting)

    def _most_tokens(self, call: GenerateCall, prompt_tokens: int) -> int:
        """Return the most new tokens of a sample. Raises ContextTooLong if they cannot fit."""
        info = self._engine.info
        wanted = 1 if call.max_tokens == 0 else call.max_tokens  # the one token is not shown
        if call.clamped and wanted is not None:
            wanted = min(wanted, max(1, info.longest_sequence - prompt_tokens))
        default = self._defaults.most_tokens(open_ended=call.open_ended)
        return room(info, wanted, prompt_tokens, default)

    def count(self, caller: Caller, samples: int, prompts: int = 1) -> Metered:
        """Count a request. See `Meter.request`."""
        return self._meter.request(caller.principal.accounts, caller.tenant, samples, prompts)

    def place(self, caller: Caller, count: int) -> AbstractContextManager[Place]:
        """Take places for ``count`` samples of a call, see `Places.hold`."""
        return self._engine.places.hold(count, caller.fairness, within_s=caller.time_left)

    def check_text(self, text: bytes, *, cut: bool = False) -> None:
        """Raise ContextTooLong for a UTF-8 prompt that cannot fit, before it is copied as
        protobuf, text and tokens.

        Args:
            cut: the prompt will be truncated to its last tokens.
        """
        info = self._engine.info
        space = Room(info.vocab_size, most_prompt_tokens(info))
        self.prompts.check_bytes(text, (space.to_cut if cut else space).tokens, "prompt")

    def check_count(self, tokens: int) -> None:
        """Raise ContextTooLong if a prompt has too many token ids, before they are used."""
        room(self._engine.info, None, tokens)

    def reads_calls(self, adapter_template: str | None) -> bool:
        """Whether the model may choose to call tools in chats with an adapter's template, or
        else the base's: the server must know the template's format of tool calls."""
        return self.prompts.family(adapter_template, self._tool_parser) is not None

    @property
    def ready(self) -> bool:
        """Whether the engine's limits are known."""
        return self._engine.healthy

    def _check_deadline(self, time_left: float | None) -> None:
        if time_left is not None and time_left <= self._step_seconds():
            raise DeadlineTooShort(
                f"the deadline leaves {time_left * 1000:.0f} ms, less than one "
                "step takes: increase the deadline"
            )

    def _plan(self, call: GenerateCall, lease: RevisionLease | None) -> AnswerPlan:
        """Plan the answer. Raises InvalidField if the server could not parse its tool calls."""
        family, tokenizer = None, self.prompts.tokenizer
        if call.tools is not None:
            family = self.prompts.family(_template(lease), self._tool_parser)
        return AnswerPlan.of(call.tools, family, call.constraint, tokenizer)

    async def _prompt(
        self, call: GenerateCall, lease: RevisionLease | None, sender: Sender
    ) -> Prompt:
        info = self._engine.info
        space = Room(info.vocab_size, most_prompt_tokens(info))
        if call.truncate_prompt is not None:
            kept = kept_tokens(info, call.truncate_prompt, call.max_tokens)
            prompt = await self._read(call, lease, sender, space.to_cut, kept)
            return await self.prompts.last(prompt, kept, sender, with_text=call.echo)
        if isinstance(call.input, ChatMessages) and call.input.drop_oldest:
            return await self._shortened(call, call.input, lease, sender, space)
        return await self._read(call, lease, sender, space, None)

    async def _shortened(
        self,
        call: GenerateCall,
        chat: ChatMessages,
        lease: RevisionLease | None,
        sender: Sender,
        space: Room,
    ) -> Prompt:
        """Build the prompt from as many of the latest turns as fit."""
        longest = self._engine.info.longest_sequence
        answer = call.max_tokens or min(ANSWER_TOKENS, longest // 4)
        room = replace(space, tokens=max(1, longest - answer))

        async def read(start: int, within: Room) -> Prompt:
            kept = replace(chat, messages=without_oldest(chat.messages, start))
            return await self._read(replace(call, input=kept), lease, sender, within, None)

        async def fitting(start: int) -> Prompt | None:
            try:
                prompt = await read(start, room)
            except ContextTooLong:
                return None
            return prompt if len(prompt.ids) <= room.tokens else None

        begin = starts(chat.messages)
        if (found := await fitting(begin[0])) is not None:
            return found
        low, high = 1, len(begin) - 1
        while low <= high:  # if a conversation fits, so does every shorter one
            middle = (low + high) // 2
            if (prompt := await fitting(begin[middle])) is None:
                low = middle + 1
            else:
                found, high = prompt, middle - 1
        return found or await read(begin[-1], space)

    async def _read(
        self,
        call: GenerateCall,
        lease: RevisionLease | None,
        sender: Sender,
        space: Room,
        kept: int | None,
    ) -> Prompt:
        """Build the whole prompt; a prompt of token ids keeps only the last ``kept``, if
        set."""
        info, echo = self._engine.info, call.echo
        try:
            match call.input:
                case PromptText(text):
                    return await self.prompts.from_text(text, space, sender)
                case ChatMessages(messages=messages, options=options, tools=tools):
                    return await self.prompts.from_messages(
                        messages,
                        _template(lease),
                        space,
                        sender,
                        tools=[tool.for_template() for tool in tools],
                        options=options,
                    )
                case tokens:
                    ids = tokens.ids if kept is None else tokens.ids[-kept:]
                    room(info, call.max_tokens, len(ids))  # checked before they are copied
                    return await self.prompts.from_ids(ids, space, sender, with_text=echo)
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
        caller: Caller,
        sender: Sender,
        prompt: Prompt,
        plan: AnswerPlan,
        owner: Tenant | None,
        lease: RevisionLease | None,
    ) -> SequenceRequest:
        """Make the request for the engine, with all defaults filled in.

        Args:
            owner: the tenant that owns the adapter.
        """
        info = self._engine.info
        max_tokens = self._most_tokens(call, len(prompt.ids))
        checks.check_min_tokens(call.min_tokens, max_tokens)
        check_ids(info, "sampling.logit_bias", call.sampling.logit_bias)
        check_ids(info, "stopping.stop_token_ids", call.stop_token_ids)
        source = None
        if owner is not None and lease is not None:
            source = source_of(owner.registry, lease.record).of(owner.name)
            self.metrics.adapters.requested(owner.name, lease.ref.name)
            owner.use.touch(lease.ref)
        self.metrics.prompt_tokens.inc(len(prompt.ids))
        fairness = caller.fairness
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
            # One scope per tenant and salt: the number of cached tokens reveals what others
            # have asked.
            cache_scope=_cache_scope(caller.tenant, call.cache_salt),
            deadline=caller.deadline,
            sender=sender,
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
        """Write metrics and one log line for a request that has ended; ``trace`` is the trace
        id."""
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
        caller: Caller,
        generation: Generation | None,
        lease: RevisionLease | None,
        outcome: str,
        failed: str,
    ) -> str:
        """Make the spans of a request that has ended. Attributes have the names of
        OpenTelemetry's conventions for generative models where there are any. Returns the trace
        id, or "" without tracing."""
        attributes: dict[str, str | int | tuple[str, ...]] = {
            "gen_ai.system": "veneer",
            "gen_ai.request.model": self.base_name,
            "gen_ai.request.id": caller.request_id,
            "veneer.tenant": caller.tenant,
        }
        if lease is not None:
            attributes |= {
                "veneer.adapter": generation.provenance.adapter
                if generation
                else lease.ref.name,
                "veneer.adapter.revision": lease.ref.revision,
            }
        if generation is None:
            return self._tracing.request(caller, None, outcome, attributes, failed=failed)
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
        return self._tracing.request(caller, phases, outcome, attributes, failed=failed)


def _cache_scope(tenant: str, salt: str) -> str:
    """The scope within which cached prefixes are shared: the tenant, with a hash of the salt if
    there is one. Salts have any length; no tenant's name has a line break."""
    return f"{tenant}\n{hashlib.sha256(salt.encode()).hexdigest()}" if salt else tenant


def _template(lease: RevisionLease | None) -> str | None:
    """The chat template in an adapter's manifest, if it has one."""
    return None if lease is None else lease.record.manifest.chat_template


async def _brought(owner: Tenant, lease: RevisionLease) -> float | None:
    """Bring an adapter's weights to this machine. Returns the seconds it took; None if they
    were already here."""
    began = time.perf_counter()
    fetched = await owner.registry.present(lease.ref)
    return time.perf_counter() - began if fetched else None
