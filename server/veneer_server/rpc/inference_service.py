"""InferenceService: generate calls, answered at once or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Final

from veneer_proto.v1 import inference_pb2, inference_pb2_grpc
from veneer_registry.errors import Aborted

from veneer_server.logs import REQUEST_ID
from veneer_server.rpc import convert
from veneer_server.rpc.generation import Delta, Generation, Generator

__all__ = ["InferenceService"]

READER_LIMIT_S: Final = 30.0
"""Default of `InferenceService`'s ``reader_limit_s``."""

# Contexts are Any: the stubs type them for synchronous and asyncio servers at once.


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Runs the base model, with or without an adapter."""

    def __init__(self, generator: Generator, *, reader_limit_s: float = READER_LIMIT_S) -> None:
        """Args: reader_limit_s: longest wait for a caller to take a message."""
        self._generator = generator
        self._reader_limit_s = reader_limit_s

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> inference_pb2.GenerateResponse:
        """Collect the whole completion."""
        call = convert.generate_call(request)
        response = inference_pb2.GenerateResponse(request_id=REQUEST_ID.get())
        remaining = context.time_remaining()
        async with self._generator.admit(call, time_remaining=remaining) as generation:
            pieces = [generation.prompt.text] if call.echo else []
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    pieces.append(delta.text)
                    response.token_ids.extend(delta.tokens)
                    _add_logprobs(response, generation, delta)
            response.text = "".join(pieces)
            final = _final(generation)
            response.finish_reason = final.finish_reason
            response.usage.CopyFrom(final.usage)
            response.provenance.CopyFrom(final.provenance)
            context.set_trailing_metadata(_trailing(generation))
        return response

    async def GenerateStream(  # type: ignore[override]  # writes instead of yielding
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """Write a message for each output of the engine; the last has `final`."""
        call = convert.generate_call(request)
        request_id = REQUEST_ID.get()
        remaining = context.time_remaining()
        async with self._generator.admit(call, time_remaining=remaining) as generation:
            prefix = generation.prompt.text if call.echo else ""
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    message = inference_pb2.GenerateStreamResponse(
                        request_id=request_id,
                        text=prefix + delta.text,
                        token_ids=delta.tokens,
                    )
                    prefix = ""
                    if call.logprobs:
                        _add_logprobs(message, generation, delta)
                    if delta.finish is not None:
                        message.final.CopyFrom(_final(generation))
                        context.set_trailing_metadata(_trailing(generation))
                    await self._write(context, message)

    async def _write(self, context: Any, message: inference_pb2.GenerateStreamResponse) -> None:
        """Send a message; a reader that stopped reading must not hold a place for ever."""
        limit = self._reader_limit_s
        try:
            async with asyncio.timeout(limit):
                await context.write(message)
        except TimeoutError as error:
            raise Aborted(
                f"the caller read nothing for {limit:g} s: read the stream as it comes"
            ) from error


def _add_logprobs(
    message: inference_pb2.GenerateResponse | inference_pb2.GenerateStreamResponse,
    generation: Generation,
    delta: Delta,
) -> None:
    if delta.logprobs is not None:
        message.logprobs.extend(_pairs(delta.tokens, delta.logprobs))
    if delta.prompt_logprobs is not None:
        message.prompt_logprobs.extend(_pairs(generation.prompt.ids[1:], delta.prompt_logprobs))


def _pairs(
    tokens: Sequence[int], logprobs: Sequence[float]
) -> list[inference_pb2.TokenLogprob]:
    return [
        inference_pb2.TokenLogprob(token_id=token, logprob=logprob)
        for token, logprob in zip(tokens, logprobs, strict=True)
    ]


def _final(generation: Generation) -> inference_pb2.GenerateStreamFinal:
    assert generation.finish is not None, "deltas were read to their end"
    return inference_pb2.GenerateStreamFinal(
        finish_reason=convert.finish_reason(generation.finish),
        usage=inference_pb2.Usage(
            prompt_tokens=len(generation.prompt.ids),
            completion_tokens=generation.completion_tokens,
        ),
        provenance=convert.provenance(generation.provenance),
    )


def _trailing(generation: Generation) -> tuple[tuple[str, str], ...]:
    """For clients that look at metadata only, such as proxies."""
    where = generation.provenance
    if where.tier is None:
        return ()
    return (
        ("veneer-weights-digest", where.weights_digest),
        ("veneer-adapter-tier", where.tier.value),
        ("veneer-revision", where.revision),
    )
