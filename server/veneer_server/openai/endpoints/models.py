"""``GET /v1/models``: the base, adapters, and their aliases."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route
from veneer_registry.adapter import SHORT_REVISION
from veneer_registry.errors import AdapterCorrupt, AdapterNotFound
from veneer_registry.rows import AliasRow

from veneer_server.openai.endpoints.core import Core
from veneer_server.openai.endpoints.streams import LongAnswer
from veneer_server.serving.tenants.tenant import Tenant
from veneer_server.serving.tenants.visible import Seen, Visible

__all__ = ["model_routes"]

PAGE: Final = 100
"""Adapters per page of the model list."""

_JSON: Final = {"content-type": "application/json"}

Json = dict[str, Any]


def model_routes(core: Core) -> list[Route]:
    """The routes of the list, and of one model."""

    async def list_models(request: Request) -> Response:
        with core.calls.running():
            home = await core.tenants.current()
            first, after = await asyncio.to_thread(_page, core, home, "")
        begin = b'{"object":"list","data":[' + b",".join([_dump(_base_model(core)), *first])
        if not after:
            return Response(begin + b"]}", media_type="application/json")
        return LongAnswer(_pieces(core, home, begin, after), core.reader_limit_s, _JSON)

    async def get_model(request: Request) -> Response:
        model = request.path_params["model"]
        with core.calls.running():
            if model == core.base.name:
                return JSONResponse(_base_model(core))
            home = await core.tenants.current()
            found = await asyncio.to_thread(_named, core, home, model)
            return JSONResponse({**found, "id": model})

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", get_model, methods=["GET"]),
    ]


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
    """A page of adapters as JSON, each followed by its aliases; and the last one's name, ""
    if no more can follow."""
    found = Visible(core.tenants).page(home, after=after, limit=PAGE)
    last = found[-1].name if len(found) == PAGE else ""
    models = []
    for seen in found:
        models.append(_dump(_adapter_model(core, home, seen)))
        models += map(_dump, _aliases(core, home, seen))
    return models, last


def _aliases(core: Core, home: Tenant, seen: Seen) -> Iterator[Json]:
    with suppress(AdapterNotFound):  # deleted just now
        for row in seen.owner.registry.aliases(seen.record.ref.name):
            with suppress(AdapterNotFound, AdapterCorrupt):
                yield _alias_model(core, home, seen.owner, seen.name, row)


def _named(core: Core, home: Tenant, model: str) -> Json:
    """The model of an adapter's name, ``name@revision`` or ``name/alias``. Raises
    AdapterNotFound."""
    visible = Visible(core.tenants)
    meant = visible.meant(home, model)
    if "/" in meant.spec:
        shown = visible.shown(home, meant.owner, meant.name)
        with suppress(AdapterNotFound):  # what follows says what is near
            for row in meant.owner.registry.aliases(meant.name):
                if meant.spec == f"{meant.name}/{row.alias}":
                    return _alias_model(core, home, meant.owner, shown, row)
    return _adapter_model(core, home, visible.get(home, model))


def _dump(model: Mapping[str, Any]) -> bytes:
    return json.dumps(model, ensure_ascii=False, separators=(",", ":")).encode()


def _base_model(core: Core) -> Json:
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


def _adapter_model(core: Core, home: Tenant, seen: Seen) -> Json:
    owner, record, ref = seen.owner, seen.record, seen.record.ref
    return {
        "id": seen.name,
        "object": "model",
        "created": int(record.created),
        "owned_by": "veneer" if owner is home else owner.name,
        "root": f"{seen.name}@{ref.revision[:SHORT_REVISION]}",
        "parent": core.base.name,
        "max_model_len": core.engine.info.longest_sequence,
        "revision": ref.revision,
        "weights_digest": ref.weights_digest,
        "rank": record.manifest.max_rank,
    }


def _alias_model(core: Core, home: Tenant, owner: Tenant, name: str, row: AliasRow) -> Json:
    """The model of an alias of what ``home`` calls ``name``: that of its target, or of the
    heaviest one if it has several. Raises AdapterNotFound if that is gone."""
    heaviest = max(row.targets, key=lambda target: target[1], default=("", 0))[0]
    record = owner.registry.get(f"{row.name}@{heaviest}")
    target = _adapter_model(core, home, Seen(owner, record, name))
    model = {**target, "id": f"{name}/{row.alias}"}
    if len(row.targets) > 1:
        model["targets"] = [
            {"root": f"{name}@{revision[:SHORT_REVISION]}", "weight": weight}
            for revision, weight in row.targets
        ]
    return model
