"""A tenant shares adapters under names that another tenant's callers use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from veneer_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

from tests.attacks.case import Bug, Target
from tests.server_harness import read_files, upload_messages

TITLE = "shared adapters under names that another tenant's callers use"
KEYS = True
BUG = Bug(
    "veneer_server.serving.visible",
    "accepts = self._tenants.accepts(home.name)",
    "accepts = [each.name for each in self._tenants.all]",
)
_ADAPTER = Path(__file__).parents[3] / "examples" / "adapters" / "chat"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


async def attack(target: Target) -> list[str]:
    """The other tenant's calls get NOT_FOUND with the name TENANT/name, which works."""
    wrong: list[str] = []
    until = time.monotonic() + target.seconds
    files = read_files(_ADAPTER)
    planter, victim = target.metadata("team-a"), target.metadata("inference-b")
    async with (
        grpc.aio.insecure_channel(target.grpc) as channel,
        aiohttp.ClientSession(headers=dict(victim)) as session,
    ):
        adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        while not wrong and time.monotonic() < until:
            size = target.rng.randint(1, 63)
            name = "".join(target.rng.choices(_ALPHABET, k=size))
            sent = upload_messages(files, name, allow_replace=True)
            await adapters.UploadAdapter(sent, metadata=planter)
            sharing = adapters_pb2.UpdateAdapterRequest(name=name, shared=True)
            await adapters.UpdateAdapter(sharing, metadata=planter)
            request = inference_pb2.GenerateRequest(prompt="a", adapter=name)
            request.stopping.max_tokens = 1
            try:
                await inference.Generate(request, metadata=victim)
                wrong.append(f"{name}: answered with the planter's weights")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    wrong.append(f"{name}: {error.code().name}")
                if f"team-a/{name}" not in str(error.details()):
                    wrong.append(f"{name}: the error does not say team-a/{name}")
            body = {"model": name, "prompt": "a", "max_tokens": 1}
            url = f"http://{target.openai}/v1"
            async with session.post(f"{url}/completions", json=body) as answer:
                if answer.status != 404:
                    wrong.append(f"{name} over HTTP: {answer.status}")
            async with session.get(f"{url}/models") as answer:
                ids = {model["id"] for model in (await answer.json())["data"]}
            if name in ids or f"team-a/{name}" not in ids:
                wrong.append(f"{name}: listed as {sorted(ids)[:5]}")
            request.adapter = f"team-a/{name}"
            await inference.Generate(request, metadata=victim)
            gone = adapters_pb2.DeleteAdapterRequest(name=name)
            await adapters.DeleteAdapter(gone, metadata=planter)
    return wrong
