"""HTTP at the ingress: forwards the OpenAI API to the replica that has the adapter."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from veneer_registry.errors import VeneerError
from veneer_server.openai.errors import HttpError, http_failure

from veneer_ray.calls import CallEnded, Head, HttpCall, lost
from veneer_ray.routing.digests import Digests
from veneer_ray.routing.wanted import of_body

_MOST_BODY: Final = 32 << 20
"""Maximum bytes of a body. The servers have stricter limits for its parts."""

Ask = Callable[[str, HttpCall], AsyncIterator[Any]]


class Web:
    """Answers HTTP requests at the ingress.

    Args:
        ask: sends a call to the engine that is chosen for it.
    """

    def __init__(self, digests: Digests, ask: Ask) -> None:
        self._digests = digests
        self._ask = ask

    async def answer(self, request: Request) -> Response:
        """Forward a whole request, and stream the answer's parts as they arrive."""
        try:
            body = await _body(request)
        except HttpError as error:
            return _failure(error)
        headers = tuple(request.headers.items())
        wanted = await of_body(_json(body), self._digests, headers)
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        call = HttpCall(wanted, request.method, target, headers, body)
        items = self._ask("http", call)
        async for item in items:
            match item:
                case Head(status, kept):
                    response = StreamingResponse(_parts(items), status)
                    response.raw_headers = [
                        (key.lower().encode("latin-1"), value.encode("latin-1"))
                        for key, value in kept
                        if key.lower() != "x-request-id"  # Serve sets the same
                    ]
                    return response
                case CallEnded():
                    break
        return _failure(lost("the replica handling this request has stopped"))


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _MOST_BODY:
            raise HttpError(
                413, "request_too_large", f"the request has more than {_MOST_BODY} bytes"
            )
        parts.append(part)
    return b"".join(parts)


async def _parts(items: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """Yield the rest of an answer's body; raise if it breaks off, so that it does not look
    complete."""
    async for item in items:
        if isinstance(item, bytes):
            yield item
        elif isinstance(item, CallEnded) and item.code:
            raise ConnectionAbortedError(item.message)


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return {}  # the engine says what is wrong
    return found if isinstance(found, dict) else {}


def _failure(error: VeneerError | HttpError) -> Response:
    failure = http_failure(error)
    return JSONResponse(dict(failure.body), failure.status, dict(failure.headers))
