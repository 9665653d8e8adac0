"""Clients generated in Go and TypeScript against a front process, on real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from veneer_proto.v1 import inference_pb2

from tests.places import REPOSITORY
from tests.unit.server.rpc.front_harness import Front, make_adapter, running, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUILT = REPOSITORY / ".cache" / "clients"


@dataclass(frozen=True)
class Language:
    """How a language's client is run, and how it spells the enumeration."""

    folder: str
    program: str
    runner: str
    finish: str

    def command(self) -> list[str]:
        """Skips the test if the client cannot be run here."""
        program = BUILT / self.folder / self.program
        if self.runner and shutil.which(self.runner) is None:
            pytest.skip(f"{self.runner} is not installed: the client cannot be run")
        if not program.exists():
            pytest.skip(f"the client is not built: run `make clients` ({self.folder})")
        sources = [
            *(REPOSITORY / "examples" / "clients" / self.folder).iterdir(),
            *(REPOSITORY / "proto").rglob("*.proto"),
        ]
        if max(each.stat().st_mtime for each in sources) > program.stat().st_mtime:
            pytest.skip("the client is older than its sources: run `make clients`")
        return [*([self.runner] if self.runner else []), str(program)]


GO = Language("go", "client", "", "FINISH_REASON_LENGTH")
TYPESCRIPT = Language("typescript", "dist/client.js", "node", "LENGTH")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(
    base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Front]:
    data = tmp_path_factory.mktemp("languages")
    async with running(base_folder, data / "cache", data) as front:
        yield front


async def run(command: list[str], *arguments: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *command,
        *arguments,
        env={"PATH": os.environ["PATH"], "VENEER_API_KEY": "for a server that asks for none"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.parametrize("language", [GO, TYPESCRIPT], ids=lambda each: each.folder)
async def test_a_generated_client(front: Front, tmp_path: Path, language: Language) -> None:
    command = language.command()
    front.engine.reset()
    # A whole answer, a stream, and the first token of the stream that is abandoned.
    front.engine.pace = asyncio.Semaphore(8 + 8 + 1)
    folder = make_adapter(tmp_path / "adapter")
    found = await run(command, front.addresses["grpc"], str(folder))
    await until(lambda: front.engine.in_flight == 0)
    assert front.engine.cancelled == 1
    front.engine.pace = None
    name = f"from-{language.folder}"
    ours = await front.inference.Generate(
        inference_pb2.GenerateRequest(
            adapter=name,
            prompt="The sea is",
            sampling=inference_pb2.SamplingOptions(temperature=0, seed=7),
            stopping=inference_pb2.StoppingOptions(max_tokens=8, ignore_eos=True),
            output=inference_pb2.OutputOptions(logprobs=True),
        )
    )
    assert ours.text
    assert found == {
        "base": "smollm2-135m",
        "revision": ours.provenance.revision,
        "text": ours.text,
        "streamed": ours.text,
        "finish": language.finish,
        "tokens": list(ours.token_ids),
        "logprobs": [score.logprob for score in ours.logprobs],
        "prompt_tokens": ours.usage.prompt_tokens,
        "completion_tokens": 8,
        "refused": {
            "code": "InvalidArgument",
            "reason": "INVALID_FIELD",
            "field": "sampling.top_p",
        },
        "abandoned": "Canceled",
    }
