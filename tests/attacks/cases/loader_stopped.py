"""A loader process that hangs: requests that wait for it must not wait forever."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any, Final

import grpc
import psutil
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

from tests.attacks.case import Target

TITLE = "loader processes that are stopped (SIGSTOP)"

_MODULE: Final = "veneer_server.adapters.loader_process"
_LIMIT_S: Final = 90


async def attack(target: Target) -> list[str]:
    """A request for a cold adapter is still answered, or told to retry; a request to the base
    is answered at once."""
    port = int(target.grpc.rsplit(":", 1)[1])
    loaders = _loaders_of(port)
    if not loaders:
        return ["no loader process was found"]
    wrong: list[str] = []
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        await adapters.EvictAdapter(
            pb.EvictAdapterRequest(name=target.adapter, mode=pb.EVICT_MODE_DRAIN, unpin=True)
        )
        for pid in loaders:
            os.kill(pid, signal.SIGSTOP)
        request = inference_pb2.GenerateRequest(
            prompt="Hello", stopping=inference_pb2.StoppingOptions(max_tokens=2)
        )
        cold = inference_pb2.GenerateRequest()
        cold.CopyFrom(request)
        cold.adapter = target.adapter
        waiting = asyncio.create_task(_ask(inference, cold))
        base = await _ask(inference, request)
        if base is not None:
            wrong.append(f"the base beside it: {base.name}")
        code = await waiting
        if code not in (None, grpc.StatusCode.UNAVAILABLE):
            wrong.append(f"a cold request: {code.name}")
    return wrong


async def _ask(stub: Any, request: inference_pb2.GenerateRequest) -> grpc.StatusCode | None:
    """Send a request; return the error's status code, or None if it was answered."""
    try:
        await stub.Generate(request, timeout=_LIMIT_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


def _loaders_of(port: int) -> list[int]:
    """Return the loader processes of the server that listens on ``port``."""
    for process in psutil.process_iter():
        try:
            listens = any(
                each.status == psutil.CONN_LISTEN and each.laddr.port == port
                for each in process.net_connections("tcp")
            )
            if listens:
                return [
                    child.pid
                    for child in process.children(recursive=True)
                    if _MODULE in child.cmdline()
                ]
        except psutil.Error:
            continue
    return []
