"""Calls with two values of a header that identifies the caller: a proxy may have checked only
the other one."""

from __future__ import annotations

import asyncio
from typing import Final

import grpc
import httpx
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc

from tests.attacks.case import Bug, Target

TITLE = "two keys, tenants or users in one call"
KEYS = True
BUG = Bug(
    "veneer_server.rpc.interceptors",
    "if len(set(names)) < len(names):",
    "if False:",
)

_USERS: Final = (
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
)


async def attack(target: Target) -> list[str]:
    """The HTTP API must refuse each with 400, and the gRPC API with INVALID_ARGUMENT."""
    loop, wrong = asyncio.get_running_loop(), []
    until, rng = loop.time() + target.seconds, target.rng

    def twice() -> list[tuple[str, str]]:
        one, other = (target.keys[name] for name in rng.sample(sorted(target.keys), 2))
        me = ("authorization", f"Bearer {one}")
        comma = rng.choice((",", ", ", " , "))
        name = rng.choice(("veneer-tenant", "x-veneer-tenant", *_USERS))
        found = rng.choice(
            (
                [me, ("authorization", f"{rng.choice(('Bearer', 'bearer'))} {other}")],
                [me, me],
                [("authorization", f"Bearer {one}{comma}Bearer {other}")],
                [("x-api-key", one), ("x-api-key", other)],
                [("x-api-key", f"{one}{comma}{other}")],
                [me, (rng.choice(("x-api-key", "api-key")), other)],
                [("x-api-key", one), ("api-key", other)],
                [("api-key", one), ("api-key", other)],
                [me, (name, "team-a"), (name, rng.choice(("team-a", "team-b")))],
                [me, ("veneer-tenant", "team-a"), ("x-veneer-tenant", "team-b")],
            )
        )
        rng.shuffle(found)
        return found

    async with (
        httpx.AsyncClient(trust_env=False, timeout=60) as http,
        grpc.aio.insecure_channel(target.grpc) as channel,
    ):
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        while loop.time() < until:
            headers = twice()
            names = sorted(name for name, _ in headers)
            answer = await http.get(f"http://{target.openai}/v1/models", headers=headers)
            if answer.status_code != 400:
                wrong.append(f"HTTP with {names}: {answer.status_code}")
            try:
                await stub.ListAdapters(adapters_pb2.ListAdaptersRequest(), metadata=headers)  # type: ignore[misc]
                wrong.append(f"gRPC with {names}: OK")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    wrong.append(f"gRPC with {names}: {error.code().name}")
    return wrong
