"""The HTTP app: its routes, answers for paths that are not served, and its outermost layer."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
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
from veneer_server.access.authenticate import Credentials
from veneer_server.access.caller import Caller
from veneer_server.access.certificates import NOT_SHOWN
from veneer_server.access.methods import HTTP_PATHS, METHODS
from veneer_server.access.principal import ANYONE
from veneer_server.errors import internal_error
from veneer_server.logs import get_logger
from veneer_server.openai.core import ServingCore
from veneer_server.openai.errors import PACED, HttpError, http_failure
from veneer_server.openai.generate import ChatEndpoint, CompletionEndpoint
from veneer_server.openai.http.asgi import (
    ABORT,
    CERTIFICATE,
    CONTEXT,
    EARNED,
    MODEL,
    Receive,
    Scope,
    Send,
    check_json,
    context_of,
)
from veneer_server.openai.http.cors import Cors
from veneer_server.openai.json_endpoint import refuse
from veneer_server.openai.lora import LoadEndpoint, UnloadEndpoint
from veneer_server.openai.messages import CountEndpoint, MessagesEndpoint
from veneer_server.openai.models import model_routes
from veneer_server.openai.ollama import ollama_routes
from veneer_server.openai.responses import (
    ResponsesEndpoint,
    conversation_routes,
    response_routes,
)
from veneer_server.openai.server_state import pause_routes, server_info_routes, state_routes
from veneer_server.openai.tokens import DetokenizeEndpoint, TokenizeEndpoint, TokensEndpoint
from veneer_server.serving.gate import REQUEST_ID_FORM, CallContext
from veneer_server.system.hosts import AllowedHosts, foreign_page

# -------------------- not served
# Paths of other servers' APIs that are not served, each with its error message. The table grows
# by a line for each API that clients try.

_EMBEDDINGS: Final = "this server makes no embeddings: it generates text"
_FILES: Final = "this server keeps no files: send the text in the request itself"
_BATCHES: Final = (
    "this server has no batches: send the requests at once, they are computed together"
)
_TRAINING: Final = (
    "this server trains nothing: train an adapter with veneer-train, and publish it with "
    "`veneer adapter push`"
)
_AUDIO: Final = "this server neither reads nor makes audio: only text is served"
_IMAGES: Final = "this server neither reads nor makes images: only text is served"
_VIDEOS: Final = "this server neither reads nor makes videos: only text is served"
_REALTIME: Final = "this server has no realtime sessions: stream an answer with stream: true"
_ASSISTANTS: Final = (
    "this server has no assistants and no threads: send the conversation to "
    "/v1/chat/completions or /v1/responses"
)
_STORES: Final = "this server has no vector stores: put what was found into a message"
_EVALS: Final = "this server runs no evals: use `veneer-train eval`"
_SCORES: Final = (
    "this server does not rank, score, classify or pool texts: it generates text, with "
    "log-probabilities if asked for them"
)
_SLEEP: Final = "this server does not sleep: /pause?mode=keep lets no step run until /resume"
_MODELS: Final = (
    "models are not changed through this API: publish, delete and alias adapters with "
    "`veneer adapter`"
)

NOT_SERVED: Final[Mapping[str, str]] = {
    "/v1/embeddings": _EMBEDDINGS,
    "/embeddings": _EMBEDDINGS,
    "/v1/files": _FILES,
    "/v1/uploads": _FILES,
    "/v1/containers": _FILES,
    "/v1/batches": _BATCHES,
    "/v1/messages/batches": _BATCHES,
    "/v1/fine_tuning": _TRAINING,
    "/v1/fine-tunes": _TRAINING,
    "/v1/audio": _AUDIO,
    "/v1/images": _IMAGES,
    "/v1/videos": _VIDEOS,
    "/v1/realtime": _REALTIME,
    "/v1/moderations": "this server moderates nothing: use a model made for it",
    "/v1/assistants": _ASSISTANTS,
    "/v1/threads": _ASSISTANTS,
    "/v1/vector_stores": _STORES,
    "/v1/evals": _EVALS,
    "/v1/graders": _EVALS,
    "/rerank": _SCORES,
    "/v1/rerank": _SCORES,
    "/v2/rerank": _SCORES,
    "/score": _SCORES,
    "/v1/score": _SCORES,
    "/classify": _SCORES,
    "/v1/classify": _SCORES,
    "/pooling": _SCORES,
    "/v1/pooling": _SCORES,
    "/sleep": _SLEEP,
    "/wake_up": _SLEEP,
    "/is_sleeping": _SLEEP,
    "/api/embed": _EMBEDDINGS,
    "/api/embeddings": _EMBEDDINGS,
    "/api/pull": "this server pulls no models: publish an adapter with `veneer adapter push`",
    "/api/push": "this server pushes no models: download an adapter with `veneer adapter pull`",
    "/api/create": "this server makes no models: publish an adapter with `veneer adapter push`",
    "/api/copy": "this server copies no models: name a revision with `veneer adapter alias`",
    "/api/delete": _MODELS,
    "/api/blobs": _MODELS,
}
"""Error message by path, which also holds for all paths below it."""


def not_served(path: str) -> HttpError | None:
    """The error for a path in the table, or below one in it; None for any other path."""
    for known, why in NOT_SERVED.items():
        if path == known or path.startswith(f"{known}/"):
            return HttpError(404, "not_served", why)
    return None


_REFUSALS: Final = (InvalidField, Unauthenticated, PermissionDenied, Unavailable)
"""Errors that refuse a request before it reaches its endpoint."""
_MODEL: Final = "/v1/models/"
_DEPLOYMENT: Final = re.compile(
    r"/openai/deployments/([^/].*?)/((?:chat/)?completions|embeddings|(?:audio|images)/.*)",
    re.S,
)
_AZURE: Final = re.compile(r"/openai/(?:v1/)?(?!deployments/|(?:un)?load_lora)(.+)", re.S)
"""Leaves out the paths that change adapters: a proxy may keep callers from those."""
_STORED: Final = (
    (re.compile(r"/v1/responses/(?!input_tokens$)[^/]+"), "/v1/responses/{id}"),
    (re.compile(r"/v1/responses/[^/]+/input_items"), "/v1/responses/{id}/input_items"),
    (re.compile(r"/v1/conversations/[^/]+"), "/v1/conversations/{id}"),
    (re.compile(r"/v1/conversations/[^/]+/items"), "/v1/conversations/{id}/items"),
    (
        re.compile(r"/v1/conversations/[^/]+/items/[^/]+"),
        "/v1/conversations/{id}/items/{item}",
    ),
)
"""Paths with ids of stored objects, and their names in `METHODS`."""
_NO_ANSWER: Final = 499
"""The status in metrics of requests whose callers left."""
_SECONDS: Final = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)

_log = get_logger(__name__)


def make_app(core: ServingCore, hosts: AllowedHosts, cors: Cors) -> Edge:
    """The ASGI application. Args: cors: which web pages may call from a browser."""
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
            *response_routes(core),
            *conversation_routes(core),
            Route("/v1/messages", MessagesEndpoint(core), methods=["POST"]),
            Route("/v1/messages/count_tokens", CountEndpoint(core), methods=["POST"]),
            Route("/inference/v1/generate", TokensEndpoint(core), methods=["POST"]),
            Route("/tokenize", TokenizeEndpoint(core), methods=["POST"]),
            Route("/detokenize", DetokenizeEndpoint(core), methods=["POST"]),
            Route("/v1/load_lora_adapter", LoadEndpoint(core), methods=["POST"]),
            Route("/v1/unload_lora_adapter", UnloadEndpoint(core), methods=["POST"]),
            *model_routes(core),
            *pause_routes(core),
            *state_routes(core),
            *server_info_routes(core),
            *ollama_routes(core),
        ],
    )
    _add_errors(app, core)
    return Edge(app, core, hosts, cors)


def _add_errors(app: FastAPI, core: ServingCore) -> None:
    async def answer(request: Request, error: VeneerError | HttpError) -> JSONResponse:
        failure = http_failure(error, request.url.path)
        if failure.status in PACED:
            await core.gate.pace.wait(context_of(request.scope).caller.peer)
        return JSONResponse(failure.body, failure.status, dict(failure.headers))

    @app.exception_handler(VeneerError)
    async def refused(request: Request, error: VeneerError) -> JSONResponse:
        core.gate.failed(context_of(request.scope), error)
        return await answer(request, error)

    @app.exception_handler(HttpError)
    async def rejected(request: Request, error: HttpError) -> JSONResponse:
        return await answer(request, error)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        failure = internal_error(context_of(request.scope).caller.request_id)
        core.gate.count(failure)
        return await answer(request, failure)

    @app.exception_handler(404)
    async def unknown_path(request: Request, error: HTTPException) -> JSONResponse:
        # A path that `Edge` lists and no route matches: a model's name with a line break.
        return await answer(request, _unknown_path(request.url.path))


class Edge:
    """The outermost layer: request id, metrics, and an answer whatever happens inside."""

    def __init__(
        self, app: FastAPI, core: ServingCore, hosts: AllowedHosts, cors: Cors
    ) -> None:
        self._app = app
        self._gate = core.gate
        self._hosts = hosts
        self._cors = cors
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
        self, scope: Scope, context: CallContext, headers: Mapping[str, str]
    ) -> AbstractContextManager[None]:
        """Raise if the caller may not use the path. Returns a context manager that ends its
        block once the caller may no longer use it. Paths that are not listed do not exist."""
        verb = "GET" if scope["method"] == "HEAD" else scope["method"]
        allowed = _methods_of(scope["path"])
        if verb not in allowed:
            takes = ", ".join(sorted(allowed))
            raise HttpError(
                405,
                "method_not_allowed",
                f"{verb} is not allowed on {scope['path'][:100]}: use {takes}",
                {"allow": takes},
            )
        certificate = scope["state"].get(CERTIFICATE, NOT_SHOWN)
        credentials = Credentials.of_headers(headers, certificate)
        gate = self._gate
        if not (gate.access.asks and credentials.secret):
            self._check_page(verb, headers)
        admitted = await gate.admit(context, credentials)
        if context.caller.principal is not ANYONE:
            _earned(scope, context.caller.tenant)
        return admitted

    def _check_page(self, verb: str, headers: Mapping[str, str]) -> None:
        """Refuse requests of foreign web pages: a browser sends requests for any page that its
        user has open."""
        if foreign_page(verb, headers, self._cors.allows):
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
        _take_azures_path(scope)
        headers = dict(scope["headers"])
        text = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()
        }
        host, port = scope.get("client") or ("", 0)
        method = f"{scope['method']} {_listed(scope['path'])}"[:200]
        request_id = _request_id(text.get("x-request-id", ""))
        caller = Caller.arriving(method, f"{host}:{port}", request_id, text)
        self._gate.arrived(caller)
        context = scope.setdefault("state", {})[CONTEXT] = CallContext(caller)
        status = _NO_ANSWER

        async def tagged(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    *self._limits(context.caller),
                    *self._cors.headers(headers),
                ]
            await send(message)

        try:
            self._check_host(headers.get(b"host"))
            if self._cors.asks(scope["method"], headers):
                await self._preflight(scope["path"], headers)(scope, receive, tagged)
                return
            with await self._admit(scope, context, text):
                await self._app(scope, receive, tagged)
        except (HttpError, *_REFUSALS) as error:
            await refuse(self._gate, context, error, method="http")
            if status != _NO_ANSWER:  # a part of the answer has been sent
                scope["state"][ABORT]()
                return
            failure = http_failure(error, scope["path"])
            answer = JSONResponse(failure.body, failure.status, dict(failure.headers))
            await answer(scope, receive, tagged)
        except Exception as error:
            # The handler of _add_errors has answered; Starlette then re-raises.
            _log.error("request failed", error, path=scope["path"])
        finally:
            path = _listed(scope["path"])
            path = path if path in HTTP_PATHS else "other"
            self._requests.labels(path, str(status)).inc()
            if status < 400 and not self._gate.access.asks:
                _earned(scope, "")
            self._seconds.labels(path).observe(time.perf_counter() - started)

    def _preflight(self, path: str, headers: Mapping[bytes, bytes]) -> Response:
        answer = Response(status_code=204)
        answer.raw_headers += self._cors.preflight(headers, _methods_of(path))
        return answer

    def _limits(self, caller: Caller) -> list[tuple[bytes, bytes]]:
        """Headers with what is left of the caller's limits, for requests that count towards
        them."""
        return [(name.encode(), value.encode()) for name, value in self._gate.limits(caller)]

    def malformed(self, error: HttpError) -> None:
        """Count a request that was not valid HTTP."""
        self._requests.labels("other", str(error.status)).inc()


def _earned(scope: Scope, tenant: str) -> None:
    """Mark the connection's place as earned by a caller."""
    if (earned := scope.get("state", {}).get(EARNED)) is not None:
        earned(tenant)


def _take_azures_path(scope: Scope) -> None:
    """Rewrite Azure's paths to ours. A deployment's name in the path names the model."""
    if found := _DEPLOYMENT.fullmatch(scope["path"]):
        scope["path"] = f"/v1/{found[2]}"
        scope.setdefault("state", {})[MODEL] = found[1]
    elif found := _AZURE.fullmatch(scope["path"]):
        scope["path"] = f"/v1/{found[1]}"


def _unknown_path(path: str) -> HttpError:
    if (missing := not_served(path)) is not None:
        return missing
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
    """A path's name in `METHODS` and metrics."""
    if path.startswith(_MODEL) and path != _MODEL:
        return "/v1/models"
    return next((name for form, name in _STORED if form.fullmatch(path)), path)


def _request_id(given: str) -> str:
    """The caller's request id if it is usable, since proxies send odd ones; else a new one."""
    return given if REQUEST_ID_FORM.fullmatch(given) else uuid.uuid4().hex
