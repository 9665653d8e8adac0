"""Which sizes a step is rounded up to, so that few graphs serve all steps. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LaunchBucket:
    """The shape of a step's launches. Steps of one bucket that only decode share a graph.

    Attributes:
        rows: of the step, padded.
        pieces: of the longest context, padded; see `attention.decode.SPLIT`.
        adapters: whether any row has one.
    """

    rows: int
    pieces: int
    adapters: bool


@dataclass(frozen=True, slots=True)
class Sizes:
    """The largest steps.

    Attributes:
        rows: most tokens of a step.
        sequences: most sequences of a step.
        context: most tokens of a sequence.
    """

    rows: int
    sequences: int
    context: int


def rows_for(rows: int) -> int:
    """Rows of the bucket: powers of two, and from 16 on also halfway between them, so that a
    step computes at most half as many rows again as it has (a third from 16 on)."""
    size = 1
    while size < rows:
        size *= 2
    between = size * 3 // 4
    return between if size > 16 and between >= rows else size


def pieces_for(pieces: int) -> int:
    """Pieces of the bucket: powers of four. Programs beyond a context return at once."""
    size = 1
    while size < pieces:
        size *= 4
    return size
