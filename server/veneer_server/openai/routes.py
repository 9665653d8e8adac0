"""The HTTP paths: models, health, version, and the generate endpoints."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import Counter, Histogram
from starlette.routing import Route
from veneer_registry.errors import (
    InvalidField,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    VeneerError,
)

from veneer_server import __version__
from veneer_server.access.authenticate import Access, Credentials
from veneer_server.access.certificates import NOT_SHOWN
from veneer_server.access.methods import HTTP_PATHS, METHODS
from veneer_server.access.principal import ANYONE, PRINCIPAL
from veneer_server.errors import detail_for_log, internal_error
from veneer_server.logs import REQUEST_ID, get_logger
from veneer_server.openai.endpoints.core import Core
from veneer_server.openai.endpoints.lora import LoadEndpoint, UnloadEndpoint
from veneer_server.openai.endpoints.models import model_routes
from veneer_server.openai.endpoints.pause import pause_routes
from veneer_server.openai.endpoints.server_info import server_info_routes
from veneer_server.openai.endpoints.state import state_routes
from veneer_server.openai.endpoints.tokenize import DetokenizeEndpoint, TokenizeEndpoint
from veneer_server.openai.errors import PACED, HttpError, http_failure
from veneer_server.openai.generate import ChatEndpoint, CompletionEndpoint
from veneer_server.openai.http.asgi import (
    ABORT,
    CERTIFICATE,
    EARNED,
    Receive,
    Scope,
    Send,
    check_json,
)
from veneer_server.openai.http.cors import Cors
from veneer_server.openai.messages.endpoint import MessagesEndpoint
from veneer_server.openai.responses.endpoint import ResponsesEndpoint
from veneer_server.quotas.standing import rate_headers
from veneer_server.replication.asked import ASKED, Asked
from veneer_server.serving.who import CALLER
from veneer_server.system.hosts import AllowedHosts, foreign_page
from veneer_server.telemetry.tracing import INGRESS, Ingress

__all__ = ["Admission", "Edge", "make_app"]

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_GENERATE: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)
_REFUSALS: Final = (InvalidField, Unauthenticated, PermissionDenied, Unavailable)
"""Of a request, before it gets to its path."""
_MODEL: Final = "/v1/models/"
_NO_ANSWER: Final = 499
"""The status by which metrics know requests whose callers left."""
_SECONDS: Final = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Admission:
    """Who may call what.

    Attributes:
        cors: which pages of browsers may call.
        elsewhere: methods that only another port answers.
    """

    access: Access
    cors: Cors
    elsewhere: frozenset[str]


def make_app(core: Core, hosts: AllowedHosts, admission: Admission) -> Edge:
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
            Route("/v1/responses", ResponsesEndpoint(core), methods=["POST"]),
            Route("/v1/messages", MessagesEndpoint(core), methods=["POST"]),
            Route("/tokenize", TokenizeEndpoint(core), methods=["POST"]),
            Route("/detokenize", DetokenizeEndpoint(core), methods=["POST"]),
            Route("/v1/load_lora_adapter", LoadEndpoint(core), methods=["POST"]),
            Route("/v1/unload_lora_adapter", UnloadEndpoint(core), methods=["POST"]),
            *model_routes(core),
            *pause_routes(core),
            *state_routes(core),
            *server_info_routes(core),
        ],
    )
    _add_errors(app, core)
    return Edge(app, core, hosts, admission)


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

    def __init__(
        self, app: FastAPI, core: Core, hosts: AllowedHosts, admission: Admission
    ) -> None:
        self._app = app
        self._admission = admission
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
                "server's names: call it by its address, or start it with --allowed-hosts NAME",
            )

    async def _admit(
        self, scope: Scope, headers: Mapping[bytes, bytes]
    ) -> AbstractContextManager[None]:
        """Raises if the caller may not use the path; ends the block that it returns once the
        caller may not any more. Paths that are not listed do not exist."""
        verb, path = scope["method"], _listed(scope["path"])
        allowed = _methods_of(scope["path"])
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
        certificate = scope.get("state", {}).get(CERTIFICATE, NOT_SHOWN)
        credentials = Credentials.of_headers(text, certificate)
        access, elsewhere = self._admission.access, self._admission.elsewhere
        if not (access.asks and credentials.secret):
            self._check_page(verb, text)
        principal = await access.admit(f"{verb} {path}", credentials, elsewhere)
        if principal is not ANYONE:
            _earned(scope, principal.tenant)
        ASKED.set(Asked.of(text))
        if path in _GENERATE:  # an answer that has begun is not cut off
            return nullcontext()
        return access.while_admitted(f"{verb} {path}", credentials, elsewhere)

    def _check_page(self, verb: str, headers: Mapping[str, str]) -> None:
        """A browser sends a request for whatever page its user has open."""
        if foreign_page(verb, headers, self._admission.cors.allows):
            page = headers.get("origin", "another origin")
            raise HttpError(
                403,
                "origin_not_allowed",
                f"a web page of {page[:100]} may not call this server without a key: send one, "
                "or start the server with --cors-origin ORIGIN",
            )
        if verb == "POST" and ("origin" in headers or "sec-fetch-site" in headers):
            check_json(headers.get("content-type", ""))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        REQUEST_ID.set(request_id)
        host, port = scope.get("client") or ("", 0)
        CALLER.set(f"{host}:{port}")
        status = _NO_ANSWER

        async def tagged(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    *self._limits(scope),
                    *self._admission.cors.headers(headers),
                ]
            await send(message)

        try:
            self._check_host(headers.get(b"host"))
            if self._admission.cors.asks(scope["method"], headers):
                await self._preflight(scope["path"], headers)(scope, receive, tagged)
                return
            with await self._admit(scope, headers):
                await self._app(scope, receive, tagged)
        except (HttpError, *_REFUSALS) as error:
            reason = error.code if isinstance(error, HttpError) else error.reason
            if isinstance(error, VeneerError):
                self._failures.labels(reason).inc()
                self._audit.note(
                    f"{scope['method']} {_listed(scope['path'])}"[:200], CALLER.get(), error
                )
            why = {"reason": reason, **detail_for_log(error)}
            _log.often(reason, "call refused", method="http", **why)
            if not isinstance(error, Unavailable):  # that is not the caller's fault
                await self._pace.wait(CALLER.get())
            if status != _NO_ANSWER:  # a part of it has been sent
                scope["state"][ABORT]()
                return
            failure = http_failure(error)
            answer = JSONResponse(failure.body, failure.status, dict(failure.headers))
            await answer(scope, receive, tagged)
        except Exception as error:
            # The handler of _add_errors has answered; Starlette then re-raises.
            _log.error("request failed", error, path=scope["path"])
        finally:
            path = _listed(scope["path"])
            path = path if path in HTTP_PATHS else "other"
            self._requests.labels(path, str(status)).inc()
            if status < 400 and not self._admission.access.asks:
                _earned(scope, "")
            self._seconds.labels(path).observe(time.perf_counter() - started)

    def _preflight(self, path: str, headers: Mapping[bytes, bytes]) -> Response:
        answer = Response(status_code=204)
        answer.raw_headers += self._admission.cors.preflight(headers, _methods_of(path))
        return answer

    def _limits(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What is left of the caller's limits, for requests that count towards them."""
        if scope["path"] not in _GENERATE:
            return []
        found = rate_headers(self._quotas, PRINCIPAL.get().accounts)
        return [(name.encode(), value.encode()) for name, value in found]

    def malformed(self, error: HttpError) -> None:
        """Count a request that was not valid HTTP."""
        self._requests.labels("other", str(error.status)).inc()


def _earned(scope: Scope, tenant: str) -> None:
    """The connection's place is a caller's from now on."""
    if (earned := scope.get("state", {}).get(EARNED)) is not None:
        earned(tenant)


def _unknown_path(path: str) -> HttpError:
    known = ", ".join(sorted(HTTP_PATHS))
    return HttpError(404, "unknown_url", f"unknown path {path[:100]!r}: use {known}")


def _methods_of(path: str) -> list[str]:
    """The verbs that a path takes. Raises HttpError for a path that does not exist."""
    listed = _listed(path)
    found = [name.split()[0] for name in METHODS if name.endswith(f" {listed}")]
    if not found:
        raise _unknown_path(path)
    return found


def _listed(path: str) -> str:
    """The path by which `METHODS` and metrics know it."""
    return "/v1/models" if path.startswith(_MODEL) and path != _MODEL else path


def _request_id(given: bytes) -> str:
    """The caller's request id if it is usable, since proxies send odd ones; else a new one."""
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex
