"""A short form of ``python -m tests.response_fuzz``, with another seed each time."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest
from veneer_server.text.tokenizer import TextTokenizer

from tests.response_fuzz.check import check_responses, push_models
from tests.unit.server.openai.tool_kit import long_context
from tests.unit.server.rpc.front_harness import Front

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.push
async def test_random_requests_say_the_same_in_every_form(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    await push_models(front, tmp_path)
    seed = random.randrange(1 << 32)
    async with long_context(front):
        seen = await check_responses(front, http, tokenizer, seed, 120)
    assert {"completed", "incomplete", "message", "reasoning", "function_call"} <= set(seen)
