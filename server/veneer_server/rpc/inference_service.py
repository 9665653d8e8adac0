"""InferenceService: generate calls, answered whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from veneer_proto.v1 import inference_pb2, inference_pb2_grpc
from veneer_registry.errors import Aborted

from veneer_server.access.caller import Caller
from veneer_server.queues.fairness import Sender
from veneer_server.rpc import convert
from veneer_server.rpc.transport.receiving import (
    COUNTED_FROM,
    count_numbers,
    holds,
    last_value,
    values,
)
from veneer_server.serving.generation import READER_LIMIT_S, Generation
from veneer_server.serving.generator import Generator
from veneer_server.serving.records import FinishReason, GenerateCall
from veneer_server.serving.samples import Delta
from veneer_server.text.replies import ReplyPart as Part
from veneer_server.wire.messages import PackedTops, unpack_tops

_PROMPT_FIELD: Final = inference_pb2.GenerateRequest.PROMPT_FIELD_NUMBER
_TOKENS_FIELD: Final = inference_pb2.GenerateRequest.TOKEN_IDS_FIELD_NUMBER
_TRUNCATE_FIELD: Final = inference_pb2.GenerateRequest.TRUNCATE_PROMPT_TOKENS_FIELD_NUMBER
_IDS_FIELD: Final = inference_pb2.TokenIds.IDS_FIELD_NUMBER

MAX_WHOLE: Final = 16 << 20
"""Most bytes that log-probabilities may take in an answer of one message. The bound assumes the
longest names of tokens, so most answers at the bound take a quarter of it: clients receive 4
MiB unless they are told otherwise."""

_AT_ONCE: Final = 64
"""Positions whose log-probabilities are made in one go. With 20 top tokens each, this takes
about two milliseconds, and 30 kB."""

_INSTEAD: Final = "; or use GenerateStream, which sends them in several messages"

_Label = Callable[[int], str]
"""See `TextTokenizer.token_label`."""

# Contexts are Any, since the stubs type them as gRPC's; they are `interceptors.GrpcContext`.


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Runs the base model, with or without an adapter."""

    def __init__(self, generator: Generator, *, reader_limit_s: float = READER_LIMIT_S) -> None:
        """Args: reader_limit_s: longest wait for a caller to read a message."""
        self._generator = generator
        self._reader_limit_s = reader_limit_s
        self._label = generator.prompts.tokenizer.token_label

    def check_wire(self, request: bytes) -> None:
        """Raise VeneerError for a GenerateRequest that cannot be served. Runs before parsing,
        because a prompt that is too long would be held as protobuf, text and tokens."""
        if not self._generator.ready:
            return
        cut = holds(request, _TRUNCATE_FIELD)
        self._generator.check_text(last_value(request, _PROMPT_FIELD), cut=cut)
        if cut:
            return  # only those token ids that are kept are copied
        for ids in values(request, _TOKENS_FIELD):
            self._generator.check_count(sum(map(count_numbers, values(ids, _IDS_FIELD))))

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> inference_pb2.GenerateResponse:
        """Collect the whole completion."""
        caller: Caller = context.caller
        sender = caller.sender
        call = await self._call(request, sender, largest=MAX_WHOLE, instead=_INSTEAD)
        response = inference_pb2.GenerateResponse(request_id=caller.request_id)
        samples = [_Whole() for _ in range(call.n)]
        async with self._generator.admit(call, caller) as generation:
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    samples[delta.index].add(delta)
                    if (given := _own(delta)) is not _NONE:
                        async for scores in self._scores(given, sender):
                            samples[delta.index].logprobs.extend(scores)
                    if (given := _prompts(generation, delta)) is not _NONE:
                        async for scores in self._scores(given, sender):
                            response.prompt_logprobs.extend(scores)
            prefix = generation.prompt.text if call.echo else ""
            for at, sample in enumerate(samples):
                sample.fill(response.others.add() if at else response, prefix)
            final = _final(generation)
            response.usage.CopyFrom(final.usage)
            response.provenance.CopyFrom(final.provenance)
            context.set_trailing_metadata(_trailing(generation))
        return response

    async def GenerateStream(  # type: ignore[override]  # writes instead of yielding
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """Write a message for each output of the engine; the last one carries `final`."""
        caller: Caller = context.caller
        sender, request_id = caller.sender, caller.request_id
        call = await self._call(request, sender)
        async with self._generator.admit(call, caller) as generation:
            prefixes = [generation.prompt.text if call.echo else ""] * call.n
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    # A long prompt's scores take several messages: clients take 4 MiB each.
                    before: list[inference_pb2.TokenLogprob] = []
                    if (given := _prompts(generation, delta)) is not _NONE:
                        async for scores in self._scores(given, sender):
                            if before:
                                part = inference_pb2.GenerateStreamResponse(
                                    request_id=request_id, prompt_logprobs=before
                                )
                                await self._write(context, part)
                            before = scores
                    message = inference_pb2.GenerateStreamResponse(
                        request_id=request_id,
                        text=prefixes[delta.index] + delta.text,
                        reasoning=delta.reasoning,
                        token_ids=delta.tokens,
                        prompt_logprobs=before,
                        index=delta.index,
                        tool_calls=convert.call_deltas(delta.parts),
                    )
                    if (given := _own(delta)) is not _NONE:
                        async for scores in self._scores(given, sender):
                            message.logprobs.extend(scores)
                    prefixes[delta.index] = ""
                    if delta.finish is not None:
                        message.finish_reason = convert.finish_reason(delta.finish)
                    if generation.finish is not None:
                        message.final.CopyFrom(_final(generation))
                        context.set_trailing_metadata(_trailing(generation))
                    await self._write(context, message)

    async def _call(
        self, request: inference_pb2.GenerateRequest, sender: Sender, **bound: Any
    ) -> GenerateCall:
        """Make the request's call. A long request is converted off the event loop. Raises
        InvalidField."""
        convert_it = partial(convert.generate_call, request, **bound)
        size = request.ByteSize()
        if size < COUNTED_FROM:
            return convert_it()
        return await self._generator.spare_time.request(convert_it, size, sender)

    async def _scores(
        self, given: _Scores, sender: Sender
    ) -> AsyncGenerator[list[inference_pb2.TokenLogprob], None]:
        """Yield log-probabilities, some positions at a time. If there are many, they are made
        off the event loop. Most outputs have none, and skip the generator."""
        pieces = given.pieces(self._label)
        if len(given.tokens) <= _AT_ONCE:
            for piece in pieces:
                yield piece
            return
        async with aclosing(self._generator.spare_time.each(pieces, sender)) as made:
            async for piece in made:
                yield piece

    async def _write(self, context: Any, message: inference_pb2.GenerateStreamResponse) -> None:
        """Send a message, with a time limit: a caller that stopped reading must not occupy the
        engine for ever."""
        limit = self._reader_limit_s
        try:
            async with asyncio.timeout(limit):
                await context.write(message)
        except TimeoutError as error:
            raise Aborted(
                f"the caller read nothing for {limit:g} s: read the stream as it comes",
                metadata={"cause": "reader_limit"},
            ) from error


class _Whole:
    """Collects one sample of an answer that is not streamed."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._tokens: list[int] = []
        self.logprobs: list[inference_pb2.TokenLogprob] = []
        self._parts: list[Part] = []
        self._finish: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self._text.append(delta.text)
        self._reasoning.append(delta.reasoning)
        self._tokens.extend(delta.tokens)
        self._parts.extend(delta.parts)
        self._finish = delta.finish

    def fill(
        self, message: inference_pb2.GenerateResponse | inference_pb2.Sample, prefix: str
    ) -> None:
        assert self._finish is not None, "deltas were read to their end"
        message.text = prefix + "".join(self._text)
        message.reasoning = "".join(self._reasoning)
        message.token_ids.extend(self._tokens)
        message.logprobs.extend(self.logprobs)
        message.tool_calls.extend(convert.calls(self._parts))
        message.finish_reason = convert.finish_reason(self._finish)


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-probabilities of tokens, and of the top tokens at each position."""

    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    tops: Sequence[PackedTops] = ()
    ranks: Sequence[int] = ()

    def pieces(self, label: _Label) -> Iterator[list[inference_pb2.TokenLogprob]]:
        """Yield them as messages, `_AT_ONCE` at a time."""
        for begin in range(0, len(self.tokens), _AT_ONCE):
            places = range(begin, min(begin + _AT_ONCE, len(self.tokens)))
            yield [self._entry(at, label) for at in places]

    def _entry(self, at: int, label: _Label) -> inference_pb2.TokenLogprob:
        token = self.tokens[at]
        entry = inference_pb2.TokenLogprob(
            token_id=token,
            logprob=self.logprobs[at],
            token=label(token),
            rank=self.ranks[at] if self.ranks else 0,
        )
        for other, logprob in unpack_tops(self.tops[at]) if self.tops else ():
            entry.top.add(token_id=other, logprob=logprob, token=label(other))
        return entry


_NONE: Final = _Scores()


def _own(delta: Delta) -> _Scores:
    """The new tokens' log-probabilities; empty if not requested."""
    if delta.logprobs is None:
        return _NONE
    return _Scores(delta.tokens, delta.logprobs, delta.top_logprobs or ())


def _prompts(generation: Generation, delta: Delta) -> _Scores:
    """The prompt's log-probabilities, if requested; empty after the first delta."""
    if delta.prompt_logprobs is None:
        return _NONE
    return _Scores(
        generation.prompt.ids[1:],
        delta.prompt_logprobs,
        delta.prompt_top_logprobs or (),
        delta.prompt_ranks or (),
    )


def _final(generation: Generation) -> inference_pb2.GenerateStreamFinal:
    assert generation.finish is not None, "deltas were read to their end"
    return inference_pb2.GenerateStreamFinal(
        finish_reason=convert.finish_reason(generation.finish),
        usage=inference_pb2.Usage(
            prompt_tokens=len(generation.prompt.ids),
            completion_tokens=generation.completion_tokens,
            cached_prompt_tokens=generation.cached_tokens,
            reasoning_tokens=generation.reasoning_tokens,
            accepted_prediction_tokens=generation.accepted_tokens,
            rejected_prediction_tokens=generation.rejected_tokens,
        ),
        provenance=convert.provenance(generation.provenance),
    )


def _trailing(generation: Generation) -> tuple[tuple[str, str], ...]:
    """Trailing metadata, for clients that read nothing else, such as proxies."""
    where, limits = generation.provenance, generation.counted.rate_headers()
    if where.tier is None:
        return limits
    return (
        ("veneer-weights-digest", where.weights_digest),
        ("veneer-adapter-tier", where.tier.value),
        ("veneer-revision", where.revision),
        *limits,
    )
