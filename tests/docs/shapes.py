"""Whether a program's output has the shape of the one on the page: the same words.

Numbers, times, sizes and ids may differ; ``...`` on the page matches anything; white space is
ignored, so that a page may break long lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_ID: Final = re.compile(r"(?<![0-9A-Za-z])(?=[a-f]*\d)[0-9a-f]{8,}(?![0-9A-Za-z])")
_NUMBER: Final = re.compile(r"\d+(?:[.,:]\d+)*")
_UNIT: Final = re.compile(r"#\s*(?:[um]?s|min|h|[kKMGT]?i?B|bytes)\b")
_RULE: Final = re.compile(r"[─━═╌-]{3,}")
_SHOWN: Final = 160


def difference(expected: str, printed: str, varies: Iterable[str] = ()) -> str | None:
    """The part of the page's text that the output lacks, or None if the shapes are equal."""
    for text in varies:
        expected = expected.replace(text, "...")
    pieces = [_shape(piece) for piece in expected.split("...")]
    found, at = _shape(printed), 0
    for index, piece in enumerate(pieces):
        first, last = index == 0, index == len(pieces) - 1
        if first:
            where = 0 if found.startswith(piece) else -1
        elif last and piece:
            where = len(found) - len(piece) if found.endswith(piece) else -1
        else:
            where = found.find(piece, at)
        if where < at:
            return _told(piece, found[at:])
        at = where + len(piece)
    if pieces[-1] or len(pieces) == 1:
        rest = found[at:]
        return f"more is printed than the page has: {rest[:_SHOWN]}" if rest else None
    return None


def _shape(text: str) -> str:
    text = _ID.sub("#", text)
    text = _NUMBER.sub("#", text)
    text = _UNIT.sub("#", text)
    text = _RULE.sub("-", text)
    return "".join(text.split())


def _told(piece: str, found: str) -> str:
    """Where the longest matching prefix of the piece ends."""
    same = next(n for n in range(len(piece), -1, -1) if piece[:n] in found)
    at = found.index(piece[:same])
    context = piece[max(0, same - 20) : same]
    return (
        f"the page has: {context}>>{piece[same : same + _SHOWN]}\n"
        f"it prints:    {context}>>{found[at + same : at + same + _SHOWN]}"
    )
