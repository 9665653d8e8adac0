"""Callers that request a slow compilation and cancel at once, hundreds of times."""

from __future__ import annotations

import asyncio
import json

import grpc
from veneer_proto.v1 import inference_pb2 as pb

from tests.attacks.case import Target
from tests.attacks.constraint_calls import caller, until_the_end
from tests.attacks.hostile_constraints import Hostile

TITLE = "callers who leave while their constraint is compiled"


async def attack(target: Target) -> list[str]:
    """Cancelled compilations must not occupy a worker: a last request is answered as usual."""
    async with caller(target.grpc) as bad:

        async def leave() -> None:
            number = target.rng.randrange(50_000_001, 99_999_989, 2)
            schema = f'{{"type":"integer","multipleOf":{number}}}'
            constraint = pb.Constraint(json_schema=schema)
            call = bad.stub.Generate(pb.GenerateRequest(prompt="A:", constraint=constraint))
            await asyncio.sleep(target.rng.random() * 0.05)
            call.cancel()
            try:
                await call
            except (asyncio.CancelledError, grpc.aio.AioRpcError):
                return

        async def work() -> list[str]:
            await asyncio.gather(*(leave() for _ in range(50 if target.full else 10)))
            fresh = {"enum": [f"{target.rng.random()}" for _ in range(10)]}
            return [await bad.ask(Hostile("json_schema", json.dumps(fresh)))]

        return await until_the_end(target.seconds, work)
