"""What the server is and does: health, load, version and metrics."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route
from veneer_registry.errors import QueueFull

from veneer_server import __version__
from veneer_server.openai.endpoints.core import Core
from veneer_server.openai.endpoints.streams import LongAnswer, in_pieces
from veneer_server.serving.calls import Phase

__all__ = ["state_routes"]


def state_routes(core: Core) -> list[Route]:
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
        """Sequences that run or wait, over both ports."""
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
