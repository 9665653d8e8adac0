"""The roles that each method of each port requires. A method that is not listed is refused.

docs/security.md shows this table, and the tests call every method as every kind of caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from veneer_server.access.principal import ROLES, Role

OPEN: Final[frozenset[Role]] = frozenset()
"""Roles of a method that anybody may call, even without a credential."""

_ANY: Final[frozenset[Role]] = frozenset(ROLES)
"""Roles of a method that anybody with a credential may call."""

_CALLERS: Final[frozenset[Role]] = frozenset({"inference"})
_READERS: Final[frozenset[Role]] = frozenset({"inference", "publisher"})
_PUBLISHERS: Final[frozenset[Role]] = frozenset({"publisher"})
_ADMINS: Final[frozenset[Role]] = frozenset({"admin"})
_OPERATORS: Final[frozenset[Role]] = frozenset({"operator"})
_SCRAPERS: Final[frozenset[Role]] = frozenset({"metrics"})

SCRAPE: Final = "scrape"
"""The method for any path of the metrics port."""

_GRPC: Final[Mapping[str, Mapping[str, frozenset[Role]]]] = {
    "veneer.v1.InferenceService": {
        "Generate": _CALLERS,
        "GenerateStream": _CALLERS,
    },
    "veneer.v1.AdapterService": {
        "UploadAdapter": _PUBLISHERS,
        "GetUpload": _PUBLISHERS,
        "RegisterAdapter": _PUBLISHERS,
        "DownloadAdapter": _PUBLISHERS,
        "GetAdapter": _READERS,
        "ListAdapters": _READERS,
        "ActivateAdapter": _PUBLISHERS,
        "EvictAdapter": _ADMINS,
        "DeleteAdapter": _ADMINS,
        "SetAlias": _PUBLISHERS,
        "ListAliases": _READERS,
        "WatchAdapters": _READERS,
        "UpdateAdapter": _ADMINS,
        "GetHistory": _READERS,
        "UpdateBudgets": _OPERATORS,
        "SelfTest": _OPERATORS,
    },
    "veneer.v1.ServerService": {
        "GetServerInfo": _ANY,
        "PlanCapacity": _ANY,
        "GetUsage": _ADMINS,
    },
    "veneer.v1.ReplicationService": {
        "Follow": _OPERATORS,
        "FetchWeights": _OPERATORS,
    },
    "grpc.health.v1.Health": {"Check": OPEN, "Watch": OPEN, "List": OPEN},
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo": _ANY},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _ANY},
}

_HTTP: Final[Mapping[str, frozenset[Role]]] = {
    "POST /v1/chat/completions": _CALLERS,
    "POST /v1/completions": _CALLERS,
    "POST /v1/responses": _CALLERS,
    "POST /v1/responses/input_tokens": _CALLERS,
    "GET /v1/responses/{id}": _CALLERS,
    "DELETE /v1/responses/{id}": _CALLERS,
    "GET /v1/responses/{id}/input_items": _CALLERS,
    "POST /v1/conversations": _CALLERS,
    "GET /v1/conversations/{id}": _CALLERS,
    "POST /v1/conversations/{id}": _CALLERS,
    "DELETE /v1/conversations/{id}": _CALLERS,
    "GET /v1/conversations/{id}/items": _CALLERS,
    "POST /v1/conversations/{id}/items": _CALLERS,
    "GET /v1/conversations/{id}/items/{item}": _CALLERS,
    "DELETE /v1/conversations/{id}/items/{item}": _CALLERS,
    "POST /v1/messages": _CALLERS,
    "POST /v1/messages/count_tokens": _CALLERS,
    "POST /inference/v1/generate": _CALLERS,
    "POST /api/chat": _CALLERS,
    "POST /api/generate": _CALLERS,
    "POST /api/show": _READERS,
    "GET /api/tags": _READERS,
    "GET /api/ps": _READERS,
    "GET /api/version": _ANY,
    "POST /tokenize": _CALLERS,
    "POST /detokenize": _CALLERS,
    "GET /v1/models": _READERS,
    "POST /v1/load_lora_adapter": _PUBLISHERS,
    "POST /v1/unload_lora_adapter": _PUBLISHERS,
    "POST /pause": _OPERATORS,
    "POST /resume": _OPERATORS,
    "POST /reset_prefix_cache": _OPERATORS,
    "GET /is_paused": _ANY,
    "GET /load": _ANY,
    "GET /version": _ANY,
    "GET /server_info": _ANY,
    "GET /get_world_size": _ANY,
    "GET /tokenizer_info": _READERS,
    "GET /metrics": _SCRAPERS,
    "GET /": OPEN,
    "GET /health": OPEN,
    "GET /livez": OPEN,
    "GET /ping": OPEN,
    "POST /ping": OPEN,
}

HTTP_PATHS: Final = frozenset(name.split()[1] for name in _HTTP)
"""Paths of the HTTP gateway."""

METHODS: Final[Mapping[str, frozenset[Role]]] = MappingProxyType(
    {
        **{
            f"/{service}/{name}": roles
            for service, methods in _GRPC.items()
            for name, roles in methods.items()
        },
        **_HTTP,
        SCRAPE: _SCRAPERS,
    }
)
"""The roles of each method, by gRPC path (``/service/method``), or HTTP verb and path. A caller
needs one of them."""


_READING: Final = ("/GetUsage", "/Follow", "/FetchWeights")
"""Methods that require a high role only because of the data that they return."""

AUDITED: Final = frozenset(
    name
    for name, roles in METHODS.items()
    if roles in (_PUBLISHERS, _ADMINS, _OPERATORS) and not name.endswith(_READING)
)
"""Methods that change something: each call is in the audit log."""

GENERATES: Final = frozenset(
    (
        "/veneer.v1.InferenceService/Generate",
        "/veneer.v1.InferenceService/GenerateStream",
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "POST /v1/messages",
        "POST /inference/v1/generate",
        "POST /api/chat",
        "POST /api/generate",
    )
)
"""Methods that generate: they count towards their caller's limits, and an answer that has begun
is not cut off."""

ADMIN: Final = frozenset(
    name for name, roles in METHODS.items() if roles in (_PUBLISHERS, _ADMINS, _OPERATORS)
)
"""Methods that only the port of ``--admin-listen`` answers, if there is one."""


def roles_for(method: str) -> frozenset[Role] | None:
    """Return the roles of which a caller needs one; None if the method is not listed. ``HEAD``
    requires the same roles as ``GET``."""
    method = f"GET{method[4:]}" if method.startswith("HEAD ") else method
    return METHODS.get(method)
