"""The same test for both clients: `Driver` runs either from synchronous code."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from veneer_client import AsyncClient, Chunk, Client, GenerationEnd, Prompt, RetryPolicy


class Driver:
    """Methods of the synchronous client, performed by it or by the async one."""

    def __init__(self, client: Any, runner: asyncio.Runner | None) -> None:
        self._client: Any = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        def run(*args: Any, **kwargs: Any) -> Any:
            outcome = found(*args, **kwargs)
            if self._runner is None or not inspect.iscoroutine(outcome):
                return outcome
            return self._runner.run(outcome)

        return run

    def all(self, **filters: Any) -> list[Any]:
        """All items of `list`."""
        return self.collect("list", **filters)

    def collect(self, method: str, *args: Any, **options: Any) -> list[Any]:
        """All items of an iterating method."""
        found = getattr(self._client, method)
        if self._runner is None:
            return list(found(*args, **options))

        async def collect() -> list[Any]:
            return [item async for item in found(*args, **options)]

        return self._runner.run(collect())

    def inside(self, handle: Any, use: Callable[[Any], Any]) -> Any:
        """Enter an adapter handle, pass it to ``use`` as a driver, exit it."""
        if self._runner is None:
            with handle as entered:
                return use(Driver(entered, None))

        self._runner.run(handle.__aenter__())
        error: BaseException | None = None
        try:
            return use(Driver(handle, self._runner))
        except BaseException as caught:
            error = caught
            raise
        finally:
            kind = None if error is None else type(error)
            self._runner.run(handle.__aexit__(kind, error, None))

    def take(self, stream: Any, count: int) -> list[Any]:
        """The first ``count`` items of a stream."""
        if self._runner is None:
            return [next(stream) for _ in range(count)]

        async def some() -> list[Any]:
            return [await anext(stream) for _ in range(count)]

        return self._runner.run(some())

    def watch(self, **options: Any) -> Any:
        """A watch, started inside the event loop if there is one."""
        return self._begin(self._client.watch, **options)

    def generate_stream(self, prompt: Prompt, **options: Any) -> Any:
        """A stream, started inside the event loop if there is one."""
        return self._begin(self._client.generate_stream, prompt, **options)

    def _begin(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._runner is None:
            return method(*args, **options)

        async def begin() -> Any:
            return method(*args, **options)

        return self._runner.run(begin())

    def stream(self, prompt: Prompt, **options: Any) -> tuple[list[Chunk], GenerationEnd]:
        """Read a stream to its end."""
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
