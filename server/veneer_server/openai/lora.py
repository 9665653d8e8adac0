"""vLLM's endpoints that load and unload adapters by name, on top of the registry."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from veneer_registry.adapter import AdapterRef, check_name
from veneer_registry.errors import AdapterExists, InvalidField
from veneer_registry.records import UploadRequest

from veneer_server.access.caller import Caller
from veneer_server.access.principal import require
from veneer_server.openai.fields import RequestFields, parse_fields
from veneer_server.openai.http.asgi import Reply
from veneer_server.openai.json_endpoint import Answering, JsonEndpoint
from veneer_server.serving.checks import invalid
from veneer_server.serving.spare_time import to_the_end
from veneer_server.serving.uploads import UploadOptions
from veneer_server.serving.visible import Visible

_LOADED_BY: Final = "loaded-by"
"""Label of revisions that were loaded here. A publisher may unload those."""


class LoadFields(RequestFields):
    """``POST /v1/load_lora_adapter``.

    Attributes:
        load_inplace: replace the adapter of that name.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False


class UnloadFields(RequestFields):
    """``POST /v1/unload_lora_adapter``. ``lora_int_id`` has no effect, as in vLLM."""

    lora_name: str
    lora_int_id: int | None = None


@dataclass(frozen=True, slots=True)
class _Named:
    """The name in a request, for the audit log."""

    name: str


@dataclass(frozen=True, slots=True)
class _Changed:
    """The adapter that a request changed, for the audit log."""

    adapter: AdapterRef


class LoadEndpoint(JsonEndpoint):
    """``POST /v1/load_lora_adapter``."""

    def _check(self, body: object, caller: Caller) -> Answering:
        fields = parse_fields(LoadFields, body)
        _check_name(fields.lora_name)
        return Answering(partial(self._load, fields, caller), about=_Named(fields.lora_name))

    async def _load(self, fields: LoadFields, caller: Caller, reply: Reply) -> _Changed:
        """Upload the folder's files as a client would, with the same checks, limits and events.
        Like vLLM, load the adapter before answering."""
        core, name = self._core, fields.lora_name
        home = await core.tenants.current(caller, publishing=True)
        if name in home.registry and not fields.load_inplace:
            raise _loaded(name)
        request = UploadRequest(
            name,
            (),
            labels={_LOADED_BY: "load_lora_adapter"},
            allow_replace=fields.load_inplace,
        )
        try:
            async with (
                core.local.opened(fields.lora_path) as files,
                aclosing(core.local.messages(files, UploadOptions(request))) as messages,
            ):
                loaded = await core.loading.load(home, messages, caller)
        except AdapterExists:  # loaded meanwhile by another request
            raise _loaded(name) from None
        await reply.text(f"Success: LoRA adapter '{name}' added successfully.")
        return _Changed(loaded.ref)


class UnloadEndpoint(JsonEndpoint):
    """``POST /v1/unload_lora_adapter``."""

    def _check(self, body: object, caller: Caller) -> Answering:
        fields = parse_fields(UnloadFields, body)
        _check_name(fields.lora_name)
        return Answering(partial(self._unload, fields, caller), about=_Named(fields.lora_name))

    async def _unload(self, fields: UnloadFields, caller: Caller, reply: Reply) -> _Changed:
        """Delete the name. Running requests keep the weights they started with."""
        core, name = self._core, fields.lora_name
        home = await core.tenants.current(caller)
        Visible(core.tenants).check_own(home, name)
        record = await to_the_end(lambda: home.registry.get(name))
        if _LOADED_BY not in record.labels:
            require({"admin"}, caller.principal, "unloading an adapter that was uploaded")
        await core.loading.unload(home, record, caller)
        await reply.text(f"Success: LoRA adapter '{name}' removed successfully.")
        return _Changed(record.ref)


def _check_name(name: str) -> None:
    try:
        check_name(name)
    except InvalidField as error:
        raise InvalidField(error.message, metadata={"field": "lora_name"}) from None


def _loaded(name: str) -> InvalidField:
    return invalid(
        "lora_name", f"{name!r} has already been loaded: set load_inplace to replace it"
    )
