"""Callers of several tenants, on one front with a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from veneer_proto.v1 import adapters_pb2, inference_pb2, server_pb2
from veneer_server.access.edit_keys import add_key
from veneer_server.access.principal import Role

from tests.unit.server.rpc.front_harness import Front, prompt, running, upload

SERVICES = {
    each.DESCRIPTOR.services_by_name[name].full_name: (each, stub)
    for each, name, stub in (
        (inference_pb2, "InferenceService", "inference"),
        (adapters_pb2, "AdapterService", "adapters"),
        (server_pb2, "ServerService", "server"),
    )
}


@dataclass
class Caller:
    """One key's calls."""

    front: Front
    tenant: str
    key: str
    named: str = ""
    """The tenant that it names, if any."""

    @property
    def metadata(self) -> Any:
        named = (("veneer-tenant", self.named),) if self.named else ()
        return (("authorization", f"Bearer {self.key}"), *named)

    def call(self, name: str, /, **fields: Any) -> Any:
        """An rpc by its name; the fields are those of its request."""
        for service, (module, stub) in SERVICES.items():
            methods = module.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods
            for method in methods:
                if method.name == name:
                    request = getattr(module, method.input_type.name)(**fields)
                    return getattr(getattr(self.front, stub), name)(
                        request, metadata=self.metadata
                    )
        raise LookupError(name)

    async def generate(self, **fields: Any) -> Any:
        return await self.front.inference.Generate(prompt(**fields), metadata=self.metadata)

    async def push(self, folder: Path, name: str, **options: Any) -> Any:
        messages = upload(folder, name, **options)
        return await self.front.adapters.UploadAdapter(messages, metadata=self.metadata)

    async def names(self) -> list[str]:
        """The adapters of its own tenant that it sees."""
        listed = (await self.call("ListAdapters")).adapters
        return [adapter.name for adapter in listed if not adapter.tenant]

    async def http(self, verb: str, path: str, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}"}
        if self.named:
            headers["x-veneer-tenant"] = self.named
        url = f"http://{self.front.addresses['openai']}{path}"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            return await http.request(verb, url, headers=headers, json=body or None)


@dataclass
class Shared:
    """A front, and the file with its keys."""

    front: Front
    keys: Path

    def caller(self, tenant: str, *roles: Role, named: str = "") -> Caller:
        made = add_key(
            self.keys,
            name=f"{tenant}-{'-'.join(roles) or 'admin'}",
            tenant=tenant,
            roles=[*roles] or ["admin"],
            expires=None,
        )
        return Caller(self.front, tenant, made.key, named)


@asynccontextmanager
async def shared(base: Path, cache: Path, data: Path, **flags: str) -> AsyncIterator[Shared]:
    """A front that several tenants share."""
    keys = data.with_name(f"{data.name}-keys.toml")
    add_key(keys, name="first", tenant="default", roles=["operator"], expires=None)
    flags = {"openai_listen": "127.0.0.1:0", "refusal_rate": "0", **flags}
    async with running(base, cache, data, keys_file=str(keys), **flags) as front:
        yield Shared(front, keys)
