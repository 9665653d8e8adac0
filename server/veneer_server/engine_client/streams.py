"""The stream of one sequence's outputs from the engine to one reader, joined and bounded.

Output that a slow reader has not read yet is kept as one `SequenceOutput`, no matter how many
steps it took; past `MAX_BUFFERED_BYTES` the stream ends with an error instead of growing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec
from veneer_registry.errors import Aborted, VeneerError

from veneer_server.wire.messages import SequenceOutput, Tops

MAX_BUFFERED_BYTES: Final = 4 << 20
"""Most bytes of buffered output, estimated as the size of the Python objects. With gRPC's own
buffers, a stream stays under 8 MB."""

# In CPython 3.11: a list slot, and an int or float object.
_NUMBER_BYTES: Final = 36
_TOP_BYTES: Final = 128


class OutputStream:
    """Takes the engine's outputs in order, and hands them to one reader, joined.

    Contract: `put` and `fail` never block. An output with ``finish``, or `fail`, ends the
    stream. Errors keep their order: the reader first gets the output that came before.
    """

    def __init__(self) -> None:
        self._output: SequenceOutput | None = None
        self._error: VeneerError | None = None
        self._bytes = 0
        self._news = asyncio.Event()

    def put(self, output: SequenceOutput) -> None:
        """Add the next output of the sequence."""
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
                        f"the caller reads too slowly: more than {MAX_BUFFERED_BYTES >> 20} "
                        "MiB of output is buffered. Read the stream as it arrives, or "
                        "request fewer log-probabilities",
                        metadata={"cause": "slow_reader"},
                    )
                )
        self._news.set()

    def fail(self, error: VeneerError) -> None:
        """End the sequence with an error; only the first one counts."""
        if self._error is None:
            self._error = error
        self._news.set()

    @property
    def unread(self) -> int:
        """Tokens that have arrived since the last `get`."""
        return 0 if self._output is None else len(self._output.tokens)

    async def get(self) -> SequenceOutput:
        """Wait for output, and return all that has arrived since the last call as one output.

        Raises:
            VeneerError: the error given to `fail`, once all outputs before it were read.
        """
        while self._output is None:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        output, self._output, self._bytes = self._output, None, 0
        return output


def _joined(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    """Join two consecutive outputs; fields that only a first output has are kept.

    Appends in place: the stream owns its buffered output, and copying it at every
    step would make the cost of a slow reader quadratic in its unread output.
    """
    first.tokens.extend(second.tokens)
    _extend(first.logprobs, second.logprobs)
    _extend(first.top_logprobs, second.top_logprobs)
    if second.finish is None and not (second.accepted or second.rejected):
        return first
    return msgspec.structs.replace(
        first,
        finish=second.finish,
        accepted=first.accepted + second.accepted,
        rejected=first.rejected + second.rejected,
    )


def _extend(
    first: list[float] | list[Tops] | None, second: Sequence[float] | Sequence[Tops] | None
) -> None:
    if first is not None and second is not None:
        first.extend(second)  # type: ignore[arg-type]  # both come from the same field


def _size(output: SequenceOutput) -> int:
    """Estimated bytes of an output's lists."""
    numbers = len(output.tokens) + len(output.logprobs or ())
    numbers += len(output.prompt_logprobs or ()) + len(output.prompt_ranks or ())
    tops = sum(map(len, output.top_logprobs or ()))
    packed = sum(map(len, output.prompt_top_logprobs or ()))
    return numbers * _NUMBER_BYTES + tops * _TOP_BYTES + packed
