"""A generate call is answered while other calls are reading the catalog."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from veneer_proto.v1 import adapters_pb2 as pb

from tests.unit.registry.held_query import HeldQuery
from tests.unit.server.rpc.front_harness import Front, make_adapter, prompt, running, upload

Call = Callable[[Front, Path], Any]


def list_adapters(front: Front, folder: Path) -> Any:
    return front.adapters.ListAdapters(pb.ListAdaptersRequest())


def get_upload(front: Front, folder: Path) -> Any:
    spec = next(iter(upload(folder, "chat"))).spec
    return front.adapters.GetUpload(pb.GetUploadRequest(spec=spec))


def push(front: Front, folder: Path) -> Any:
    return front.adapters.UploadAdapter(upload(folder, "chat"))


@pytest.mark.push
@pytest.mark.parametrize(
    ("call", "words"),
    [
        pytest.param(list_adapters, "CROSS JOIN revisions", id="ListAdapters"),
        pytest.param(get_upload, "FROM files", id="GetUpload"),
        pytest.param(push, "JOIN names", id="UploadAdapter"),
    ],
)
async def test_generate_answers_while_a_worker_reads(
    call: Call,
    words: str,
    base_folder: Path,
    front_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workers of uploads have a low priority: one that a busy machine does not let run
    may hold what it holds for long."""
    folder = make_adapter(tmp_path / "adapter")
    async with running(base_folder, front_cache, tmp_path / "front") as front:
        pushed = (await front.push(folder, "chat")).adapter
    held = HeldQuery(monkeypatch, words)
    async with running(base_folder, front_cache, tmp_path / "front") as front:
        other = asyncio.ensure_future(call(front, folder))
        try:
            await asyncio.to_thread(held.wait)
            answer = await front.inference.Generate(prompt(adapter="chat"))
            answered_meanwhile = not (held.gave_up or other.done())
        finally:
            held.let_go()
            await other
    # Out here, since a server is not stopped where the block raises.
    assert answered_meanwhile, "the call waited for what was held"
    assert answer.provenance.revision == pushed.revision
