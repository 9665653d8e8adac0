"""The samples of one request: turns their outputs into text, and merges their streams."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from dataclasses import dataclass

import msgspec
from veneer_registry.errors import InternalError

from veneer_server.serving.records import FinishReason
from veneer_server.serving.spare_time import outlast
from veneer_server.text import replies
from veneer_server.text.detokenizer import Detokenizer, StopStrings, TokenBytes
from veneer_server.wire.messages import (
    PackedTops,
    SequenceOutput,
    SequenceRequest,
    first_tops,
    pack_tops,
)


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of a sample since its previous delta. The last delta has `finish` set.

    Attributes:
        index: the sample's index, from 0.
        text: text for the user.
        reasoning: the model's reasoning, which precedes its text.
        parts: text, reasoning and tool calls, in order; empty if the answer is not parsed.
        ends: for each of `parts`, how many of `tokens` had been read when it was certain.
        logprobs, top_logprobs: one entry for each of `tokens`, if requested. The most likely
            tokens are packed, see `unpack_tops`: an answer may hold hundreds of thousands.
        prompt_logprobs, prompt_top_logprobs, prompt_ranks: one entry for each prompt token
            after the first; only in sample 0's first delta, if requested.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: list[float] | None
    top_logprobs: list[PackedTops] | None
    prompt_logprobs: list[float] | None
    prompt_top_logprobs: list[PackedTops] | None
    finish: FinishReason | None
    reasoning: str = ""
    parts: Sequence[replies.ReplyPart] = ()
    ends: Sequence[int] = ()
    prompt_ranks: list[int] | None = None


def sample_seed(seed: int, index: int) -> int:
    """The seed of a sample: the first has the request's seed, the others derive theirs from
    it."""
    if index == 0:
        return seed
    made = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8)
    return int.from_bytes(made.digest())


def sample_request(request: SequenceRequest, index: int) -> SequenceRequest:
    """The request of a later sample: its own seed, no prompt log-probabilities (the first
    sample gives them), and no deadline (the first sample's first token has met it)."""
    sampling = msgspec.structs.replace(
        request.sampling, seed=sample_seed(request.sampling.seed, index)
    )
    return msgspec.structs.replace(
        request, sampling=sampling, prompt_logprobs=False, prompt_ranks=False, deadline=None
    )


class Sample:
    """One completion: turns its tokens into text."""

    def __init__(
        self,
        index: int,
        tokens: TokenBytes,
        *,
        stops: Sequence[str],
        stop_token_ids: Collection[int],
        min_tokens: int = 0,
        tops: tuple[int, int] | None = None,
        parser: replies.ReplyParser | None = None,
        ends_with_calls: bool = False,
        show_reasoning: bool = True,
        only_prompt: bool = False,
    ) -> None:
        """Args:
        min_tokens: stop strings within this many first tokens are ignored.
        tops: how many most likely tokens the caller wants with each output log-probability and
            with each prompt log-probability; None keeps all that the engine reports.
        parser: splits the text into parts; None passes it on unchanged.
        ends_with_calls: an answer that ends by itself after a tool call has the finish reason
            `tool_calls`.
        show_reasoning: False leaves out the model's reasoning.
        only_prompt: the caller wants none of the tokens.
        """
        self.index = index
        self._min_tokens = min_tokens
        self._tops = tops
        self._show_reasoning = show_reasoning
        self._only_prompt = only_prompt
        self._count = 0
        self.thought = 0
        """Number of reasoning tokens: those between the reasoning tags, or up to the end of the
        output."""
        self.finish: FinishReason | None = None
        self.last_output: float | None = None
        """When the last output arrived, for the inter-token latency."""
        self._detokenizer = Detokenizer(tokens, continues=True)
        self._stops = StopStrings(stops)
        self._stop_token_ids = stop_token_ids
        self._parser = parser
        self._ends_with_calls = ends_with_calls
        self._called = False

    def delta(self, output: SequenceOutput) -> Delta:
        """Convert an output of the engine."""
        if self._only_prompt:
            output = msgspec.structs.replace(
                output,
                tokens=[],
                logprobs=output.logprobs and [],
                top_logprobs=output.top_logprobs and [],
                finish="length" if output.finish == "stop" else output.finish,
            )
        stops = self._stops
        finish: FinishReason | None = output.finish
        texts, count = self._feed(output)
        text = ""
        if finish is not None and not stops.stopped:
            text += stops.feed(self._detokenizer.flush())
            text += stops.flush()
        if stops.stopped:
            finish = "stop"
        tops = None
        if output.top_logprobs is not None:
            tops = [pack_tops(each) for each in output.top_logprobs[:count]]
        prompt_tops = output.prompt_top_logprobs
        if self._tops is not None:
            tops, prompt_tops = map(_first, (tops, prompt_tops), self._tops)
        parts: Sequence[replies.ReplyPart] = ()
        ends: Sequence[int] = ()
        if self._parser is None:
            text = "".join(texts) + text
        else:
            found = list(self._parts(self._parser, [*texts, text], ended=finish is not None))
            parts = [part for part, _ in found]
            ends = [min(end, count) for _, end in found]
            text = "".join(part.text for part in parts if isinstance(part, replies.Content))
            if finish == "stop" and self._called and self._ends_with_calls:
                finish = "tool_calls"
        self.finish = finish
        return Delta(
            index=self.index,
            text=text,
            tokens=output.tokens[:count],
            logprobs=output.logprobs and output.logprobs[:count],
            top_logprobs=tops,
            prompt_logprobs=output.prompt_logprobs,
            prompt_top_logprobs=prompt_tops,
            finish=finish,
            reasoning="".join(p.text for p in parts if isinstance(p, replies.Reasoning)),
            parts=parts,
            ends=ends,
            prompt_ranks=output.prompt_ranks,
        )

    def _parts(
        self, parser: replies.ReplyParser, texts: Sequence[str], *, ended: bool
    ) -> Iterator[tuple[replies.ReplyPart, int]]:
        """Parse the texts; yield each part with the number of texts read for it. There is one
        text per token, and a last one that was left when the tokens ended.

        Parsed token by token, so that the counts do not depend on how many tokens an output
        has.
        """
        last = len(texts) - 1
        for at, text in enumerate(texts):
            thinking = parser.thinking
            parts = list(parser.feed(text)) if text else []
            if ended and at == last:
                parts += parser.finish()
            thought = any(isinstance(part, replies.Reasoning) and part.text for part in parts)
            self.thought += thinking and at < last and (parser.thinking or thought)
            for part in parts:
                self._called |= isinstance(part, replies.ToolCallBegun)
                if self._show_reasoning or not isinstance(part, replies.Reasoning):
                    yield part, at + 1

    def _feed(self, output: SequenceOutput) -> tuple[list[str], int]:
        """Return the texts of an output's tokens, and the number of tokens up to the one that
        completes a stop string: an output joined from several steps may continue past it."""
        texts = []
        for count, token in enumerate(self._shown(output), 1):
            self._count += 1
            early = self._count <= self._min_tokens
            feed = self._stops.skip if early else self._stops.feed
            texts.append(feed(self._detokenizer.feed([token])))
            if self._stops.stopped:
                return texts, count
        return texts, len(output.tokens)

    def _shown(self, output: SequenceOutput) -> list[int]:
        """Tokens that are part of the text: all except a final stop token."""
        tokens = output.tokens
        if output.finish == "stop" and tokens and tokens[-1] in self._stop_token_ids:
            return tokens[:-1]
        return tokens


def _first(tops: list[PackedTops] | None, count: int) -> list[PackedTops] | None:
    """Keep the ``count`` most likely tokens at each position; None if ``count`` is 0."""
    if not tops or not count:
        return tops if count else None
    return [first_tops(each, count) for each in tops]


class SampleStreams:
    """Outputs of several samples as they arrive. Must be closed, even after an error.

    At most one read per sample is in flight, started only while the caller waits. Output
    that a slow caller has not read accumulates in the engine client, which joins and
    bounds it.
    """

    def __init__(self) -> None:
        self._streams: dict[int, AsyncGenerator[SequenceOutput, None]] = {}
        self._reads: dict[int, asyncio.Task[SequenceOutput]] = {}
        self._ready: deque[int] = deque()
        """Indices of samples whose read is done, next one first."""
        self.dropped = 0
        """Tokens that were read but not yet returned by `next` when `aclose` was called."""

    def add(self, index: int, stream: AsyncGenerator[SequenceOutput, None]) -> None:
        """Add a sample's stream; the first read submits the sample."""
        self._streams[index] = stream

    async def next(self) -> tuple[int, SequenceOutput]:
        """The next output of any open sample; at least one must be open.

        Raises:
            VeneerError: raised by a sample's stream.
        """
        try:
            if len(self._streams) == 1 and not self._reads:
                # A single stream needs no task.
                [(index, stream)] = self._streams.items()
                return index, await anext(stream)
            for index, stream in self._streams.items():
                if index not in self._reads:
                    self._reads[index] = asyncio.create_task(_read(stream))
            if not self._ready:
                await asyncio.wait(self._reads.values(), return_when=asyncio.FIRST_COMPLETED)
                self._ready.extend(i for i, task in self._reads.items() if task.done())
            index = self._ready.popleft()
            return index, self._reads.pop(index).result()
        except StopAsyncIteration:
            raise InternalError("the engine ended a sequence without a finish reason") from None

    async def close(self, index: int) -> int:
        """Close a sample's stream; if the engine still works on the sample, it is cancelled.
        Returns the number of tokens that were read but not returned by `next`."""
        dropped, stream = 0, self._streams.pop(index)
        if index in self._ready:
            self._ready.remove(index)
        if (read := self._reads.pop(index, None)) is not None:
            read.cancel()
            await asyncio.wait({read})
            if not read.cancelled() and read.exception() is None:  # exception() marks it seen
                dropped = len(read.result().tokens)
        await stream.aclose()
        return dropped

    async def aclose(self) -> None:
        """Close all open streams, even if the caller is cancelled meanwhile: it releases their
        places next."""
        if self._streams:
            await outlast(self._close_all())

    async def _close_all(self) -> None:
        for index in list(self._streams):
            self.dropped += await self.close(index)


async def _read(stream: AsyncGenerator[SequenceOutput, None]) -> SequenceOutput:
    return await anext(stream)
