"""The same test for both clients: `Driver` runs either from synchronous code."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from veneer_client import AsyncClient, Chunk, Client, GenerationEnd, Prompt, RetryPolicy


class Driver:
    """Methods of the synchronous client, performed by it or by the async one."""

    def __init__(self, client: Client | AsyncClient, runner: asyncio.Runner | None) -> None:
        self._client: Any = client
        self._runner = runner

    def __getattr__(self, method: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            outcome = getattr(self._client, method)(*args, **kwargs)
            return outcome if self._runner is None else self._runner.run(outcome)

        return run

    def all(self, **filters: Any) -> list[Any]:
        """`list` to its end."""
        if self._runner is None:
            return list(self._client.list(**filters))

        async def collect() -> list[Any]:
            return [adapter async for adapter in self._client.list(**filters)]

        return self._runner.run(collect())

    def stream(self, prompt: Prompt, **options: Any) -> tuple[list[Chunk], GenerationEnd]:
        """A stream to its end."""
        if self._runner is None:
            stream = self._client.generate_stream(prompt, **options)
            return list(stream), stream.final

        async def collect() -> tuple[list[Chunk], GenerationEnd]:
            stream = self._client.generate_stream(prompt, **options)
            return [chunk async for chunk in stream], stream.final

        return self._runner.run(collect())


@contextmanager
def driver(kind: str, address: str, **options: Any) -> Iterator[Driver]:
    """A ``sync`` or ``async`` client at ``address``."""
    options.setdefault("retry", RetryPolicy())
    if kind == "sync":
        with Client(address, **options) as client:
            yield Driver(client, None)
        return
    with asyncio.Runner() as runner:

        async def make() -> AsyncClient:
            return AsyncClient(address, **options)

        made = runner.run(make())
        try:
            yield Driver(made, runner)
        finally:
            runner.run(made.close())
