"""A follower passes changes on to its registry, but identifies callers differently."""

from __future__ import annotations

import time
from typing import Any

import grpc
from veneer_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    replication_pb2,
    replication_pb2_grpc,
)

from tests.attacks.case import KEYS as TENANTS
from tests.attacks.case import Bug, Target

TITLE = "a follower that takes callers for those of another tenant, or of none"
KEYS = True
BUG = Bug(
    "veneer_server.access.authenticate",
    "if credentials.passed_on and credentials.passed_on != principal.tenant:",
    "if False:",
)


async def attack(target: Target) -> list[str]:
    """The registry tells followers that it identifies callers, and refuses changes passed on
    for a tenant other than the caller's: the adapter that the follower tries to hide stays."""
    wrong: list[str] = []
    until = time.monotonic() + target.seconds
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        replication: Any = replication_pb2_grpc.ReplicationServiceStub(channel)
        call = replication.Follow(metadata=target.metadata("operator"))
        start = replication_pb2.FollowStart(follower="attack")
        await call.write(replication_pb2.FollowRequest(start=start))
        first = await call.read()
        call.cancel()
        if not first.begin.asks_callers:
            wrong.append("a follower is not told that callers need keys")
        changes = (
            adapters.DeleteAdapter,
            adapters.UpdateAdapter,
            adapters.GetHistory,
            adapters.GetUpload,
        )
        requests = (
            adapters_pb2.DeleteAdapterRequest(name=target.adapter),
            adapters_pb2.UpdateAdapterRequest(name=target.adapter, retain=1),
            adapters_pb2.GetHistoryRequest(),
            adapters_pb2.GetUploadRequest(spec=adapters_pb2.UploadSpec(name="x")),
        )
        while not wrong and time.monotonic() < until:
            which = target.rng.randrange(len(changes))
            key = target.rng.choice(("operator", "team-a", "team-b"))
            others = {"default", "team-a", "team-b", "nobody"} - {TENANTS[key][0]}
            passed_on = ("veneer-passed-on", target.rng.choice(sorted(others)))
            try:
                await changes[which](
                    requests[which], metadata=(*target.metadata(key), passed_on)
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
                    wrong.append(f"{key} for {passed_on[1]}: {error.code().name}")
            else:
                wrong.append(f"{key} passed on for {passed_on[1]} was let in")
        await adapters.GetAdapter(
            adapters_pb2.GetAdapterRequest(name=target.adapter),
            metadata=target.metadata("operator"),
        )
    return wrong
