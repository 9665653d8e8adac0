"""How many bytes of text a number of tokens can stand for, at most.

A prompt that has more bytes cannot fit, and is refused before it is tokenized. The bound
holds for every text, or there is none:

- A token of the vocabulary stands for no more bytes than its longest entry has.
- An added token matches its own text, in the prompt as sent or as normalized.
- A normalizer may shrink text first. Composing (NFC) shrinks UTF-8 by 3.5 at most
  (U+1FBE U+0308 U+0301, 7 bytes, becomes U+0390), compatibility forms by 4 (U+1D7D8, 4
  bytes, becomes "0"). ASCII stays as it is.
- A byte-level vocabulary may lack bytes (SmolLM2's lacks some control characters), which
  are dropped in silence: they are not counted.
- All else that is dropped without a token breaks the bound: a normalizer that strips, a
  pre-tokenizer that removes spaces, runs of unknown characters that become one token, and
  added tokens that take the spaces around them. Where a tokenizer may do any of this, or
  has a part that is not known here, there is no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["UNICODE_SHRINK", "TextBound", "read_bound"]

UNICODE_SHRINK: Final = 4
"""Bytes of text per byte of its Unicode normal form, rounded up."""

_PIECE: Final = 64 << 10

_FORMS: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_NEVER_IN_UTF8: Final = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
_LOSSLESS_PIECES: Final = frozenset({"ByteLevel", "Digits", "Metaspace"})


@dataclass(frozen=True, slots=True)
class TextBound:
    """Of one tokenizer.

    Attributes:
        token_bytes: most bytes of normalized text that a token stands for.
        shrink: bytes of text per byte of normalized text, at most, where the text is not
            all ASCII; for ASCII it is 1.
        dropped: bytes that have no token.
    """

    token_bytes: int
    shrink: int
    dropped: bytes = b""

    def exceeds(self, text: bytes, most: int) -> bool:
        """Whether more than so many bytes of a text need tokens. Looks at no more of it than
        it must: 4 MB take 4 ms, and the interpreter's lock."""
        if len(text) <= most or not self.dropped:
            return len(text) > most
        count = 0
        for at in range(0, len(text), _PIECE):
            count += len(text[at : at + _PIECE].translate(None, self.dropped))
            if count > most:
                return True
        return False

    def most_bytes(self, tokens: int, *, ascii_only: bool) -> int:
        """Bytes of text that fit so many tokens, at most."""
        return tokens * self.token_bytes * (1 if ascii_only else self.shrink)


def read_bound(
    description: Mapping[str, Any],
    alphabet: Mapping[str, int],
    normalize: Callable[[str], str],
) -> TextBound | None:
    """The bound of a ``tokenizer.json``; None where there is none.

    Args:
        alphabet: character -> byte, as byte-level vocabularies write bytes.
        normalize: what its normalizer does.
    """
    model = description.get("model") or {}
    added = description.get("added_tokens") or []
    vocabulary = model.get("vocab")
    normalizer = description.get("normalizer")
    shrink = _shrink(normalizer)
    pieces = _steps(description.get("pre_tokenizer"), "pretokenizers")
    if (
        shrink is None
        or model.get("type") != "BPE"
        or not isinstance(vocabulary, Mapping)
        or not all(map(_lossless, pieces))
        or any(token.get("lstrip") or token.get("rstrip") for token in added)
    ):
        return None
    dropped = b""
    if any(piece.get("type") == "ByteLevel" for piece in pieces):
        dropped = bytes(byte for char, byte in alphabet.items() if char not in vocabulary)
        longest = max(map(len, vocabulary), default=0)  # a character is a byte
        if normalizer is not None and not _NEVER_IN_UTF8.issuperset(dropped):
            return None  # what is dropped are not the bytes that were sent
    else:
        longest = max((len(token.encode()) for token in vocabulary), default=0)
        pieces_of_bytes = (f"<0x{byte:02X}>" for byte in range(256))
        if not (model.get("byte_fallback") and all(p in vocabulary for p in pieces_of_bytes)):
            return None
    own = [token["content"] for token in added]
    own = [*own, *map(normalize, own)]
    longest = max(longest, *(len(text.encode()) for text in own), 1)
    return TextBound(longest, shrink, dropped)


def _steps(part: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for one in part.get(members, []) for step in _steps(one, members)]
    return [part]


def _lossless(piece: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer passes on every byte."""
    kind = piece.get("type")
    return kind in _LOSSLESS_PIECES or (
        kind in ("Split", "Punctuation") and piece.get("behavior") != "Removed"
    )


def _shrink(normalizer: Mapping[str, Any] | None) -> int | None:
    """By how much a normalizer shrinks text that is not ASCII; None if nobody knows."""
    shrink = 1
    for step in _steps(normalizer, "normalizers"):
        kind = step.get("type")
        if kind in _FORMS:
            shrink *= UNICODE_SHRINK
        elif kind == "Replace":
            old, new = step.get("pattern", {}).get("String"), step.get("content", "")
            if not old or len(new.encode()) < len(old.encode()):
                return None
        elif kind != "Prepend":
            return None
    return shrink
