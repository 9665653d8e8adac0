"""Incremental detokenization: emits whole characters only, and never leaks stop strings.

Both classes are small state machines without I/O. The concatenated output is the same
however the tokens are split over calls.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """The interface of a tokenizer, as the detokenizer uses it."""

    strip_first_space: bool
    """Whether the tokenizer marks word starts by a space, and drops the text's first one."""

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for; empty for special and unknown tokens."""


class Detokenizer:
    """Decodes one sequence incrementally.

    Byte-level tokenizers split characters over tokens, so an incremental UTF-8 decoder
    converts the tokens' bytes to text: it holds an incomplete character back until its
    last byte arrives. Bytes that can never become a character are shown as U+FFFD. Cost:
    one table look-up per token and one decode per call.
    """

    __slots__ = ("_decoder", "_strip", "_tokens")

    def __init__(self, tokens: TokenBytes, *, continues: bool = False) -> None:
        """Args:
        tokens: the tokenizer's bytes.
        continues: the text continues a prompt, so a leading space is kept.
        """
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokens.strip_first_space and not continues

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that became complete with these tokens; may be empty."""
        token_bytes = self._tokens.token_bytes
        data = b"".join([token_bytes(token) for token in ids])
        if not data:
            return ""
        return self._decoder.decode(self._stripped(data))

    @property
    def held(self) -> bytes:
        """Bytes whose text is not complete yet."""
        return self._decoder.getstate()[0]

    def flush(self) -> str:
        """Return the rest at the end: U+FFFD for an incomplete character, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _stripped(self, data: bytes) -> bytes:
        if not self._strip:
            return data
        self._strip = False
        return data[1:] if data.startswith(b" ") else data


class StopStrings:
    """Cuts text before the first stop string, wherever the text is split.

    Text that may still turn into a stop string is held back. The stop string that
    is complete first wins (of several that end together, the one that starts
    first), so the result does not depend on how the text was split.
    """

    __slots__ = ("_held", "_prefixes", "_reach", "_stops", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        """Args: stops: none of them empty."""
        self._stops = tuple(dict.fromkeys(stops))
        self._prefixes = frozenset(s[:n] for s in self._stops for n in range(1, len(s)))
        self._reach = max((len(s) for s in self._stops), default=1) - 1
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Return the text that cannot be part of a stop string. Sets `stopped` when a stop
        string is complete."""
        if not self._stops:
            return text
        if self.stopped or not text:
            return ""
        text = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        return self._hold(text)

    def skip(self, text: str) -> str:
        """As `feed`, for text in which stop strings are ignored; but a stop string may begin in
        it."""
        if not self._stops or self.stopped:
            return self.feed(text)
        return self._hold(self._held + text)

    def _hold(self, text: str) -> str:
        """Hold back the end of a text if it may begin a stop string; return the rest."""
        keep = 0
        for size in range(min(self._reach, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                keep = size
                break
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return the held text, at the end of a sequence without a stop string."""
        held, self._held = self._held, ""
        return held
