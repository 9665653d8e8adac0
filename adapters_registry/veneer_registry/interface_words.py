"""Translates messages into the terms of the interface that the caller uses.

The server's messages name calls and fields as the gRPC contract does: ``ListAdapters``,
``sampling.top_p``, ``allow_replace``. Where such a name is also a plain English word, it is
in backticks. Every other interface has a table of its own terms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_QUOTED: Final = r"""(?<!\w)'[^']*'(?!\w)|"[^"]*\""""
"""Quoted text, which a caller sent. It is never translated."""
_PLAIN: Final = re.compile(r"[a-z]+")


class Translation:
    """Replaces the contract's names by those of one interface."""

    def __init__(self, words: Mapping[str, str]) -> None:
        """Args:
        words: contract's name -> this interface's name. Fields of list items have no index.
        """
        self.words: Final = dict(words)
        names = sorted(map(re.escape, words), key=len, reverse=True)
        telling = [name for name in names if not _PLAIN.fullmatch(name)]
        self._pattern = re.compile(
            rf"{_QUOTED}|`(?P<marked>{'|'.join(names)})`"
            rf"|(?<![\w.`/-])(?P<bare>{'|'.join(telling)})(?!\w|\.\w)"
        )

    def __call__(self, message: str) -> str:
        """The message in this interface's terms."""
        return self._pattern.sub(self._translated, message)

    def _translated(self, found: re.Match[str]) -> str:
        name = found["marked"] or found["bare"]
        return found[0] if name is None else self.words[name]
