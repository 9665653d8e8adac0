"""The HTTP paths: models, health, version, and the generate endpoints."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import Counter, Histogram
from starlette.routing import Route
from veneer_registry.adapter import SHORT_REVISION
from veneer_registry.errors import (
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    VeneerError,
)
from veneer_registry.records import AdapterRecord

from veneer_server import __version__
from veneer_server.access.authenticate import Access, Credentials
from veneer_server.access.methods import METHODS
from veneer_server.access.principal import PRINCIPAL
from veneer_server.errors import detail_for_log, internal_error
from veneer_server.logs import REQUEST_ID, get_logger
from veneer_server.openai.errors import PACED, HttpError, http_failure
from veneer_server.openai.generate import ChatEndpoint, CompletionEndpoint, Core
from veneer_server.openai.http.asgi import ABORT, CERTIFICATE_NAMES, Receive, Scope, Send
from veneer_server.quotas.standing import rate_headers
from veneer_server.serving.calls import Phase
from veneer_server.serving.tenants.tenant import Tenant
from veneer_server.serving.tenants.visible import Visible
from veneer_server.serving.who import CALLER
from veneer_server.system.hosts import AllowedHosts
from veneer_server.telemetry.tracing import INGRESS, Ingress

__all__ = ["Edge", "make_app"]

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
PAGE: Final = 100
"""Adapters per page of the model list."""
_PATHS: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/version"}
)
_GENERATE: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
_SECONDS: Final = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)

_log = get_logger(__name__)


def make_app(core: Core, hosts: AllowedHosts, access: Access) -> Edge:
    """The ASGI application."""
    app = FastAPI(
        title="Veneer",
        version=__version__,
        # The docs pages would load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        routes=[
            Route("/v1/chat/completions", ChatEndpoint(core), methods=["POST"]),
            Route("/v1/completions", CompletionEndpoint(core), methods=["POST"]),
        ],
    )
    _add_models(app, core)
    _add_state(app, core)
    _add_errors(app, core)
    return Edge(app, core, hosts, access)


def _add_models(app: FastAPI, core: Core) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        with core.calls.running():
            home = await core.tenants.current()
            first, after = await asyncio.to_thread(_page, core, home, "")
        begin = b'{"object":"list","data":[' + b",".join([_dump(_base_model(core)), *first])
        if not after:
            return Response(begin + b"]}", media_type="application/json")
        return _ModelList(_pieces(core, home, begin, after), core.reader_limit_s)

    @app.get("/v1/models/{model:path}")
    async def get_model(model: str) -> JSONResponse:
        with core.calls.running():
            if model == core.base.name:
                return JSONResponse(_base_model(core))
            home = await core.tenants.current()
            visible = Visible(core.tenants)
            owner, record = await asyncio.to_thread(visible.get, home, model)
            return JSONResponse({**_adapter_model(core, home, owner, record), "id": model})


def _add_state(app: FastAPI, core: Core) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        phase = core.calls.phase
        up = phase is Phase.SERVING and core.engine.healthy
        state = "engine_failed" if phase is Phase.SERVING and not up else phase.value
        body = {"status": state}
        if phase is Phase.LOADING and (doing := core.calls.doing()):
            body["doing"] = doing
        return JSONResponse(body, 200 if up else 503)

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse({"version": __version__})


class _ModelList(StreamingResponse):
    """A long list, of which each reader holds a page at a time. A client that has not read it
    all within the limit is disconnected."""

    media_type = "application/json"

    def __init__(self, pieces: AsyncIterator[bytes], limit_s: float) -> None:
        super().__init__(pieces)
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            scope["state"][ABORT]()
            await asyncio.sleep(0)  # lets uvicorn notice, so that it logs no error


async def _pieces(core: Core, home: Tenant, begin: bytes, after: str) -> AsyncIterator[bytes]:
    """The list as JSON, page by page: thousands of adapters in one piece would stall every
    stream, and take megabytes for each slow reader."""
    yield begin
    while after:
        page, after = await asyncio.to_thread(_page, core, home, after)
        if page:
            yield b"," + b",".join(page)
    yield b"]}"


def _page(core: Core, home: Tenant, after: str) -> tuple[list[bytes], str]:
    """A page of adapters as JSON, and the last one's name; "" if no more can follow."""
    found = Visible(core.tenants).page(home, after=after, limit=PAGE)
    last = found[-1][1].ref.name if len(found) == PAGE else ""
    return [_dump(_adapter_model(core, home, *each)) for each in found], last


def _dump(model: Mapping[str, Any]) -> bytes:
    return json.dumps(model, ensure_ascii=False, separators=(",", ":")).encode()


def _base_model(core: Core) -> Mapping[str, Any]:
    name = core.base.name
    return {
        "id": name,
        "object": "model",
        "created": core.started,
        "owned_by": "veneer",
        "root": name,
        "parent": None,
        "max_model_len": core.engine.info.longest_sequence,
    }


def _adapter_model(
    core: Core, home: Tenant, owner: Tenant, record: AdapterRecord
) -> Mapping[str, Any]:
    ref = record.ref
    return {
        "id": ref.name,
        "object": "model",
        "created": int(record.created),
        "owned_by": "veneer" if owner is home else owner.name,
        "root": f"{ref.name}@{ref.revision[:SHORT_REVISION]}",
        "parent": core.base.name,
        "max_model_len": core.engine.info.longest_sequence,
        "revision": ref.revision,
        "weights_digest": ref.weights_digest,
        "rank": record.manifest.max_rank,
    }


def _add_errors(app: FastAPI, core: Core) -> None:
    async def answer(error: VeneerError | HttpError) -> JSONResponse:
        failure = http_failure(error)
        if failure.status in PACED:
            await core.pace.wait(CALLER.get())
        return JSONResponse(failure.body, failure.status, dict(failure.headers))

    @app.exception_handler(VeneerError)
    async def refused(request: Request, error: VeneerError) -> JSONResponse:
        core.audit.note(f"{request.method} {_listed(request.url.path)}", CALLER.get(), error)
        core.metrics.failures.labels(error.reason).inc()
        return await answer(error)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        failure = internal_error(REQUEST_ID.get())
        core.metrics.failures.labels(failure.reason).inc()
        return await answer(failure)

    @app.exception_handler(404)
    async def unknown_path(request: Request, error: HTTPException) -> JSONResponse:
        # A path that `Edge` lists and no route matches: a model's name with a line break.
        return await answer(_unknown_path(request.url.path))


class Edge:
    """The outermost layer: request id, metrics, and an answer whatever happens inside."""

    def __init__(self, app: FastAPI, core: Core, hosts: AllowedHosts, access: Access) -> None:
        self._app = app
        self._access = access
        self._audit = core.audit
        self._quotas = core.quotas
        self._hosts = hosts
        self._pace = core.pace
        self._failures = core.metrics.failures
        registry = core.metrics.registry
        self._requests = Counter(
            "veneer_http_requests_total",
            "HTTP requests.",
            ("path", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "veneer_http_request_seconds",
            "Duration of HTTP requests.",
            ("path",),
            registry=registry,
            buckets=_SECONDS,
        )

    def _check_host(self, host: bytes | None) -> None:
        if not self._hosts.allow(host):
            raise HttpError(
                403,
                "host_not_allowed",
                f"the Host {(host or b'').decode('latin-1')[:100]!r} is not one of this "
                "server's names: call it as localhost, or start it with --allowed-hosts and "
                "the name",
            )

    async def _admit(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Raises if the caller may not use the path. Paths that are not listed do not exist."""
        verb, path = scope["method"], _listed(scope["path"])
        allowed = [name.split()[0] for name in METHODS if name.endswith(f" {path}")]
        if not allowed:
            raise _unknown_path(scope["path"])
        verb = "GET" if verb == "HEAD" else verb
        if verb not in allowed:
            takes = ", ".join(sorted(allowed))
            raise HttpError(
                405,
                "method_not_allowed",
                f"{verb} is not allowed on {scope['path'][:100]}: use {takes}",
                {"allow": takes},
            )
        text = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()
        }
        INGRESS.set(Ingress.of(f"{verb} {path}", text))
        names = scope.get("state", {}).get(CERTIFICATE_NAMES, ())
        credentials = Credentials.of_headers(text, names)
        await self._access.admit(f"{verb} {path}", credentials)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        REQUEST_ID.set(request_id)
        host, port = scope.get("client") or ("", 0)
        CALLER.set(f"{host}:{port}")
        status = 499

        async def tagged(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    *self._limits(scope),
                ]
            await send(message)

        try:
            self._check_host(headers.get(b"host"))
            await self._admit(scope, headers)
            await self._app(scope, receive, tagged)
        except (HttpError, Unauthenticated, PermissionDenied, Unavailable) as error:
            reason = error.code if isinstance(error, HttpError) else error.reason
            if isinstance(error, VeneerError):
                self._failures.labels(reason).inc()
                self._audit.note(
                    f"{scope['method']} {_listed(scope['path'])}"[:200], CALLER.get(), error
                )
            _log.info("call refused", method="http", reason=reason, **detail_for_log(error))
            if not isinstance(error, Unavailable):  # that is not the caller's fault
                await self._pace.wait(CALLER.get())
            failure = http_failure(error)
            answer = JSONResponse(failure.body, failure.status, dict(failure.headers))
            await answer(scope, receive, tagged)
        except Exception as error:
            # The handler of _add_errors has answered; Starlette then re-raises.
            _log.error("request failed", error, path=scope["path"])
        finally:
            path = _listed(scope["path"])
            path = path if path in _PATHS else "other"
            self._requests.labels(path, str(status)).inc()
            self._seconds.labels(path).observe(time.perf_counter() - started)

    def _limits(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What is left of the caller's limits, for requests that count towards them."""
        if scope["path"] not in _GENERATE:
            return []
        found = rate_headers(self._quotas, PRINCIPAL.get().accounts)
        return [(name.encode(), value.encode()) for name, value in found]

    def malformed(self, error: HttpError) -> None:
        """Count a request that was not valid HTTP."""
        self._requests.labels("other", str(error.status)).inc()


def _unknown_path(path: str) -> HttpError:
    known = ", ".join(sorted(_PATHS))
    return HttpError(404, "unknown_url", f"unknown path {path[:100]!r}: use {known}")


def _listed(path: str) -> str:
    """The path by which `METHODS` and metrics know it."""
    return "/v1/models" if path.startswith("/v1/models/") else path


def _request_id(given: bytes) -> str:
    """The caller's request id if it is usable, since proxies send odd ones; else a new one."""
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex
