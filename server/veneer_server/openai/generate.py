"""A POST to a generate endpoint, from its checked fields to the last byte of the answer."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final

from veneer_registry.errors import InvalidField

from veneer_server.engine_client.places import Place
from veneer_server.logs import REQUEST_ID
from veneer_server.openai.answers import Answer, Piece
from veneer_server.openai.chat import ChatAnswer
from veneer_server.openai.completions import CompletionAnswer
from veneer_server.openai.endpoints.core import Core
from veneer_server.openai.endpoints.json_endpoint import Answering, JsonEndpoint
from veneer_server.openai.fields import ChatFields, CompletionFields, parse_fields
from veneer_server.openai.http.asgi import Reply
from veneer_server.openai.http.long_json import pieces_of
from veneer_server.openai.requests import chat_call, completion_calls
from veneer_server.quotas.meter import Metered
from veneer_server.serving.answer_room import Held
from veneer_server.serving.generation import Generation
from veneer_server.serving.records import GenerateCall
from veneer_server.serving.who import sender

__all__ = ["ChatEndpoint", "CompletionEndpoint", "GenerateEndpoint", "Job"]

AT_ONCE: Final = 16
"""Pieces of JSON lists (see `Many`) that are made at once. They take some milliseconds."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request.

    Attributes:
        calls: one for each prompt.
        answer: collects their output.
    """

    calls: Sequence[GenerateCall]
    answer: Answer
    stream: bool

    @property
    def scored(self) -> bool:
        """Whether there is more than the text that is generated."""
        return any(call.scored for call in self.calls)


class GenerateEndpoint(JsonEndpoint):
    """An ASGI application for one path that generates."""

    def _check(self, body: object) -> Answering:
        job = self._parse(body)
        return Answering(partial(_answer, self._core, job))

    @abstractmethod
    def _parse(self, body: object) -> Job:
        """Check the fields. Raises InvalidField."""


class ChatEndpoint(GenerateEndpoint):
    """``POST /v1/chat/completions``."""

    method = "POST /v1/chat/completions"

    def _parse(self, body: object) -> Job:
        core, fields = self._core, parse_fields(ChatFields, body)
        call = chat_call(fields, core.base.name)
        answer = ChatAnswer(
            fields,
            core.generator.prompts.tokenizer,
            prompts=1,
            logprobs=fields.logprobs,
            echo=False,
            request_id=REQUEST_ID.get(),
            fingerprint=core.base.fingerprint.weights,
        )
        return Job([call], answer, fields.stream)


class CompletionEndpoint(GenerateEndpoint):
    """``POST /v1/completions``."""

    method = "POST /v1/completions"

    def _parse(self, body: object) -> Job:
        core, fields = self._core, parse_fields(CompletionFields, body)
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
            request_id=REQUEST_ID.get(),
            fingerprint=core.base.fingerprint.weights,
        )
        return Job(calls, answer, fields.stream)


async def _answer(core: Core, job: Job, reply: Reply) -> None:
    # Until the caller has read it, however long after the last token.
    with core.generator.answers.answer(sender(), len(job.calls)) as held:
        await (_stream if job.stream else _collect)(core, job, held, reply)


async def _stream(core: Core, job: Job, held: Held, reply: Reply) -> None:
    reply.framing = job.answer.framing
    spare = core.generator.spare_time

    async def take(piece: Piece) -> None:
        chunks = job.answer.chunks(piece)
        if chunks or not reply.started:
            slowly = spare if job.scored and pieces_of(chunks) > AT_ONCE else None
            await reply.events(chunks, _headers(piece.generation), slowly)

    await _generate(core, job.calls, held, take)
    if (last := job.answer.last_chunk()) is not None:
        await reply.events([last], {})
    await reply.end_events()


async def _collect(core: Core, job: Job, held: Held, reply: Reply) -> None:
    headers: dict[str, str] = {}

    async def take(piece: Piece) -> None:
        job.answer.add(piece)
        if (delta := piece.delta).logprobs is not None:
            held.generated(len(delta.tokens), sum(map(len, delta.top_logprobs or ())))
        headers.update(_headers(piece.generation))

    await _generate(core, job.calls, held, take)
    whole = job.answer.whole()
    if job.scored and pieces_of(whole) > AT_ONCE:
        await reply.long_json(200, whole, headers, core.generator.spare_time)
    else:
        await reply.json(200, whole, headers)


async def _generate(
    core: Core,
    calls: Sequence[GenerateCall],
    held: Held,
    take: Callable[[Piece], Awaitable[None]],
) -> None:
    """Run all calls concurrently and pass their output to ``take``; if one fails, all end.

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
                call, time_remaining=None, counted=counted, place=place, held=held
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
    with generator.count(wanted, len(calls)) as counted, generator.place(wanted) as place:
        try:
            async with asyncio.TaskGroup() as group:
                for at, call in enumerate(calls):
                    group.create_task(run(at, call, counted, place))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None


def _headers(generation: Generation) -> Mapping[str, str]:
    """Which weights answer, for clients and proxies that read headers."""
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
