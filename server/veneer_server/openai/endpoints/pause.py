"""``/pause``, ``/resume`` and ``/is_paused``, as vLLM has them."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route

from veneer_server.openai.endpoints.core import Core
from veneer_server.serving.checks import invalid
from veneer_server.serving.who import CALLER

__all__ = ["pause_routes"]


def pause_routes(core: Core) -> list[Route]:
    """The routes."""

    async def pause(request: Request) -> Response:
        """Only ``mode=keep``: nothing that has begun ends early. ``clear_cache`` has no effect
        with it in vLLM either."""
        with core.calls.running():
            if request.query_params.get("mode", "abort") != "keep":
                raise invalid(
                    "mode",
                    "must be keep: running requests are not aborted, they wait for /resume",
                )
            await core.engine.pause(True)
        core.audit.note("POST /pause", CALLER.get())
        return JSONResponse({"status": "paused"})

    async def resume(request: Request) -> Response:
        with core.calls.running():
            await core.engine.pause(False)
        core.audit.note("POST /resume", CALLER.get())
        return JSONResponse({"status": "resumed"})

    async def is_paused(request: Request) -> Response:
        with core.calls.running():
            return JSONResponse({"is_paused": core.engine.paused})

    return [
        Route("/pause", pause, methods=["POST"]),
        Route("/resume", resume, methods=["POST"]),
        Route("/is_paused", is_paused, methods=["GET"]),
    ]
