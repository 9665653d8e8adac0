"""Questions that a new user asks the bundled base first, and what a good answer contains.

All questions go to the base without an adapter. The first eight were written before any default
was chosen (2026-11-27), the others before any of these was asked (2026-11-30). The bundled base
has 135 million parameters, so a child could answer. ``python -m tests.bench.first_answers``
gives the pass rate of many runs without a seed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LONGEST = 1500

COUNTED = (
    f"answers that contain the right word (for lists, three of them), under {_LONGEST:,} "
    "characters; nobody read them"
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question; a good answer contains ``times`` different matches of ``word``."""

    prompt: str
    word: str
    times: int = 1

    def good(self, text: str) -> bool:
        found = {match.lower() for match in re.findall(self.word, text, re.IGNORECASE)}
        return len(found) >= self.times and len(text) < _LONGEST


QUESTIONS = (
    Question("What is the capital of France?", r"\bParis\b"),
    Question("What is the capital of Japan?", r"\bTokyo\b"),
    Question("What color is the sky on a clear day?", r"\bblue\b"),
    Question("How many days are in a week?", r"\b(?:7|seven)\b"),
    Question("What do bees make?", r"\bhoney\b"),
    Question("What is the largest planet in our solar system?", r"\bJupiter\b"),
    Question(
        "Name three fruits.",
        r"\b(?:apple|banana|orange|grape|strawberr|mango|pear|peach|cherr|plum|kiwi|pineapple)",
        times=3,
    ),
    Question("What is the opposite of hot?", r"\b(?:cold|cool)\b"),
    Question("What is the capital of Italy?", r"\bRome\b"),
    Question("How many legs does a spider have?", r"\b(?:8|eight)\b"),
    Question("What is 2 plus 2?", r"\b(?:4|four)\b"),
    Question("What do you call frozen water?", r"\bice\b"),
    Question("Which animal barks?", r"\bdogs?\b"),
    Question("What is the opposite of up?", r"\bdown\b"),
    Question("How many months are in a year?", r"\b(?:12|twelve)\b"),
    Question("What language is spoken in Spain?", r"\bSpanish\b"),
    Question("Which planet do we live on?", r"\bEarth\b"),
    Question("What gas do plants take in from the air?", r"\b(?:carbon dioxide|CO2|CO₂)\b"),
    Question(
        "Name three colors.",
        r"\b(?:red|blue|green|yellow|orange|purple|black|white|brown|pink)\b",
        times=3,
    ),
    Question("What is the plural of mouse?", r"\bmice\b"),
)
