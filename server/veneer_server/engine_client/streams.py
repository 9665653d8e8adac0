"""Outputs of one sequence on their way from the engine to one reader, joined and bounded.

What a slow reader has not taken yet is one `SequenceOutput`, however many steps
it took; past `MAX_BUFFERED_BYTES` the stream ends with an error instead of growing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec
from veneer_registry.errors import Aborted, VeneerError

from veneer_server.wire.messages import SequenceOutput, Tops

__all__ = ["MAX_BUFFERED_BYTES", "OutputStream"]

MAX_BUFFERED_BYTES: Final = 4 << 20
"""Of Python objects, estimated: with what gRPC itself holds, a stream stays under 8 MB."""

# What CPython 3.11 takes: a list slot and an int or float object of its own.
_NUMBER_BYTES: Final = 36
_TOP_BYTES: Final = 128


class OutputStream:
    """Takes the engine's outputs in order; gives them to one reader, joined.

    Contract: `put` and `fail` never block. After an output with ``finish``, or
    after `fail`, nothing follows. An error keeps its turn: the reader first gets
    what was there before it.
    """

    def __init__(self) -> None:
        self._output: SequenceOutput | None = None
        self._error: VeneerError | None = None
        self._bytes = 0
        self._news = asyncio.Event()

    def put(self, output: SequenceOutput) -> None:
        """The next output of the sequence."""
        if self._error is not None:
            return
        if self._output is None:
            self._output, self._bytes = output, _size(output)
        else:
            self._output = _joined(self._output, output)
            self._bytes += _size(output)
            if self._bytes > MAX_BUFFERED_BYTES and output.finish is None:
                self.fail(
                    Aborted(
                        "the caller reads too slowly: more than "
                        f"{MAX_BUFFERED_BYTES >> 20} MiB of output waited for it. Read the "
                        "stream as it comes, or ask for fewer log-probabilities",
                        metadata={"cause": "slow_reader"},
                    )
                )
        self._news.set()

    def fail(self, error: VeneerError) -> None:
        """The sequence has ended by an error; a first one stays."""
        if self._error is None:
            self._error = error
        self._news.set()

    async def get(self) -> SequenceOutput:
        """Everything that has come since the last call, as one output.

        Raises:
            VeneerError: what `fail` was given, once all outputs before it were taken.
        """
        while self._output is None:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        output, self._output, self._bytes = self._output, None, 0
        return output


def _joined(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    """Two outputs in a row as one; what only a first output has stays.

    Appends in place: the stream owns its buffered output, and copying it at every
    step would make a slow reader's cost grow with the square of what waits.
    """
    first.tokens.extend(second.tokens)
    _extend(first.logprobs, second.logprobs)
    _extend(first.top_logprobs, second.top_logprobs)
    if second.finish is None:
        return first
    return msgspec.structs.replace(first, finish=second.finish)


def _extend(
    first: list[float] | list[Tops] | None, second: Sequence[float] | Sequence[Tops] | None
) -> None:
    if first is not None and second is not None:
        first.extend(second)  # type: ignore[arg-type]  # both come from the same field


def _size(output: SequenceOutput) -> int:
    """Estimated bytes of an output's lists."""
    numbers = len(output.tokens) + len(output.logprobs or ())
    numbers += len(output.prompt_logprobs or ())
    tops = sum(map(len, output.top_logprobs or ()))
    tops += sum(map(len, output.prompt_top_logprobs or ()))
    return numbers * _NUMBER_BYTES + tops * _TOP_BYTES
