"""HTTP at the ingress: forwards the OpenAI API to the engine that has the adapter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from ipaddress import ip_address
from typing import Any, Final

import aiohttp
from aiohttp import web
from veneer_registry.errors import VeneerError
from veneer_server.openai.errors import HttpError, http_failure
from yarl import URL

from veneer_ray.calls import NOT_BEGUN, UNFIT, lost
from veneer_ray.digests import Digests
from veneer_ray.replicas import EngineChoice, EngineReplicas
from veneer_ray.wanted import of_body

_MOST_BODY: Final = 32 << 20
"""Maximum bytes of a body. The servers have stricter limits for its parts."""
_MOST_HEADER: Final = 16 << 10
"""As at the servers' gRPC ports."""
_CHECK_S: Final = 5.0
_HOPS: Final = frozenset(
    (
        "connection",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "upgrade",
        "proxy-authenticate",
        "proxy-authorization",
        "transfer-encoding",
    )
)
"""Headers that apply to one connection and are not forwarded (RFC 9110, 7.6.1, 10.1.1)."""
_NOT_BEGUN: Final = frozenset(reason.lower() for reason in NOT_BEGUN)
_UNFIT: Final = frozenset(reason.lower() for reason in UNFIT)
"""Error codes of 503 answers."""


class Web:
    """Answers HTTP requests at the ingress. Belongs to one event loop.

    Args:
        replicas: the engines.
        grace_s: seconds that running requests may take to finish after `stop`.
    """

    def __init__(self, digests: Digests, replicas: EngineReplicas, grace_s: float) -> None:
        self._grace_s = grace_s
        self._digests = digests
        self._replicas = replicas
        self._runner: web.ServerRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self._port = 0
        self._host = ""

    async def start(self, host: str, port: int) -> None:
        """Listen; other ingresses may listen on the same port."""
        self._port = port
        here = host
        with suppress(ValueError):  # a name
            if ip_address(host).is_unspecified:
                here = "127.0.0.1"
        self._host = f"[{here}]" if ":" in here else here
        # A connection for each request: one that is reused may have been closed meanwhile, and
        # then it is not known whether the request has begun.
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CHECK_S),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
        )
        server = web.Server(
            self._answer,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=_MOST_HEADER,
            max_field_size=_MOST_HEADER,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=self._grace_s)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, reuse_port=True)
        await site.start()

    async def stop(self) -> None:
        """Accept nothing more; let running requests finish within the grace."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def not_ready(self) -> str:
        """Why the port does not answer; "" if it does."""
        url = f"http://{self._host}:{self._port}/v1/models"
        try:
            async with (
                asyncio.timeout(_CHECK_S),
                aiohttp.ClientSession() as session,
                session.get(url),
            ):
                return ""
        except (TimeoutError, aiohttp.ClientError) as error:
            return f"port {self._port} does not answer: {type(error).__name__}"

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            body = await _body(request)
            wanted = await of_body(_json(body), self._digests, tuple(request.headers.items()))
            while True:
                async with self._replicas.chosen(wanted) as engine:
                    response = await self._forward(request, body, engine)
                    if response is not None:
                        return response
        except (VeneerError, HttpError) as error:
            return _failure(error)

    async def _forward(
        self, request: web.BaseRequest, body: bytes, engine: EngineChoice
    ) -> web.StreamResponse | None:
        """Forward a request, and pass the answer's parts on as they arrive.

        Returns None if the request has not begun, so that it can go to another engine.
        """
        assert self._session is not None
        response: web.StreamResponse | None = None
        try:
            async with self._session.request(
                request.method,
                URL(f"http://{engine.http}{request.raw_path}", encoded=True),
                headers=[each for each in request.headers.items() if _kept(each[0])],
                data=BytesIO(body) if body else None,
                allow_redirects=False,
            ) as answer:
                parts: AsyncIterator[bytes] = answer.content.iter_any()
                if answer.status == 503:
                    whole = await answer.read()
                    if (code := _code(whole)) in _UNFIT:
                        self._replicas.failed(engine.replica)
                    if code in _NOT_BEGUN:
                        return None
                    parts = _one(whole)
                response = web.StreamResponse(status=answer.status, reason=answer.reason)
                response.headers["server"] = "veneer"  # not aiohttp and its version
                for name, value in answer.headers.items():
                    if _kept(name):
                        response.headers.add(name, value)
                with _caller_left():
                    await response.prepare(request)
                async for part in parts:
                    with _caller_left():
                        await response.write(part)
                with _caller_left():
                    await response.write_eof()
                return response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            self._replicas.failed(engine.replica)
            return None
        except aiohttp.ClientError:
            self._replicas.failed(engine.replica)
            if response is None:
                raise lost("the server handling this request has stopped") from None
            # So that the answer does not look complete.
            if request.transport is not None:
                request.transport.abort()
            return response


@contextmanager
def _caller_left() -> Iterator[None]:
    """Ends the request if its caller has closed the connection, which aiohttp reports with the
    same error as an engine that has."""
    try:
        yield
    except ConnectionError:
        raise asyncio.CancelledError from None


async def _one(part: bytes) -> AsyncIterator[bytes]:
    yield part


def _kept(header: str) -> bool:
    return header.lower() not in _HOPS


async def _body(request: web.BaseRequest) -> bytes:
    if request.headers.get("expect", "").lower() == "100-continue" and request.transport:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    parts, size = [], 0
    async for part in request.content.iter_any():
        size += len(part)
        if size > _MOST_BODY:
            raise HttpError(
                413, "request_too_large", f"the request has more than {_MOST_BODY} bytes"
            )
        parts.append(part)
    return b"".join(parts)


def _json(body: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):  # the engine says what is wrong
        found = json.loads(body) if body else {}
        if isinstance(found, dict):
            return found
    return {}


def _code(body: bytes) -> str:
    """The code of an error's body; "" if it has none."""
    error = _json(body).get("error")
    return str(error.get("code", "")) if isinstance(error, dict) else ""


def _failure(error: VeneerError | HttpError) -> web.Response:
    failure = http_failure(error)
    return web.json_response(
        dict(failure.body), status=failure.status, headers=dict(failure.headers)
    )
