"""A POST to a generate endpoint, from its checked fields to the last byte of the answer."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from veneer_registry.errors import InvalidField

from veneer_server.access.caller import Caller
from veneer_server.engine_client.places import Place
from veneer_server.openai.chat import ChatAnswer
from veneer_server.openai.choices import Answer, Json, Piece
from veneer_server.openai.completions import CompletionAnswer
from veneer_server.openai.core import ServingCore
from veneer_server.openai.extensions import Ignored
from veneer_server.openai.fields import ChatFields, CompletionFields, parse_fields
from veneer_server.openai.http.asgi import Reply
from veneer_server.openai.http.body import pieces_of
from veneer_server.openai.json_endpoint import Answering, JsonEndpoint
from veneer_server.openai.requests import chat_call, completion_calls
from veneer_server.quotas.meter import Metered
from veneer_server.serving.answer_room import AnswerBytes
from veneer_server.serving.generation import Generation
from veneer_server.serving.records import GenerateCall

AT_ONCE: Final = 16
"""Most pieces of JSON lists (see `Many`) that are made at once, which takes some milliseconds.
Larger answers are made piece by piece, off the event loop."""


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """A checked request.

    Attributes:
        calls: one for each prompt.
        answer: collects their output.
        ignored: the request's fields and tools that have no effect.
        finish: called when the answer is complete, before its end is sent.
    """

    calls: Sequence[GenerateCall]
    answer: Answer
    stream: bool
    ignored: Ignored = field(default_factory=Ignored)
    finish: Callable[[], Awaitable[None]] | None = None

    @property
    def scored(self) -> bool:
        """Whether the answer has more than the generated text; see `GenerateCall.scored`."""
        return any(call.scored for call in self.calls)


class GenerateEndpoint(JsonEndpoint):
    """An ASGI application for one path that generates."""

    def _check(self, body: object, caller: Caller) -> Answering:
        return self._answering(self._parse(body, caller), caller)

    def _answering(self, job: GenerateJob, caller: Caller) -> Answering:
        return Answering(partial(_answer, self._core, job, caller), ignored=job.ignored)

    @abstractmethod
    def _parse(self, body: object, caller: Caller) -> GenerateJob:
        """Check the fields. Raises InvalidField."""


class ChatEndpoint(GenerateEndpoint):
    """``POST /v1/chat/completions``."""

    def _parse(self, body: object, caller: Caller) -> GenerateJob:
        core, ignored = self._core, self._ignored()
        fields = parse_fields(ChatFields, body, ignored)
        call = chat_call(fields, core.base.name, ignored)
        answer = ChatAnswer(
            fields,
            core.generator.prompts.tokenizer,
            prompts=1,
            logprobs=fields.logprobs,
            echo=False,
            request_id=caller.request_id,
            fingerprint=core.base.fingerprint.weights,
        )
        return GenerateJob([call], answer, fields.stream, ignored)


class CompletionEndpoint(GenerateEndpoint):
    """``POST /v1/completions``."""

    def _parse(self, body: object, caller: Caller) -> GenerateJob:
        core, ignored = self._core, self._ignored()
        fields = parse_fields(CompletionFields, body, ignored)
        for prompt in [fields.prompt] if isinstance(fields.prompt, str) else fields.prompt:
            if isinstance(prompt, str):
                cut = fields.truncate_prompt_tokens is not None
                core.generator.check_text(prompt.encode(), cut=cut)
        calls = completion_calls(fields, core.base.name)
        answer = CompletionAnswer(
            fields,
            core.generator.prompts.tokenizer,
            prompts=len(calls),
            logprobs=fields.logprobs is not None,
            echo=fields.echo,
            request_id=caller.request_id,
            fingerprint=core.base.fingerprint.weights,
        )
        return GenerateJob(calls, answer, fields.stream, ignored)


async def _answer(core: ServingCore, job: GenerateJob, caller: Caller, reply: Reply) -> None:
    # Held until the caller has read the answer, however long after the last token.
    with core.generator.answers.answer(caller.sender, len(job.calls)) as held:
        await (_stream if job.stream else _collect)(core, job, caller, held, reply)


async def _stream(
    core: ServingCore, job: GenerateJob, caller: Caller, held: AnswerBytes, reply: Reply
) -> None:
    reply.framing = job.answer.framing

    async def send(events: Sequence[Json], headers: Mapping[str, str]) -> None:
        if job.scored and pieces_of(events) > AT_ONCE:
            spare, sender = core.generator.spare_time, caller.sender
            await reply.long_events(events, headers, spare, sender)
        else:
            await reply.events(events, headers)

    async def take(piece: Piece) -> None:
        chunks = job.answer.chunks(piece)
        if chunks or not reply.started:
            await send(chunks, _headers(piece.generation))

    await _generate(core, job.calls, caller, held, take)
    if job.finish is not None:
        await job.finish()
    if (last := job.answer.last_chunk()) is not None:
        await send([last], {})
    await reply.end_events()


async def _collect(
    core: ServingCore, job: GenerateJob, caller: Caller, held: AnswerBytes, reply: Reply
) -> None:
    headers: dict[str, str] = {}

    async def take(piece: Piece) -> None:
        job.answer.add(piece)
        if (delta := piece.delta).logprobs is not None:
            held.generated(len(delta.tokens), sum(map(len, delta.top_logprobs or ())))
        headers.update(_headers(piece.generation))

    await _generate(core, job.calls, caller, held, take)
    if job.finish is not None:
        await job.finish()
    whole = job.answer.whole()
    if job.scored and pieces_of(whole) > AT_ONCE:
        spare, sender = core.generator.spare_time, caller.sender
        await reply.long_json(200, whole, headers, spare, sender)
    else:
        await reply.json(200, whole, headers)


async def _generate(
    core: ServingCore,
    calls: Sequence[GenerateCall],
    caller: Caller,
    held: AnswerBytes,
    take: Callable[[Piece], Awaitable[None]],
) -> None:
    """Run all calls concurrently and pass their output to ``take``. If one fails, all end.

    Raises:
        InvalidField: they need more places than the engine has.
        QueueFull: they need more places than are free; none was started.
    """

    async def run(
        at: int,
        call: GenerateCall,
        counted: Metered | None = None,
        place: Place | None = None,
    ) -> None:
        async with (
            core.generator.admit(
                call, caller, counted=counted, place=place, held=held
            ) as generation,
            aclosing(generation.deltas()) as deltas,
        ):
            async for delta in deltas:
                await take(Piece(at, generation, delta))

    if len(calls) == 1:
        await run(0, calls[0])
        return
    wanted, capacity = sum(call.n for call in calls), core.engine.places.capacity
    if wanted > capacity:
        raise InvalidField(
            f"prompt and n need {wanted} sequences, but this server runs and queues at "
            f"most {capacity}: send fewer prompts in a request",
            metadata={"field": "prompt"},
        )
    generator = core.generator
    with (
        generator.count(caller, wanted, len(calls)) as counted,
        generator.place(caller, wanted) as place,
    ):
        try:
            async with asyncio.TaskGroup() as group:
                for at, call in enumerate(calls):
                    group.create_task(run(at, call, counted, place))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None


def _headers(generation: Generation) -> Mapping[str, str]:
    """Headers that name the weights that answer, for clients and proxies."""
    where, tier = generation.provenance, generation.tier
    if not where.adapter:
        return {}
    headers = {
        "veneer-revision": where.revision,
        "veneer-weights-digest": where.weights_digest,
    }
    if tier is not None:
        headers["veneer-adapter-tier"] = tier.value
    return headers
