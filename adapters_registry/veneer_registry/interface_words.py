"""Messages in the words of the interface that the caller uses.

The server's messages speak of calls and fields as the gRPC contract names them:
``ListAdapters``, ``sampling.top_p``, ``allow_replace``. A plain English word that is meant as
such a name stands in backticks. Each other interface has one table of its own words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

__all__ = ["Translation"]

_QUOTED: Final = r"""(?<!\w)'[^']*'(?!\w)|"[^"]*\""""
"""What a caller sent: never translated."""
_PLAIN: Final = re.compile(r"[a-z]+")


class Translation:
    """The contract's words in those of one interface."""

    def __init__(self, words: Mapping[str, str]) -> None:
        """Args:
        words: of calls and fields; of a list's field without an index.
        """
        self.words: Final = dict(words)
        names = sorted(map(re.escape, words), key=len, reverse=True)
        telling = [name for name in names if not _PLAIN.fullmatch(name)]
        self._pattern = re.compile(
            rf"{_QUOTED}|`(?P<marked>{'|'.join(names)})`"
            rf"|(?<![\w.`/-])(?P<bare>{'|'.join(telling)})(?!\w|\.\w)"
        )

    def __call__(self, message: str) -> str:
        """The message in this interface's words."""
        return self._pattern.sub(self._translated, message)

    def _translated(self, found: re.Match[str]) -> str:
        name = found["marked"] or found["bare"]
        return found[0] if name is None else self.words[name]
