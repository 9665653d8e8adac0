"""Log-probabilities of whole prompts in every choice. For 3,000 tokens an answer had 69 MB, and
`/livez` waited for 8 s while it was written."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

from tests.attacks.case import Bug, Target
from tests.attacks.cases.text_long_prompts import post
from tests.hostile.callers import http_answer

TITLE = "log-probabilities of prompts and answers, with 20 likely tokens beside each, 16 times"

BUG = Bug(
    "veneer_server.serving.answer_room",
    "if self._whole > form.largest:",
    "if self._whole > 1 << 60:",
)

AT_ONCE = 4


def _within(rng: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    """Make a request of any shape that must be answered."""
    prompt = [rng.randrange(100, 20_000) for _ in range(rng.randrange(2, 60))]
    given: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": rng.randrange(1, 4),
    }
    given["n"] = rng.randrange(1, 17)
    given["stream"] = rng.random() < 0.3
    if given["stream"] or rng.random() < 0.5:
        given |= {"echo": True, "logprobs": rng.randrange(21)}
    else:
        given["prompt_logprobs"] = rng.randrange(21)
    given["return_token_ids"] = rng.random() < 0.3
    return "/v1/completions", given


def _beyond(rng: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    """Make a request that must be refused before any work."""
    n = rng.randrange(8, 17)
    if rng.random() < 0.5:
        given = {"prompt": "Hi", "logprobs": 20, "max_tokens": rng.randrange(7000, 8000)}
        return "/v1/completions", {"model": model, "n": n, "stream": True, **given}
    given = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
    given |= {"top_logprobs": rng.randrange(15, 21), "max_tokens": rng.randrange(6000, 8000)}
    return "/v1/chat/completions", {"model": model, "n": n, "stream": True, **given}


async def attack(target: Target) -> list[str]:
    wrong: list[str] = []

    async def one(path: str, given: dict[str, Any], wanted: tuple[int, ...]) -> None:
        try:
            async with asyncio.timeout(30):
                body = json.dumps(given).encode()
                status, answer = await http_answer(target.openai, post(body, path))
        except TimeoutError:
            wrong.append(f"{path}: no end after 30 s, wanted {wanted}")
            return
        if status not in wanted:
            wrong.append(f"{path}: {status} {answer[:200]!r}, wanted {wanted}")

    ends = time.monotonic() + target.seconds
    while True:
        model = target.adapter
        given = [(*_within(target.rng, model), (200, 429)) for _ in range(AT_ONCE)]
        given += [(*_beyond(target.rng, model), (400,)) for _ in range(2)]
        await asyncio.gather(*(one(*each) for each in given))
        if time.monotonic() >= ends or wrong:
            return sorted(set(wrong))
