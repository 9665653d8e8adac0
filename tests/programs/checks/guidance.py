"""guidance: programs of prompts, over an OpenAI-compatible server."""

from __future__ import annotations

import json
from typing import Any

import guidance
from guidance import assistant, gen, user

from tests.programs.kit import HELLO, KEY, MODEL, URL, City


def model() -> Any:
    return guidance.models.OpenAI(MODEL, api_key=KEY, base_url=URL, echo=False)


def check_text() -> None:
    lm = model()
    with user():
        lm += HELLO
    with assistant():
        lm += gen("said", max_tokens=8)
    assert lm["said"]


def check_two_turns() -> None:
    lm = model()
    for name in ("first", "second"):
        with user():
            lm += HELLO
        with assistant():
            lm += gen(name, max_tokens=8)
    assert lm["first"]
    assert lm["second"]


def check_json_of_a_schema() -> None:
    lm = model()
    with user():
        lm += "Name a city in France, and say whether it is large."
    with assistant():
        lm += guidance.json(name="city", schema=City)
    City.model_validate(json.loads(lm["city"]))
