"""Tenants of a real server: their keys and their calls; and servers with planted bugs."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import grpc
from veneer_proto.v1 import inference_pb2 as pb
from veneer_server.access.edit_keys import add_key

from tests import server_harness
from tests.server_harness import Refusal, Stream, refusal


def make_keys(file: Path, *tenants: str) -> dict[str, Any]:
    """Write a keys file; return the metadata of calls, by tenant."""
    keys = {
        name: add_key(file, name=name, tenant=name, roles=["operator"], expires=None).key
        for name in tenants
    }
    return {name: (("authorization", f"Bearer {key}"),) for name, key in keys.items()}


@dataclass(slots=True)
class Call:
    """One call and how it ended.

    Attributes:
        first_s: seconds to its first token; None if it got none.
        total_s: seconds to its end.
        tokens: number of tokens that it got.
        ends: number of terminal statuses; there must be one.
    """

    first_s: float | None = None
    total_s: float = 0.0
    tokens: int = 0
    ends: int = 0
    refused: Refusal | None = None
    failed: str = ""


async def call(inference: Any, metadata: Any, request: pb.GenerateRequest) -> Call:
    """Make a call and read it to its end."""
    began, found = time.perf_counter(), Call()
    stream = Stream(inference.GenerateStream(request, metadata=metadata))
    try:
        first = await stream.first()
        found.first_s = time.perf_counter() - began
        messages = [first, *await stream.rest()]
        found.tokens = sum(len(message.token_ids) for message in messages)
        found.ends += sum(message.HasField("final") for message in messages)
    except grpc.aio.AioRpcError as error:
        found.ends += 1
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            found.refused = refusal(error)
        else:
            found.failed = f"{error.code().name}: {error.details()}"
    except StopAsyncIteration:
        found.failed = "ended without a message"
    found.total_s = time.perf_counter() - began
    return found


@contextmanager
def edited_server(edit: str, folder: Path) -> Iterator[None]:
    """While the block runs, make `running_server` start a server whose front process first runs
    ``edit``, which plants a bug.

    Args:
        folder: folder for the command that replaces ``veneer-server``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = folder / "veneer-server"
    command.write_text(
        f"#!{sys.executable}\n{edit}\nfrom veneer_server.__main__ import main\nmain()\n"
    )
    command.chmod(0o755)
    beside = SimpleNamespace(executable=str(folder / "python"))
    with patch.object(server_harness, "sys", beside):
        yield


async def at_rate(
    rate: float, seconds: float, make: Any, done: list[Call], open_calls: set[asyncio.Task[Any]]
) -> int:
    """Start calls at a rate, whether earlier ones have ended or not; return how many."""
    began, count = time.monotonic(), 0
    while (now := time.monotonic() - began) < seconds:
        while count <= now * rate:
            task = asyncio.create_task(make(count))
            open_calls.add(task)
            task.add_done_callback(
                lambda ended: (open_calls.discard(ended), done.append(ended.result()))
            )
            count += 1
        await asyncio.sleep(1 / rate / 2)
    return count
