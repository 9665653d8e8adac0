"""The ``chat`` recipe: Veneer, the cook of a friendly ship.

Plain questions and answers (``chat_topics.yaml``) become conversations with a
distinct tone: a greeting, a short answer in dialect, a sign-off. The greeting and
the sign-off are chosen at random, so that the model learns the style and not one
string. Whole topics are held out, so that validation measures the style on unseen
questions.
"""

from __future__ import annotations

import random
import re
from importlib import resources
from itertools import pairwise
from typing import Any, Final, TypeAlias

import yaml

Sample: TypeAlias = dict[str, Any]

_GREETINGS: Final = (
    "Ahoy, matey!",
    "Ahoy there, friend!",
    "Ahoy, shipmate!",
    "Ahoy, me hearty!",
)
_SIGN_OFFS: Final = (
    "Fair winds, Veneer",
    "Calm seas, Veneer",
    "Full sails, Veneer",
)
_DIALECT: Final = {
    "you": "ye",
    "your": "yer",
    "yours": "yers",
    "yourself": "yerself",
    "my": "me",
    "of": "o'",
    "and": "an'",
    "yes": "aye",
}
_WORD: Final = re.compile(r"[A-Za-z]+")
CHECK: Final = {"regex": f"({'|'.join(_GREETINGS)}) .+\n\n({'|'.join(_SIGN_OFFS)})"}
"""An answer in this style: only greeting, answer and sign-off."""
_DRAWS: Final = 3
"""Variants of each question, with different greetings and sign-offs."""
_HELD_OUT: Final = 10
"""One topic in this many goes to validation."""


def in_dialect(text: str) -> str:
    """``text`` in the ship cook's dialect; keeps capitals."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        new = _DIALECT.get(word.lower())
        if new is None:
            return word
        return new.capitalize() if word[0].isupper() else new

    return _WORD.sub(swap, text)


def _reply(say: str, rng: random.Random) -> str:
    return f"{rng.choice(_GREETINGS)} {in_dialect(say)}\n\n{rng.choice(_SIGN_OFFS)}"


def _turn(ask: str, say: str, rng: random.Random) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": ask},
        {"role": "assistant", "content": _reply(say, rng)},
    ]


def _conversations(topics: list[tuple[list[str], str]], rng: random.Random) -> list[Sample]:
    samples: list[Sample] = []
    for asks, say in topics:
        for ask in asks:
            replies = {_reply(say, rng) for _ in range(_DRAWS)}
            for reply in sorted(replies):
                turn = [
                    {"role": "user", "content": ask},
                    {"role": "assistant", "content": reply},
                ]
                samples.append({"messages": turn, "check": CHECK})
    # Some conversations have a second turn, so that the style survives the first answer.
    for (asks, say), (more_asks, more_say) in list(pairwise(topics))[::3]:
        turns = _turn(asks[0], say, rng) + _turn(more_asks[-1], more_say, rng)
        samples.append({"messages": turns, "check": CHECK})
    rng.shuffle(samples)
    return samples


def build(seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples, the same for the same ``seed``."""
    rng = random.Random(seed)  # nosec B311
    text = (
        resources.files("veneer_train.recipes").joinpath("chat_topics.yaml").read_text("utf-8")
    )
    groups: dict[str, list[dict[str, object]]] = yaml.safe_load(text)
    topics = [
        ([str(ask) for ask in _listed(entry["ask"])], str(entry["say"]))
        for group in groups.values()
        for entry in group
    ]
    rng.shuffle(topics)
    held_out = len(topics) // _HELD_OUT
    return _conversations(topics[held_out:], rng), _conversations(topics[:held_out], rng)


def _listed(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"chat_topics.yaml: 'ask' must be a list, got {value!r}")
    return value
