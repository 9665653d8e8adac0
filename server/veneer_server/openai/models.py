"""``GET /v1/models``: the base, adapters, and their aliases.

In OpenAI's form, or in Anthropic's for callers that send its header ``anthropic-version``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route
from veneer_registry.adapter import SHORT_REVISION
from veneer_registry.errors import AdapterCorrupt, AdapterNotFound
from veneer_registry.records import AdapterRecord
from veneer_registry.rows import AliasRow

from veneer_server.access.caller import Caller
from veneer_server.openai.core import ServingCore
from veneer_server.openai.http.asgi import caller_of
from veneer_server.openai.json_endpoint import LongAnswer
from veneer_server.openai.requests import adapter_named
from veneer_server.serving.checks import invalid
from veneer_server.serving.tenants import Tenant
from veneer_server.serving.visible import Visible, VisibleAdapter

PAGE: Final = 100
"""Adapters per page of the model list."""

_JSON: Final = {"content-type": "application/json"}

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ListForm:
    """How an API shows the list of models.

    Attributes:
        begin, end: JSON before and after the models; ``end`` takes the ids of the first and
            the last model.
        model: converts a model from OpenAI's form; also takes its record, None for the base.
    """

    begin: bytes
    end: Callable[[str, str], bytes]
    model: Callable[[Json, AdapterRecord | None], Json]


def rfc3339(seconds: float) -> str:
    """A Unix time in the form of RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _for_anthropic(model: Json, record: AdapterRecord | None) -> Json:
    return {
        "type": "model",
        "id": model["id"],
        "display_name": model["id"],
        "created_at": rfc3339(model["created"]),
        "lifecycle": "active",
        "max_input_tokens": model["max_model_len"],
        "max_tokens": model["max_model_len"],
    }


_OPENAI: Final = ListForm(
    b'{"object":"list","data":[', lambda first, last: b"]}", lambda model, record: model
)
_ANTHROPIC: Final = ListForm(
    b'{"data":[',
    lambda first, last: (
        b'],"has_more":false,' + _dump({"first_id": first, "last_id": last})[1:]
    ),
    _for_anthropic,
)


def _form_for(request: Request) -> ListForm:
    if "anthropic-version" not in request.headers:
        return _OPENAI
    for name in ("after_id", "before_id"):
        if name in request.query_params:
            raise invalid(name, "is not supported: all models are on one page")
    return _ANTHROPIC


def model_routes(core: ServingCore) -> list[Route]:
    """The routes of the list, and of one model."""

    async def list_models(request: Request) -> Response:
        return await all_models(core, caller_of(request.scope), _form_for(request))

    async def get_model(request: Request) -> Response:
        name, form = request.path_params["model"], _form_for(request)
        with core.calls.running():
            model, record = await named_model(core, caller_of(request.scope), name)
            return JSONResponse(form.model(model, record))

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", get_model, methods=["GET"]),
    ]


async def all_models(core: ServingCore, caller: Caller, form: ListForm) -> Response:
    """The answer that lists all models that the caller sees, the base first."""
    with core.calls.running():
        home = await core.tenants.current(caller)
        page = await asyncio.to_thread(_page, core, home, "", form)
    base = base_model(core)
    page.models.insert(0, _dump(form.model(base, None)))
    pieces = _pieces(core, home, form, page, base["id"])
    if not page.after:
        body = b"".join([piece async for piece in pieces])
        return Response(body, media_type="application/json")
    return LongAnswer(pieces, core.reader_limit_s, _JSON)


async def named_model(
    core: ServingCore, caller: Caller, name: str
) -> tuple[Json, AdapterRecord | None]:
    """A model that the caller sees, with the given name as its id, and its record (None for the
    base). Raises AdapterNotFound."""
    adapter = adapter_named(name, core.base.name)
    if not adapter:
        return {**base_model(core), "id": name}, None
    home = await core.tenants.current(caller)
    model, record = await asyncio.to_thread(_named, core, home, adapter)
    return {**model, "id": name}, record


@dataclass(slots=True)
class _Page:
    """A page of adapters as JSON, each followed by its aliases.

    Attributes:
        after: the last adapter's name; "" if no more can follow.
        last: the last model's id; "" if there is none.
    """

    models: list[bytes]
    after: str
    last: str


async def _pieces(
    core: ServingCore, home: Tenant, form: ListForm, page: _Page, base: str
) -> AsyncIterator[bytes]:
    """The list as JSON, page by page: thousands of adapters in one piece would stall every
    stream, and take megabytes for each slow reader. Args: page: the first page."""
    last = page.last or base
    yield form.begin + b",".join(page.models)
    while page.after:
        page = await asyncio.to_thread(_page, core, home, page.after, form)
        last = page.last or last
        if page.models:
            yield b"," + b",".join(page.models)
    yield form.end(base, last)


def _page(core: ServingCore, home: Tenant, after: str, form: ListForm) -> _Page:
    found = Visible(core.tenants).page(home, after=after, limit=PAGE)
    page = _Page([], found[-1].name if len(found) == PAGE else "", "")
    for seen in found:
        model = _adapter_model(core, home, seen)
        shown = [(model, seen.record), *_aliases(core, home, seen)]
        page.models += [_dump(form.model(*each)) for each in shown]
        page.last = shown[-1][0]["id"]
    return page


def _aliases(
    core: ServingCore, home: Tenant, seen: VisibleAdapter
) -> Iterator[tuple[Json, AdapterRecord]]:
    with suppress(AdapterNotFound):  # deleted just now
        for row in seen.owner.registry.aliases(seen.record.ref.name):
            with suppress(AdapterNotFound, AdapterCorrupt):
                yield _alias_model(core, home, seen.owner, seen.name, row)


def _named(core: ServingCore, home: Tenant, model: str) -> tuple[Json, AdapterRecord]:
    """The model for ``name``, ``name@revision`` or ``name/alias``, and its record. Raises
    AdapterNotFound."""
    visible = Visible(core.tenants)
    meant = visible.meant(home, model)
    if "/" in meant.spec:
        shown = visible.shown(home, meant.owner, meant.name)
        with suppress(AdapterNotFound):  # the error of `get` below suggests similar names
            for row in meant.owner.registry.aliases(meant.name):
                if meant.spec == f"{meant.name}/{row.alias}":
                    return _alias_model(core, home, meant.owner, shown, row)
    seen = visible.get(home, model)
    return _adapter_model(core, home, seen), seen.record


def _dump(model: Mapping[str, Any]) -> bytes:
    return json.dumps(model, ensure_ascii=False, separators=(",", ":")).encode()


def base_model(core: ServingCore) -> Json:
    """The base model in OpenAI's form."""
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


def _adapter_model(core: ServingCore, home: Tenant, seen: VisibleAdapter) -> Json:
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


def _alias_model(
    core: ServingCore, home: Tenant, owner: Tenant, name: str, row: AliasRow
) -> tuple[Json, AdapterRecord]:
    """An alias's model and record: its target's, or its heaviest target's if it has several.
    Raises AdapterNotFound if the target is gone. Args: name: the adapter's name for ``home``.
    """
    heaviest = max(row.targets, key=lambda target: target[1], default=("", 0))[0]
    record = owner.registry.get(f"{row.name}@{heaviest}")
    target = _adapter_model(core, home, VisibleAdapter(owner, record, name))
    model = {**target, "id": f"{name}/{row.alias}"}
    if len(row.targets) > 1:
        model["targets"] = [
            {"root": f"{name}@{revision[:SHORT_REVISION]}", "weight": weight}
            for revision, weight in row.targets
        ]
    return model, record
