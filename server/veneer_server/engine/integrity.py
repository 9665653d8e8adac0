"""Full consistency checks, run in slices so that an arriving request need not wait for the end
of a check.

A check is a generator: it yields between slices, and raises AssertionError on a mismatch.
The state it checks must not change between slices; a caller that is interrupted drops the
generator and starts over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

_SLICE: Final = 200
"""Items per slice: a few tenths of a millisecond in the slowest check."""

T = TypeVar("T")


def in_slices(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield the items in lists of at most `_SLICE`."""
    iterator = iter(items)
    while part := list(islice(iterator, _SLICE)):
        yield part


def run(check: Iterator[None]) -> None:
    """Run all slices of a check at once."""
    for _ in check:
        pass
