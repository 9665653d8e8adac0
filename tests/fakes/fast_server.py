"""A FAKE server for the load tester: Veneer's generate calls and OpenAI's completions, as
fast as Python can answer, without a model. Run as a process:

    python -m tests.fakes.fast_server [--stall AT:FOR]

It prints ``{"grpc": "HOST:PORT", "http": "HOST:PORT"}``, serves until its standard input
closes, and then prints its counts: ``{"requests", "tokens", "prompt_tokens"}``. With
``--stall 2:1`` it stalls for one second, two seconds after the first request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator

import grpc
from aiohttp import web
from veneer_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

_OPENAI = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}


class FastServer(
    inference_pb2_grpc.InferenceServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
    server_pb2_grpc.ServerServiceServicer,
):
    """See the module docstring."""

    def __init__(self, stall: tuple[float, float]) -> None:
        self.counts: Counter[str] = Counter(requests=0, tokens=0, prompt_tokens=0)
        self._stall = stall
        self._first = 0.0

    async def _arrived(self, prompt_tokens: int) -> None:
        now = time.monotonic()
        self._first = self._first or now
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += prompt_tokens
        after, lasts = self._stall
        begin = self._first + after
        if begin <= now < begin + lasts:
            await asyncio.sleep(begin + lasts - now)

    async def GenerateStream(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        prompt_tokens = len(request.token_ids.ids)
        await self._arrived(prompt_tokens)
        wanted = request.stopping.max_tokens
        for number in range(wanted):
            self.counts["tokens"] += 1
            yield inference_pb2.GenerateStreamResponse(token_ids=[number])
        yield inference_pb2.GenerateStreamResponse(
            final=inference_pb2.GenerateStreamFinal(
                finish_reason=inference_pb2.FINISH_REASON_LENGTH,
                usage=inference_pb2.Usage(
                    prompt_tokens=prompt_tokens, completion_tokens=wanted
                ),
                provenance=inference_pb2.Provenance(
                    adapter=request.adapter, tier=inference_pb2.TIER_DEVICE
                ),
            )
        )

    async def GetServerInfo(  # noqa: N802
        self, request: server_pb2.GetServerInfoRequest, context: object
    ) -> server_pb2.GetServerInfoResponse:
        return server_pb2.GetServerInfoResponse(version="fake")

    async def GetAdapter(  # noqa: N802
        self, request: adapters_pb2.GetAdapterRequest, context: object
    ) -> adapters_pb2.GetAdapterResponse:
        return adapters_pb2.GetAdapterResponse(adapter=adapters_pb2.Adapter(name=request.name))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] == "nobody":
            refusal = {"error": {"message": "no such model", "code": "model_not_found"}}
            return web.json_response(refusal, status=404)
        if body["model"] == "strict" and (unknown := body.keys() - _OPENAI):
            # As OpenAI's own API does.
            refusal = {"error": {"message": f"unknown: {unknown}", "code": "unknown_parameter"}}
            return web.json_response(refusal, status=400)
        await self._arrived(len(body["prompt"]))
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        wanted = body["max_tokens"]
        for number in range(wanted):
            self.counts["tokens"] += 1
            last = "length" if number == wanted - 1 else None
            choice = {"index": 0, "text": f"{number} ", "finish_reason": last}
            await answer.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": wanted}
        end = json.dumps({"choices": [], "usage": usage}).encode()
        await answer.write(b"data: " + end + b"\n\ndata: [DONE]\n\n")
        return answer

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in ("a", "b", "strict")]})


async def serve(stall: tuple[float, float]) -> None:
    fake = FastServer(stall)
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(fake, server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(fake, server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    app = web.Application()
    app.router.add_post("/v1/completions", fake.completions)
    app.router.add_get("/v1/models", fake.models)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    http = runner.addresses[0][1]
    print(json.dumps({"grpc": f"127.0.0.1:{port}", "http": f"127.0.0.1:{http}"}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)
    await runner.cleanup()
    print(json.dumps(fake.counts), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stall", default="0:0")
    after, _, lasts = parser.parse_args().stall.partition(":")
    asyncio.run(serve((float(after), float(lasts))))
