"""A real server with ``--int8-activations``, on the real base with an example adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from veneer_proto.v1 import adapters_pb2, server_pb2
from veneer_server.serving.self_test import BOUNDS

from tests.backends_ran import native_possible
from tests.places import REPOSITORY
from tests.server_harness import running_server

pytestmark = [
    pytest.mark.verify,
    pytest.mark.real_base,
    pytest.mark.skipif(not native_possible(), reason="no AVX2 or no compiler"),
]

CODE = REPOSITORY / "examples" / "adapters" / "code"
PROMPT = "Write a function that sorts words by length, and one that counts them."


async def scores(server: Any, adapter: str) -> list[float]:
    answer = await server.generate(
        prompt=PROMPT,
        adapter=adapter,
        stopping={"max_tokens": 1},
        output={"echo": True, "logprobs": True},
    )
    return [each.logprob for each in answer.prompt_logprobs]


async def test_answers_are_rounded_and_still_those_of_the_files(
    cache_dir: Path, tmp_path: Path
) -> None:
    found = {}
    for flags in ((), ("--int8-activations",)):
        data = tmp_path / f"data{len(flags)}"
        async with running_server(data, cache_dir, "--backend", "native", *flags) as server:
            await server.push(CODE, "code")
            request = adapters_pb2.SelfTestRequest(adapters=["code"])
            answer = await server.adapters.SelfTest(request)
            assert answer.passed, answer
            info = await server.about.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert info.backend.startswith("native (")
            assert (", int8 activations" in info.backend) == bool(flags)
            bound = BOUNDS["int8" if flags else "bfloat16"]
            assert {result.bound for result in answer.results} == {bound}
            found[flags] = [await scores(server, name) for name in ("", "code")]
    for plain, rounded in zip(*found.values(), strict=True):
        assert len(plain) > 10
        # Of the head alone it would be a few hundredths.
        apart = sum(abs(a - b) for a, b in zip(plain, rounded, strict=True)) / len(plain)
        assert 0.03 < apart < 0.5
