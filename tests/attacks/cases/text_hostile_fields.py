"""Hostile values in every field of every call, with the real engine."""

from __future__ import annotations

import time

import grpc
from google.protobuf.descriptor import MethodDescriptor
from veneer_proto.v1 import inference_pb2

from tests.attacks.case import Target
from tests.hostile.callers import grpc_outcome
from tests.hostile.wire import cases, good, methods

TITLE = "hostile values in every field of every call"

OUR_FAULT = ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED")
LEFT_OUT = ("UpdateBudgets", "SelfTest")
"""Calls that would do as requested: set the budgets to 0, or compute for a minute."""


def _least(method: MethodDescriptor) -> bytes:
    """Return a minimal request for a short answer; a longer one could fill the context."""
    if method.input_type.name != "GenerateRequest":
        return b""
    few = inference_pb2.StoppingOptions(max_tokens=2)
    return inference_pb2.GenerateRequest(stopping=few).SerializeToString()


async def attack(target: Target) -> list[str]:
    wrong: list[str] = []
    tried = [
        (method, case.name, [case.data])
        for method in methods()
        if method.name not in LEFT_OUT
        for base in (_least(method), good(method, target.adapter).SerializeToString())
        for case in cases(method.input_type, base)
    ]
    target.rng.shuffle(tried)
    ends = time.monotonic() + target.seconds
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        for method, name, messages in tried:
            if time.monotonic() >= ends:
                break
            kind = (
                "stream_unary"
                if method.client_streaming
                else "unary_stream"
                if method.server_streaming
                else "unary_unary"
            )
            path = f"/{method.containing_service.full_name}/{method.name}"
            said = await grpc_outcome(channel, path, messages, kind=kind)
            if said.startswith(OUR_FAULT) or (said != "OK" and " " not in said):
                wrong.append(f"{method.name} {name}: {said}")
    return wrong
