"""A POST to a generate endpoint, from reading its body to the last byte of the answer."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import ClassVar

from veneer_registry.adapter import BaseSpec
from veneer_registry.errors import InvalidField, ModelLoading, QueueFull, VeneerError

from veneer_server.access.audit import Audit
from veneer_server.engine_client.client import EngineClient
from veneer_server.engine_client.places import Place
from veneer_server.errors import detail_for_log, internal_error, without_frames
from veneer_server.logs import REQUEST_ID, get_logger
from veneer_server.openai.answers import Answer, Piece
from veneer_server.openai.chat import ChatAnswer
from veneer_server.openai.completions import CompletionAnswer
from veneer_server.openai.errors import PACED, HttpError, http_failure
from veneer_server.openai.fields import ChatFields, CompletionFields, parse_fields
from veneer_server.openai.http.asgi import (
    Bodies,
    ClientGone,
    Receive,
    Reply,
    Scope,
    Send,
    read_json,
)
from veneer_server.openai.requests import chat_call, completion_calls
from veneer_server.queues.refusal_pace import Pace
from veneer_server.quotas.meter import Metered
from veneer_server.quotas.rates import Quotas
from veneer_server.serving.calls import Calls
from veneer_server.serving.generation import Generation
from veneer_server.serving.generator import Generator
from veneer_server.serving.records import GenerateCall
from veneer_server.serving.tenants.tenants import Tenants
from veneer_server.serving.who import CALLER
from veneer_server.telemetry.metrics import Metrics

__all__ = ["ChatEndpoint", "CompletionEndpoint", "Core", "Loaded"]

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The parts that exist once the base is known; no call needs them earlier."""

    generator: Generator
    tenants: Tenants
    engine: EngineClient
    base: BaseSpec


@dataclass(slots=True)
class Core:
    """The parts that gRPC and HTTP share.

    Attributes:
        reader_limit_s: longest wait for a client to send or read a piece.
        started: when the server started, in Unix seconds.
        loaded: set before `Calls` lets calls through.
    """

    calls: Calls
    metrics: Metrics
    bodies: Bodies
    pace: Pace
    reader_limit_s: float
    started: int
    audit: Audit = field(default_factory=lambda: Audit(None))
    quotas: Quotas = field(default_factory=Quotas)
    loaded: Loaded | None = None

    @property
    def _there(self) -> Loaded:
        assert self.loaded is not None, "no call gets this far while the server is loading"
        return self.loaded

    @property
    def generator(self) -> Generator:
        return self._there.generator

    @property
    def tenants(self) -> Tenants:
        return self._there.tenants

    @property
    def engine(self) -> EngineClient:
        return self._there.engine

    @property
    def base(self) -> BaseSpec:
        return self._there.base


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked request.

    Attributes:
        calls: one for each prompt.
        answer: collects their output.
    """

    calls: Sequence[GenerateCall]
    answer: Answer
    stream: bool


class GenerateEndpoint(ABC):
    """An ASGI application for one path.

    Attributes:
        method: as in `access.methods.METHODS`.
    """

    method: ClassVar[str]

    def __init__(self, core: Core) -> None:
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; if the client disconnects, the work ends within a step."""
        reply = Reply(scope, send, self._core.reader_limit_s)
        size, failure = 0, None
        with self._core.bodies.share() as share:

            def take(count: int) -> None:
                nonlocal size
                size += count
                share(count)

            try:
                failure = await self._answer(scope, receive, reply, take)
            except ClientGone:
                return
        if failure is not None:  # may wait: the body's share has been released
            await self._fail(reply, failure, size)

    async def _answer(
        self, scope: Scope, receive: Receive, reply: Reply, take: Callable[[int], None]
    ) -> VeneerError | HttpError | None:
        """Read the body and answer it. Returns an error that is still to be sent, if any."""
        core = self._core
        try:
            body = await read_json(scope, receive, core.reader_limit_s, core.bodies, take)
        except (QueueFull, HttpError) as error:
            return without_frames(error)
        work = asyncio.create_task(self._work(body, reply))
        gone = asyncio.create_task(_disconnected(receive))
        del body  # the parsed body is many times as large; keep only the checked request
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait({work, gone})
        return None if work.cancelled() else work.result()

    async def _work(self, body: object, reply: Reply) -> VeneerError | None:
        """Answer a body. Returns an error that is still to be sent, if any."""
        try:
            with self._core.calls.running():
                job = self._parse(body)
                del body
                await (_stream if job.stream else _collect)(self._core, job, reply)
            return None
        except VeneerError as error:
            return without_frames(error)
        except Exception as error:
            _log.error("request failed", error)
            return internal_error(REQUEST_ID.get())

    async def _fail(self, reply: Reply, error: VeneerError | HttpError, size: int) -> None:
        reason = error.reason if isinstance(error, VeneerError) else error.code
        if isinstance(error, VeneerError):
            self._core.metrics.failures.labels(reason).inc()
            self._core.audit.note(self.method, CALLER.get(), error)
        if not isinstance(error, ModelLoading):  # waiting clients retry over and over
            why = {"reason": reason, **detail_for_log(error)}
            _log.info("call refused", method=type(self).__name__, **why)
        if not reply.started and http_failure(error).status in PACED:
            await self._core.pace.wait(CALLER.get(), size)
        try:
            await reply.fail(error)
        except VeneerError:
            _log.info("the caller did not read the error", reason=str(error))

    @abstractmethod
    def _parse(self, body: object) -> _Job:
        """Check the fields. Raises InvalidField."""


class ChatEndpoint(GenerateEndpoint):
    """``POST /v1/chat/completions``."""

    method = "POST /v1/chat/completions"

    def _parse(self, body: object) -> _Job:
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
        return _Job([call], answer, fields.stream)


class CompletionEndpoint(GenerateEndpoint):
    """``POST /v1/completions``."""

    method = "POST /v1/completions"

    def _parse(self, body: object) -> _Job:
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
        return _Job(calls, answer, fields.stream)


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream(core: Core, job: _Job, reply: Reply) -> None:
    async def take(piece: Piece) -> None:
        chunks = job.answer.chunks(piece)
        if chunks or not reply.started:
            await reply.events(list(chunks), _headers(piece.generation))

    await _generate(core, job.calls, take)
    if (last := job.answer.usage_chunk()) is not None:
        await reply.events([last], {})
    await reply.end_events()


async def _collect(core: Core, job: _Job, reply: Reply) -> None:
    headers: dict[str, str] = {}

    async def take(piece: Piece) -> None:
        job.answer.add(piece)
        headers.update(_headers(piece.generation))

    await _generate(core, job.calls, take)
    await reply.json(200, job.answer.whole(), headers)


async def _generate(
    core: Core,
    calls: Sequence[GenerateCall],
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
                call, time_remaining=None, counted=counted, place=place
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
