"""Pages of metrics, made one at a time for all ports.

Making one takes tens of milliseconds, so requests that wait for the same page share it.
"""

from __future__ import annotations

import asyncio
import gzip
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import (
    CONTENT_TYPE_PLAIN_0_0_4,
    choose_encoder,
    gzip_accepted,
)
from prometheus_client.openmetrics.exposition import ALLOWUTF8, UNDERSCORES

MAX_PARTIAL: Final = 8
"""Maximum number of pages of selected series (``name[]``) that may wait to be made; more are
refused with 503."""

_OFFERED: Final = (
    "",
    *(
        f"{kind};version=1.0.0;escaping={escaping}"
        for kind in ("text/plain", "application/openmetrics-text")
        for escaping in ("underscores", "allow-utf-8", "dots", "values")
    ),
    "application/openmetrics-text",
)


def _keeping_names(encode: Any) -> Any:
    """The encoder without "underscores" escaping. All our names are valid without escaping, but
    prometheus_client's escaping turns ``vllm:`` into ``vllm_``."""
    if isinstance(encode, partial) and encode.keywords.get("escaping") == UNDERSCORES:
        return partial(encode.func, **{**encode.keywords, "escaping": ALLOWUTF8})
    return encode


_FORMATS: Final = {
    kind: _keeping_names(encode) for encode, kind in map(choose_encoder, _OFFERED)
}
"""Encoders by content type. There are only a few, which bounds the number of pages."""


class MetricsPage(NamedTuple):
    """A page, and the headers that describe it."""

    headers: list[tuple[str, str]]
    body: bytes


class _Shape(NamedTuple):
    """Everything that a page depends on. ``names``: the requested series; None for all."""

    names: frozenset[str] | None
    format: str
    gzip: bool

    @property
    def headers(self) -> list[tuple[str, str]]:
        coded = [("Content-Encoding", "gzip")] if self.gzip else []
        return [("Content-Type", self.format), *coded]


@dataclass(slots=True, eq=False)
class _Pending:
    """A page that has not been started, and how many requests wait for it."""

    task: asyncio.Task[bytes]
    waiting: int = 0


class Pages:
    """Makes pages of one registry. Belongs to one event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        # One thread, so that scrapes take at most half of the interpreter's time.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="scrape")
        self._turn = asyncio.Lock()
        self._next: dict[_Shape, _Pending] = {}
        """Pages that have not been started."""

    def close(self) -> None:
        """Make no more pages. Safe to call again."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def page(self, query: str, accept: str, accept_encoding: str) -> MetricsPage | None:
        """The page that a request selects; None if too many pages of selected series wait.
        Requests that wait for the same page share it: it is made after the last of them
        arrived, or not at all if all of them leave.

        Args:
            query: query of the request's URL; may name series by ``name[]``.
            accept, accept_encoding: headers of the request; "" if it has none.
        """
        shape = _shape(query, accept, accept_encoding)
        pending = self._next.get(shape)
        if pending is None:
            if shape.names is not None and self._partial >= MAX_PARTIAL:
                return None
            make = asyncio.get_running_loop().create_task(self._make(shape))
            pending = self._next[shape] = _Pending(make)
        pending.waiting += 1
        try:
            return MetricsPage(shape.headers, await asyncio.shield(pending.task))
        finally:
            pending.waiting -= 1
            if not pending.waiting and self._next.get(shape) is pending:
                del self._next[shape]
                pending.task.cancel()

    @property
    def _partial(self) -> int:
        """Number of waiting pages of selected series."""
        return sum(shape.names is not None for shape in self._next)

    async def _make(self, shape: _Shape) -> bytes:
        async with self._turn:
            del self._next[shape]  # later requests get the next page
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._worker, self._page, shape)

    def _page(self, shape: _Shape) -> bytes:
        registry: Any = self._registry
        if shape.names is not None:
            registry = registry.restricted_registry(shape.names)
        page = _FORMATS[shape.format](registry)
        return gzip.compress(page) if shape.gzip else page


def _shape(query: str, accept: str, accept_encoding: str) -> _Shape:
    names = parse_qs(query).get("name[]")
    _, kind = choose_encoder(accept)
    return _Shape(
        names=None if names is None else frozenset(names),
        format=kind if kind in _FORMATS else CONTENT_TYPE_PLAIN_0_0_4,
        gzip=gzip_accepted(accept_encoding),
    )
