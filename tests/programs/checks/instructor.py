"""instructor: pydantic models, by a forced call unless another mode is asked for."""

from __future__ import annotations

from typing import Any

import instructor
from openai import OpenAI

from tests.programs.kit import ASK, KEY, MODEL, URL, City

GIVEN: Any = {
    "model": MODEL,
    "messages": [{"role": "user", "content": ASK}],
    "temperature": 0,
    "max_tokens": 48,
    "max_retries": 0,
}
sdk = OpenAI(base_url=URL, api_key=KEY)


def check_the_default_mode() -> None:
    city = instructor.from_openai(sdk).chat.completions.create(response_model=City, **GIVEN)
    assert isinstance(city, City)


def check_the_mode_with_a_schema() -> None:
    asked = instructor.from_openai(sdk, mode=instructor.Mode.JSON_SCHEMA)
    assert isinstance(asked.chat.completions.create(response_model=City, **GIVEN), City)


def check_partial_objects_grow() -> None:
    stream = instructor.from_openai(sdk).chat.completions.create_partial(
        response_model=City, **GIVEN
    )
    seen = list(stream)
    assert len({str(each) for each in seen}) > 1
    City.model_validate(seen[-1].model_dump())


def check_several_objects() -> None:
    stream = instructor.from_openai(sdk).chat.completions.create_iterable(
        response_model=City, **{**GIVEN, "max_tokens": 200}
    )
    assert isinstance(next(iter(stream)), City)
