"""Checks of everything, in slices, so that a request that arrives meanwhile is not kept
waiting for the end of one.

A check is a generator: it yields between slices, and raises AssertionError where something
differs. What it looks at must not change between two slices; a caller that is interrupted
drops the generator and begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

__all__ = ["in_slices", "run"]

_SLICE: Final = 200
"""Items of a slice: a few tenths of a millisecond in the dearest check."""

T = TypeVar("T")


def in_slices(items: Iterable[T]) -> Iterator[list[T]]:
    """The items, in lists of `_SLICE`."""
    iterator = iter(items)
    while part := list(islice(iterator, _SLICE)):
        yield part


def run(check: Iterator[None]) -> None:
    """All slices of a check at once."""
    for _ in check:
        pass
