"""Suggests an existing name for a mistyped one.

Names are kept sorted, both forwards and reversed. That gives the longest prefix and the longest
suffix that the typed name shares with any name. An edit that leads to a name must lie between
the two, which leaves few positions: looking up all edits there takes microseconds among a
hundred thousand names.
"""

from __future__ import annotations

import bisect
import string
from collections.abc import Container, Iterable, Iterator
from typing import Final

_ALPHABET: Final = string.ascii_lowercase + string.digits + "._-"
_ALIKE: Final = 0.6
"""A similar name shares at least this part of both names' characters as prefix or suffix."""


class NearNames:
    """Sorted names. Not thread-safe."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._forward = sorted(names)
        self._backward = sorted(name[::-1] for name in self._forward)

    def add(self, name: str) -> None:
        """Add a new name."""
        bisect.insort(self._forward, name)
        bisect.insort(self._backward, name[::-1])

    def remove(self, name: str) -> None:
        """Remove an existing name."""
        for names, key in ((self._forward, name), (self._backward, name[::-1])):
            del names[bisect.bisect_left(names, key)]

    def nearest(self, name: str, known: Container[str]) -> str | None:
        """A name one edit away, else one that shares most of its prefix and suffix; None if
        there is neither.

        Args:
            known: all names.
        """
        before, after = _beside(self._forward, name), _beside(self._backward, name[::-1])
        head = max((_common(name, other) for other in before), default=0)
        tail = max((_common(name[::-1], other) for other in after), default=0)
        for edited in _edits(name, head, tail):
            if edited in known:
                return edited
        others = sorted({*before, *(other[::-1] for other in after)})
        best = max(others, key=lambda other: _likeness(name, other), default="")
        return best if best and _likeness(name, best) >= _ALIKE else None


def _beside(names: list[str], name: str) -> list[str]:
    """The neighbours of ``name`` in sorted order; no other name shares a longer prefix."""
    at = bisect.bisect(names, name)
    return names[max(0, at - 1) : at + 1]


def _common(one: str, other: str) -> int:
    """Length of the common prefix."""
    for at, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine != yours:
            return at
    return min(len(one), len(other))


def _likeness(one: str, other: str) -> float:
    """Share of all characters in the common prefix or suffix, 0 to 1."""
    head = _common(one, other)
    tail = _common(one[head:][::-1], other[head:][::-1])
    return 2 * (head + tail) / (len(one) + len(other))


def _edits(name: str, head: int, tail: int) -> Iterator[str]:
    """Strings one swap, insertion, deletion or replacement away (Norvig), likelier typos
    first. Only those with at most ``head`` characters before the edit and at most ``tail``
    after it."""
    behind = len(name) - tail
    # In a name of two letters, replacing or swapping one makes a different word.
    long = len(name) > 2
    for at in range(max(0, behind - 2), min(head + 1, len(name) - 1)):
        if long:
            yield name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    for at in range(behind, head + 1):
        begin, end = name[:at], name[at:]
        for letter in _ALPHABET:
            yield begin + letter + end
    for at in range(max(0, behind - 1), min(head + 1, len(name))):
        yield name[:at] + name[at + 1 :]
    for at in range(max(0, behind - 1), min(head + 1, len(name))):
        begin, end = name[:at], name[at + 1 :]
        for letter in _ALPHABET if long else "":
            yield begin + letter + end
