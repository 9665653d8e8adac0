"""Sampling options, samples and constraints through the real server on the real base.

`python -m tests.integration.test_sampling` requests constrained JSON 200 times.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from veneer_proto.v1 import inference_pb2 as pb
from veneer_server.models.source import import_bundled

from tests.places import cache_dir
from tests.server_harness import Server, running_server

pytestmark = [pytest.mark.real_base, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "The capital of France is"

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "married": {"type": "boolean"},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
    },
    "required": ["name", "age", "married", "pets"],
    "additionalProperties": False,
}
WARM = {"temperature": 1.0, "top_p": 0.95}


def check_person(text: str) -> None:
    """The schema by hand, so that no library vouches for another."""
    found: dict[str, Any] = json.loads(text)
    assert list(found) == ["name", "age", "married", "pets"]
    assert isinstance(found["name"], str)
    assert 1 <= len(found["name"]) <= 12
    assert type(found["age"]) is int
    assert 0 <= found["age"] <= 120
    assert type(found["married"]) is bool
    assert len(found["pets"]) <= 3
    assert set(found["pets"]) <= {"cat", "dog"}


async def ask_for_people(server: Server, adapters: list[str], tries: int) -> int:
    """Valid answers of `tries` concurrent requests with seeds and adapters in turn."""
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="Describe a person.")])

    async def one(number: int) -> Any:
        return await server.generate(
            messages=chat,
            adapter=adapters[number % len(adapters)],
            sampling={**WARM, "seed": number} if number % 4 else {"temperature": 0},
            stopping={"max_tokens": 120, "ignore_eos": bool(number % 2)},
            constraint=pb.Constraint(json_schema=json.dumps(SCHEMA)),
        )

    valid = 0
    for answer in await asyncio.gather(*(one(number) for number in range(tries))):
        assert answer.finish_reason == pb.FINISH_REASON_STOP, answer.text
        check_person(answer.text)
        valid += 1
    return valid


@pytest.mark.push
async def test_json_is_valid_every_time_with_base_and_adapters(server: Server) -> None:
    assert await ask_for_people(server, ["", "rank-16", "mlp", "all-linear"], 24) == 24


async def test_constrained_and_free_rows_share_a_batch(server: Server) -> None:
    """The free one is as free as before; a cut JSON text says that it was cut."""
    free, word, number, cut = await asyncio.gather(
        server.generate(prompt=PROMPT),
        server.generate(
            prompt=PROMPT + " Paris. Paris is a",
            constraint=pb.Constraint(choice=pb.Choices(texts=["city", "village", "colour"])),
            output={"logprobs": True},
        ),
        server.generate(
            prompt="My number is",
            sampling={**WARM, "seed": 3},
            stopping={"max_tokens": 30},
            constraint=pb.Constraint(regex=r" [0-9]{3}-[0-9]{4}"),
        ),
        server.generate(
            prompt="JSON:",
            stopping={"max_tokens": 4},
            constraint=pb.Constraint(json_schema=json.dumps(SCHEMA)),
        ),
    )
    assert free.text.startswith(" Paris")
    assert word.text in ("city", "village", "colour")
    assert word.finish_reason == number.finish_reason == pb.FINISH_REASON_STOP
    assert re.fullmatch(r" [0-9]{3}-[0-9]{4}", number.text)
    assert cut.finish_reason == pb.FINISH_REASON_LENGTH
    assert cut.text.startswith("{")
    # Raw: of all tokens, though few were allowed.
    assert word.logprobs[0].logprob < -0.5


async def test_samples_differ_and_are_counted(server: Server) -> None:
    fields: dict[str, Any] = {
        "prompt": "My favourite animal is the",
        "adapter": "rank-4",
        "sampling": {"temperature": 1.5, "seed": 5},
        "stopping": {"max_tokens": 10, "ignore_eos": True},
        "output": {"n": 4},
    }
    whole = await server.generate(**fields)
    assert len({whole.text, *(other.text for other in whole.others)}) == 4
    assert [len(other.token_ids) for other in whole.others] == [10, 10, 10]
    assert whole.usage.completion_tokens == 40
    messages = await server.stream(**fields).rest()
    for index in range(4):
        own = [m for m in messages if m.index == index]
        assert len([token for m in own for token in m.token_ids]) == 10
        assert own[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert messages[-1].final.usage.completion_tokens == 40
    greedy = await server.generate(prompt=PROMPT, stopping={"max_tokens": 2}, output={"n": 4})
    assert {greedy.text, *(other.text for other in greedy.others)} == {" Paris."}


@pytest.mark.push
async def test_penalties_biases_and_min_p_do_what_they_say(server: Server) -> None:
    long = {"max_tokens": 40, "ignore_eos": True}
    prompt = "one two one two one two one two one"

    async def tokens(**sampling: Any) -> list[int]:
        answer = await server.generate(
            prompt=prompt, sampling={"temperature": 0, **sampling}, stopping=long
        )
        return list(answer.token_ids)

    plain, repetition, frequency, presence, banned, forced, hot = await asyncio.gather(
        tokens(),
        tokens(repetition_penalty=2.0),
        tokens(frequency_penalty=2.0),
        tokens(presence_penalty=2.0),
        tokens(logit_bias={}),
        tokens(logit_bias={17: 100.0}),
        tokens(temperature=5.0, min_p=1.0, seed=4),
    )
    assert banned == plain
    for penalised in (repetition, frequency):
        assert max(Counter(penalised).values()) < max(Counter(plain).values())
    assert presence != plain
    assert set(forced) == {17}
    assert hot[:12] == plain[:12]
    without = await tokens(logit_bias=dict.fromkeys(plain, -100.0))
    assert not set(without) & set(plain)


async def test_stop_tokens_and_top_logprobs(server: Server) -> None:
    output = {"logprobs": True, "top_logprobs": 4, "echo": True}
    answer = await server.generate(prompt=PROMPT, output=output)
    for entry in answer.logprobs:
        tops = [top.logprob for top in entry.top]
        assert len(tops) == 4
        assert tops == sorted(tops, reverse=True)
        assert entry.top[0].token_id == entry.token_id  # greedy
        assert entry.top[0].logprob == pytest.approx(entry.logprob, abs=1e-5)
        assert sum(math.exp(logprob) for logprob in tops) <= 1.0001
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens - 1
    for entry in answer.prompt_logprobs:
        assert len(entry.top) == 4
        assert entry.top[0].logprob >= entry.logprob - 1e-5
    # "The capital of France is Paris.", and two tokens that nobody expects.
    ids = [504, 3575, 282, 4649, 314, 7042, 30, 9999, 123]
    ranked = await server.generate(token_ids=ids, output={"prompt_logprobs": 20})
    for entry in ranked.prompt_logprobs:
        likeliest = [top.token_id for top in entry.top]
        tied = sum(top.logprob == entry.logprob for top in entry.top)
        if entry.token_id in likeliest:
            assert 0 <= entry.rank - 1 - likeliest.index(entry.token_id) < tied
        else:
            assert 20 < entry.rank <= 49152
    assert [entry.rank > 1000 for entry in ranked.prompt_logprobs][-3:] == [False, True, True]
    stop = answer.token_ids[1]
    stopped = await server.generate(
        prompt=PROMPT, stopping={"max_tokens": 8, "stop_token_ids": [stop]}
    )
    assert list(stopped.token_ids) == list(answer.token_ids[:2])
    assert stopped.finish_reason == pb.FINISH_REASON_STOP
    text = answer.text.removeprefix(PROMPT)
    assert text.startswith(stopped.text)
    assert len(stopped.text) < len(text)


async def _two_hundred(cache: Path) -> None:
    """With the base and the adapters named on the command line as NAME=FOLDER."""
    import_bundled(cache)
    with tempfile.TemporaryDirectory() as folder:
        async with running_server(Path(folder) / "data", cache, "--max-queue", "256") as server:
            names = [""]
            for argument in sys.argv[1:]:
                name, path = argument.split("=", 1)
                await server.push(Path(path), name)
                names.append(name)
            valid = await ask_for_people(server, names, 200)
            print(f"{valid} of 200 valid, with {['base', *names[1:]]}")


if __name__ == "__main__":
    asyncio.run(_two_hundred(cache_dir()))
