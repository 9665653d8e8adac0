"""Callers with limits of their own, and the clock that these go by."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from veneer_proto.v1 import server_pb2
from veneer_server.access.edit_keys import add_key

from tests.unit.server.rpc.front_harness import Front

BASE = "smollm2-135m"
_NUMBERS = count()


@dataclass
class Clock:
    """FAKE clock of the rate limits: stands still unless a test moves it."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Caller:
    """A key of a front, and what it is told."""

    front: Front
    key: str
    tenant: str

    @property
    def metadata(self) -> Any:
        return (("authorization", f"Bearer {self.key}"),)

    @property
    def id(self) -> str:
        return self.key.split("_")[1]

    def generate(self, request: Any) -> Any:
        """A unary call, not awaited yet."""
        return self.front.inference.Generate(request, metadata=self.metadata)

    async def trailing(self, request: Any) -> dict[str, str]:
        """Limits in the trailing metadata of a call that is answered."""
        call = self.generate(request)
        await call
        found = dict(await call.trailing_metadata())
        return {k: v for k, v in found.items() if k.startswith("x-ratelimit")}

    async def post(self, body: dict[str, Any], path: str = "completions") -> httpx.Response:
        url = f"http://{self.front.addresses['openai']}/v1/{path}"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            return await http.post(url, json={"model": BASE, **body}, headers=self.headers)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    async def metrics(self) -> str:
        """The metrics page."""
        url = f"http://{self.front.addresses['metrics']}/metrics"
        async with httpx.AsyncClient(trust_env=False) as http:
            return (await http.get(url, headers=self.headers)).text

    async def usage(self, tenant: str = "", **period: Any) -> Any:
        request = server_pb2.GetUsageRequest(tenant=tenant, **period)
        return await self.front.server.GetUsage(request, metadata=self.metadata)


@dataclass
class Limited:
    """A front, its keys file and the clock of its limits."""

    front: Front
    file: Path
    clock: Clock

    def caller(self, *, tenant: str = "", role: str = "inference", **limits: object) -> Caller:
        """Somebody with a key of its own, in a tenant of its own unless one is named."""
        tenant = tenant or f"t{next(_NUMBERS)}"
        roles: Any = [role]
        made = add_key(
            self.file, name="x", tenant=tenant, roles=roles, expires=None, limits=limits
        )
        return Caller(self.front, made.key, tenant)

    def append(self, text: str) -> None:
        self.file.write_text(f"{self.file.read_text()}\n{text}\n")
