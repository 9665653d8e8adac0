"""Endpoints about the server: health, load, version, metrics, server info and pausing."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route
from veneer_registry.errors import QueueFull

from veneer_server import __version__
from veneer_server.openai.core import ServingCore
from veneer_server.openai.http.asgi import context_of
from veneer_server.openai.json_endpoint import LongAnswer, in_pieces
from veneer_server.serving.checks import invalid
from veneer_server.serving.generation import Phase


def state_routes(core: ServingCore) -> list[Route]:
    """The routes. None of them waits for the base to be loaded."""

    async def health(request: Request) -> Response:
        phase = core.calls.phase
        up = phase is Phase.SERVING and core.engine.healthy
        state = "engine_failed" if phase is Phase.SERVING and not up else phase.value
        body = {"status": state}
        if phase is Phase.LOADING and (doing := core.calls.doing()):
            body["doing"] = doing
        return JSONResponse(body, 200 if up else 503)

    async def livez(request: Request) -> Response:
        """200 as long as this process answers: a restart would not help one that loads, or
        whose engine restarts."""
        return JSONResponse({"status": "alive"})

    async def load(request: Request) -> Response:
        """The number of sequences that run or wait, from both ports."""
        taken = 0 if core.loaded is None else core.engine.places.taken
        return JSONResponse({"server_load": taken})

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def metrics(request: Request) -> Response:
        asked = request.headers
        page = await core.pages.page(
            request.url.query, asked.get("accept", ""), asked.get("accept-encoding", "")
        )
        if page is None:
            raise QueueFull(
                "too many scrapes of single series are queued: retry", retry_after_s=1.0
            )
        headers = {**dict(page.headers), "content-length": str(len(page.body))}
        return LongAnswer(in_pieces(page.body), core.reader_limit_s, headers)

    return [
        Route("/health", health, methods=["GET"]),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/livez", livez, methods=["GET"]),
        Route("/load", load, methods=["GET"]),
        Route("/version", version, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]


# -------------------- server info
# ``/server_info``, ``/get_world_size`` and ``/tokenizer_info``, as in vLLM.
#
# TRL's clients read the first to learn whether adapters can be loaded. It has only the members
# that they read, not all of vLLM's, and nothing about the machine.

MAX_LORA_RANK: Final = 512
"""vLLM's largest. This server itself has no largest rank: larger ones can be uploaded."""


def server_info_routes(core: ServingCore) -> list[Route]:
    """The routes about the server's configuration."""

    async def server_info(request: Request) -> Response:
        with core.calls.running():
            info = core.engine.info
            lora = None
            if core.local.roots:
                # As many adapters run at once as sequences.
                most = core.engine.places.capacity
                lora = {"max_lora_rank": MAX_LORA_RANK, "max_loras": most}
            config = {
                "model_config": {
                    "model": core.base.name,
                    "max_model_len": info.longest_sequence,
                    # Log-probabilities are those before temperature and the like.
                    "logprobs_mode": "raw_logprobs",
                },
                "parallel_config": {
                    "data_parallel_size": 1,
                    "tensor_parallel_size": core.engine.tensor_parallel,
                },
                "lora_config": lora,
                "weight_transfer_config": None,
            }
            return JSONResponse({"vllm_config": config})

    async def world_size(request: Request) -> Response:
        """The number of cards that compute together."""
        with core.calls.running():
            return JSONResponse({"world_size": core.engine.tensor_parallel})

    async def tokenizer_info(request: Request) -> Response:
        with core.calls.running():
            told = await asyncio.to_thread(core.generator.prompts.tokenizer_config)
        kind = {"content-type": "application/json"}
        return LongAnswer(in_pieces(told), core.reader_limit_s, kind)

    return [
        Route("/server_info", server_info, methods=["GET"]),
        Route("/get_world_size", world_size, methods=["GET"]),
        Route("/tokenizer_info", tokenizer_info, methods=["GET"]),
    ]


# -------------------- pause
# ``/pause``, ``/resume``, ``/is_paused`` and ``/reset_prefix_cache``, as in vLLM.


def pause_routes(core: ServingCore) -> list[Route]:
    """The routes that pause the engine and reset its prefix cache."""

    async def pause(request: Request) -> Response:
        """Takes only ``mode=keep``: running requests are not aborted. ``clear_cache`` has no
        effect in this mode, in vLLM either."""
        with core.calls.running():
            if request.query_params.get("mode", "abort") != "keep":
                raise invalid(
                    "mode",
                    "must be keep: running requests are not aborted, they wait for /resume",
                )
            await core.engine.pause(True)
        core.gate.answered(context_of(request.scope))
        return JSONResponse({"status": "paused"})

    async def resume(request: Request) -> Response:
        with core.calls.running():
            await core.engine.pause(False)
        core.gate.answered(context_of(request.scope))
        return JSONResponse({"status": "resumed"})

    async def is_paused(request: Request) -> Response:
        with core.calls.running():
            return JSONResponse({"is_paused": core.engine.paused})

    async def reset_prefix_cache(request: Request) -> Response:
        """Unlike in vLLM, this never fails: running requests keep the blocks that they use, but
        no other request finds them any more. So ``reset_running_requests`` has no effect.
        Neither has ``reset_external``, as there is no other cache."""
        with core.calls.running():
            await core.engine.reset_prefix_cache()
        core.gate.answered(context_of(request.scope))
        return JSONResponse({"success": True})

    return [
        Route("/pause", pause, methods=["POST"]),
        Route("/resume", resume, methods=["POST"]),
        Route("/is_paused", is_paused, methods=["GET"]),
        Route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"]),
    ]
