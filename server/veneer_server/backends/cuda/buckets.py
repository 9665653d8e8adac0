"""The sizes that a step is rounded up to, so that few graphs serve all steps. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LaunchBucket:
    """The shape of a step's launches. Steps of one bucket that only decode share a graph.

    Attributes:
        rows: rows of the step, padded.
        pieces: pieces of the longest context, padded; see `attention.decode.SPLIT`.
        adapters: whether any row has an adapter.
    """

    rows: int
    pieces: int
    adapters: bool


@dataclass(frozen=True, slots=True)
class Sizes:
    """The limits of a step.

    Attributes:
        rows: most tokens of a step.
        sequences: most sequences of a step.
        context: most tokens of a sequence.
    """

    rows: int
    sequences: int
    context: int


def rows_for(rows: int) -> int:
    """Round ``rows`` up to the rows of a bucket: a power of two or, from 16 on, also the value
    halfway between two of them. So padding adds less than the step's own rows (less than half
    of them from 16 on)."""
    size = 1
    while size < rows:
        size *= 2
    between = size * 3 // 4
    return between if size > 16 and between >= rows else size


def pieces_for(pieces: int) -> int:
    """Round ``pieces`` up to the pieces of a bucket, a power of four. Programs beyond the end
    of a context return at once."""
    size = 1
    while size < pieces:
        size *= 4
    return size
