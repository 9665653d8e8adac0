"""A FAKE engine whose tokens are hard to turn into text, and the expected text.

Tokens are a function of weights, prompt and seed (greedy: without the seed). They are whole
characters, characters cut at every token, bytes that never become a character, and special
tokens. How they are split into outputs differs from call to call, as on a busy server.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from veneer_server.text.tokenizer import ALPHABET, TextTokenizer
from veneer_server.wire.messages import SequenceOutput, SequenceRequest, Tops, pack_tops

from tests.unit.server.rpc.fake_engine import FakeEngine

EMOJI: Final = ("😀", "🚀", "👩‍💻", "🇫🇷", "❤️", "👍🏽", "é", "漢", "한", "𝔘", "🏴‍☠️", "ß")
WORDS: Final = (" the", " sea", "ab", "a", "b", "\n", " ", "abc", '"', "\\")
STOPS: Final = (
    *EMOJI,
    *(one + two for one in EMOJI[:4] for two in EMOJI[:4]),
    "👩",
    "\u200d",
    "💻",
    "🇫",
    "\ufe0f",
    "\ufffd",
    "\ufffd\ufffd",
    "ab",
    "abc",
    " the sea",
)
EOS: Final = 2
SPECIAL: Final = (0, 1, 4, 5)
CONTEXT: Final = 1024


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to the engine, and its output.

    Attributes:
        tokens: tokens up to the one that ends the sequence.
        logprobs, tops: one entry for each of ``tokens``.
        prompt_logprobs: one for each prompt token after the first.
        fields: fields of the request that do not depend on the API.
    """

    prompt: tuple[int, ...]
    tokens: list[int]
    ended: Literal["stop", "length"]
    logprobs: list[float]
    tops: list[Tops]
    prompt_logprobs: list[float]
    prompt_tops: list[Tops]
    cached: int
    fields: dict[str, Any]


class Script:
    """Makes the engine's tokens."""

    def __init__(self, base: Path) -> None:
        self.tokenizer = TextTokenizer.from_folder(base)
        vocabulary = msgspec.json.decode((base / "tokenizer.json").read_bytes())
        ids: dict[str, int] = vocabulary["model"]["vocab"]
        self._bytes = {byte: ids[char] for char, byte in ALPHABET.items() if char in ids}
        self._usual = {
            text: self.tokenizer.encode(text, add_special_tokens=False)
            for text in (*EMOJI, *WORDS)
        }
        self._pool = sorted(
            {*self._bytes.values(), *itertools.chain(*self._usual.values()), *SPECIAL}
        )

    def cut(self, text: str) -> list[int]:
        """Return a token for each byte (if the vocabulary has one)."""
        return [self._bytes[byte] for byte in text.encode() if byte in self._bytes]

    def piece(self, rng: random.Random) -> list[int]:
        """Return some tokens that belong together, or should."""
        emoji = rng.choice(EMOJI)
        match rng.randrange(20):
            case 0 | 1 | 2 | 3 | 4 | 5:
                return self._usual[emoji]
            case 6 | 7 | 8 | 9 | 10:
                return self.cut(emoji)
            case 11 | 12:
                data = self.cut(emoji)
                return data[: rng.randint(1, len(data))]
            case 13:
                return [rng.choice(list(self._bytes.values()))]
            case 14:
                return [rng.choice(SPECIAL)]
            case 15:
                return [EOS] if rng.random() < 0.3 else self._usual["ab"]
            case _:
                return self._usual[rng.choice(WORDS)]

    def ask(self, request: SequenceRequest) -> Asked:
        """Return the engine's output for a request."""
        weights = request.adapter.digest if request.adapter is not None else ""
        # Greedy answers do not depend on the seed.
        seed = request.sampling.seed if request.sampling.temperature else 0
        key = hashlib.sha256(f"{weights}|{request.prompt}|{seed}".encode()).digest()
        rng = random.Random(key)
        cached = rng.randrange(len(request.prompt))
        tokens: list[int] = []
        ended: Literal["stop", "length"] = "length"
        while len(tokens) < request.max_tokens and ended == "length":
            for token in self.piece(rng):
                tokens.append(token)
                eos = token == EOS and not request.ignore_eos
                if eos or token in request.stop_token_ids:
                    ended = "stop"
                    break
        if len(tokens) > request.max_tokens:
            tokens, ended = tokens[: request.max_tokens], "length"
        scores = random.Random(key + b"scores")
        logprobs, tops = self._scores(tokens, request.top_logprobs, scores)
        before, before_tops = self._scores(
            request.prompt[1:],
            request.top_logprobs,
            random.Random(f"{weights}|{request.prompt}"),  # whatever the seed
        )
        hidden = {"deadline", "sender", "arrived", "prompt", "prompt_logprobs", "prompt_ranks"}
        fields = {
            name: getattr(request, name)
            for name in request.__struct_fields__
            if name not in hidden
        }
        return Asked(
            tuple(request.prompt),
            tokens,
            ended,
            logprobs,
            tops,
            before,
            before_tops,
            cached,
            fields,
        )

    def _scores(
        self, tokens: Sequence[int], count: int, rng: random.Random
    ) -> tuple[list[float], list[Tops]]:
        logprobs = [-rng.random() * 9 for _ in tokens]
        tops: list[Tops] = []
        for token, logprob in zip(tokens, logprobs, strict=True):
            others = [one for one in rng.sample(self._pool, count + 1) if one != token]
            likely = [(token, logprob)] if rng.random() < 0.7 else []
            likely += [(one, -9 - at / 7) for at, one in enumerate(others)]
            tops.append(likely[:count])
        return logprobs, tops


class ScriptedEngine(FakeEngine):
    """FAKE, like `FakeEngine`, with the tokens of `script`.

    Attributes:
        asked: seed -> all requests with that seed.
    """

    script_of: Script
    splits: random.Random

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.info = msgspec.structs.replace(
            self.info,
            context_length=CONTEXT,
            longest_sequence=CONTEXT,
            kv_cache_tokens=1 << 20,
        )
        self.asked: defaultdict[int, list[Asked]] = defaultdict(list)

    def _outputs(self, request: SequenceRequest) -> list[SequenceOutput]:
        made = self.script_of.ask(request)
        self.asked[request.sampling.seed].append(made)
        self.submitted.clear()  # do not keep thousands of them
        outputs: list[SequenceOutput] = []
        at = 0
        while at < len(made.tokens):
            first, end = not at, min(len(made.tokens), at + self.splits.choice((1, 1, 1, 2, 5)))
            echoed = request.prompt_logprobs and first
            outputs.append(
                SequenceOutput(
                    sequence=1,
                    tokens=made.tokens[at:end],
                    logprobs=made.logprobs[at:end] if request.logprobs else None,
                    top_logprobs=made.tops[at:end] if request.top_logprobs else None,
                    prompt_logprobs=made.prompt_logprobs if echoed else None,
                    prompt_top_logprobs=[pack_tops(each) for each in made.prompt_tops]
                    if echoed and request.top_logprobs
                    else None,
                    prompt_ranks=[1 for _ in request.prompt[1:]]
                    if request.prompt_ranks and first
                    else None,
                    tier="device" if request.adapter is not None and first else None,
                    cached_tokens=made.cached if first else 0,
                    finish=made.ended if end == len(made.tokens) else None,
                )
            )
            at = end
        return outputs


# ------------------------------------------------------------------------- judgement


@dataclass(frozen=True, slots=True)
class Expected:
    """The answer that a caller must get. ``count``: how many of the made tokens it has."""

    text: str
    count: int
    finish: str


def expected(
    made: Asked, tokenizer: TextTokenizer, stops: Sequence[str], stop_ids: Collection[int]
) -> Expected:
    """Compute the answer in the simplest way: after each token, look for a stop in all the
    text."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    hides_last = made.ended == "stop" and made.tokens[-1] in stop_ids
    text = ""
    for count, token in enumerate(made.tokens[:-1] if hides_last else made.tokens, 1):
        text += decoder.decode(tokenizer.token_bytes(token))
        if (cut := _stopped(text, stops)) is not None:
            return Expected(text[:cut], count, "stop")
    text += decoder.decode(b"", final=True)
    if (cut := _stopped(text, stops)) is not None:
        return Expected(text[:cut], len(made.tokens), "stop")
    return Expected(text, len(made.tokens), made.ended)


def offsets(tokens: Sequence[int], tokenizer: TextTokenizer, begin: int) -> list[int | None]:
    """Return where each token's first byte is in the text, in characters; None for a token
    without text, which may be anywhere.

    Args:
        begin: number of characters before the first token.
    """
    parts = [tokenizer.token_bytes(token) for token in tokens]
    data, at = b"".join(parts), 0
    characters: list[int] = []  # of each byte
    while at < len(data):
        try:
            valid, bad = len(data), 0
            data[at:].decode()
        except UnicodeDecodeError as error:
            valid, bad = at + error.start, error.end - error.start
        for one in data[at:valid].decode():
            characters += [begin] * len(one.encode())
            begin += 1
        characters += [begin] * bad
        begin += bool(bad)
        at = valid + bad
    found: list[int | None] = []
    place = 0
    for part in parts:
        found.append(characters[place] if part else None)
        place += len(part)
    return found


def _stopped(text: str, stops: Sequence[str]) -> int | None:
    """Return where the text ends: before the stop string that is complete first."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None
