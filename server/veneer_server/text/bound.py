"""Bounds the bytes of text that a number of tokens can stand for; runs text work in threads.

A prompt with more bytes cannot fit, and is refused before it is tokenized. The bound either
holds for every text or does not exist:

- A token of the vocabulary stands for no more bytes than the longest entry has.
- An added token matches its own text, in the prompt as sent or as normalized.
- A normalizer may shrink text first. Composition (NFC) shrinks UTF-8 by a factor of at most
  3.5 (U+1FBE U+0308 U+0301, 7 bytes, becomes U+0390), compatibility forms by at most 4
  (U+1D7D8, 4 bytes, becomes "0"). ASCII is unchanged.
- A byte-level vocabulary may lack bytes (SmolLM2's lacks some control characters). They are
  silently dropped, so they are not counted.
- Any other text that is dropped without a token breaks the bound: by a normalizer that strips,
  a pre-tokenizer that removes spaces, runs of unknown characters that become one token, or
  added tokens that absorb the spaces around them. If a tokenizer may do any of this, or has a
  component that this module does not know, there is no bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from veneer_server.queues.fair_queue import SenderQueue
from veneer_server.queues.fairness import Sender

UNICODE_SHRINK: Final = 4
"""Most bytes of text per byte of its Unicode normal form."""

_PIECE: Final = 64 << 10

_FORMS: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_NEVER_IN_UTF8: Final = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
_LOSSLESS_PIECES: Final = frozenset({"ByteLevel", "Digits", "Metaspace"})


@dataclass(frozen=True, slots=True)
class TextBound:
    """The bound for one tokenizer.

    Attributes:
        token_bytes: most bytes of normalized text that a token stands for.
        shrink: most bytes of text per byte of normalized text, for text that is not all
            ASCII; for ASCII it is 1.
        dropped: bytes that have no token.
    """

    token_bytes: int
    shrink: int
    dropped: bytes = b""

    def exceeds(self, text: bytes, most: int) -> bool:
        """Whether more than ``most`` bytes of a text need tokens. Stops scanning once it knows:
        4 MB take 4 ms with the GIL held."""
        if len(text) <= most or not self.dropped:
            return len(text) > most
        count = 0
        for at in range(0, len(text), _PIECE):
            count += len(text[at : at + _PIECE].translate(None, self.dropped))
            if count > most:
                return True
        return False

    def most_bytes(self, tokens: int, *, ascii_only: bool) -> int:
        """Most bytes of text that fit into ``tokens`` tokens."""
        return tokens * self.token_bytes * (1 if ascii_only else self.shrink)


def read_bound(
    description: Mapping[str, Any],
    alphabet: Mapping[str, int],
    normalize: Callable[[str], str],
) -> TextBound | None:
    """Compute the bound for a ``tokenizer.json``; None if there is none.

    Args:
        alphabet: character -> byte, in byte-level vocabularies.
        normalize: the tokenizer's normalizer.
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
            return None  # dropped bytes cannot be counted in the text before normalization
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
    """The most that a normalizer shrinks non-ASCII text, as a factor; None if unknown."""
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


# -------------------- lanes
# Threads that work on text, in two lanes by size, so that long texts do not delay short ones.

LONG_TEXT: Final = 64 << 10
"""Texts of at least this many bytes are long; tokenizing them takes 50 ms or more."""

SHORT_THREADS: Final = 2
LONG_THREADS: Final = 1
"""One long text at a time: more threads would take cores from the engine."""

T = TypeVar("T")


class Lanes:
    """Threads for work that releases the GIL, or holds it only briefly. In each lane, senders
    take turns: a sender with many texts delays another sender's text by only one of its own.
    Belongs to one event loop."""

    def __init__(self) -> None:
        self._short = _Lane(SHORT_THREADS, "text")
        self._long = _Lane(LONG_THREADS, "long-text")

    async def run(self, size: int, work: Callable[[], T], sender: Sender) -> T:
        """Run ``work`` on a text of ``size`` bytes. If cancelled while queued, it does not
        run at all."""
        lane = self._long if size >= LONG_TEXT else self._short
        return await lane.run(work, sender)

    def close(self) -> None:
        """End the threads; queued work does not run."""
        for lane in (self._short, self._long):
            lane.close()


class _Lane:
    def __init__(self, threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = threads
        self._queue: SenderQueue[asyncio.Future[None]] = SenderQueue()

    async def run(self, work: Callable[[], T], sender: Sender) -> T:
        loop = asyncio.get_running_loop()
        if not self._free:
            turn: asyncio.Future[None] = loop.create_future()
            self._queue.push(sender, turn)
            try:
                await turn
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._freed()
                else:
                    self._queue.remove(sender, turn)
                raise
        else:
            self._free -= 1
        running = loop.run_in_executor(self._threads, work)
        running.add_done_callback(lambda _: self._freed())
        # If the caller leaves, the thread continues, and becomes free only when it is done.
        return await asyncio.shield(running)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        while (found := self._queue.pop()) is not None:
            found[1].cancel()

    def _freed(self) -> None:
        """Give a free thread to the next sender in the queue."""
        self._free += 1
        while self._free and (found := self._queue.pop()) is not None:
            if found[1].done():  # its caller has left; others may have left too
                self._queue.drop(asyncio.Future.done)
                continue
            self._free -= 1
            found[1].set_result(None)
