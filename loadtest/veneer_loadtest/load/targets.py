"""Targets of a load: a Veneer server over gRPC, or an OpenAI-compatible server over HTTP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
from veneer_client import AsyncClient, RetryPolicy, Text, Tokens

from veneer_loadtest.load.plan import Planned, prompt_ids, prompt_text
from veneer_loadtest.load.spec import LoadSpec


class VeneerSpec(msgspec.Struct, frozen=True, tag="veneer"):
    """A Veneer server at ``HOST:PORT``.

    Attributes:
        beginnings: adapter -> token ids with which each of its prompts begins.
    """

    address: str
    use_prefix_cache: bool = False
    beginnings: dict[str, tuple[int, ...]] = {}


class OpenAiSpec(msgspec.Struct, frozen=True, tag="openai"):
    """An OpenAI-compatible endpoint.

    Attributes:
        url: URL of the server, without ``/v1``.
        base_model: `model` of requests without an adapter.
        fields: adapter -> additional fields of the request's body; they override others.
    """

    url: str
    base_model: str = ""
    api: Literal["completions", "chat"] = "completions"
    fields: dict[str, dict[str, Any]] = {}


TargetSpec = VeneerSpec | OpenAiSpec


@dataclass(slots=True)
class Facts:
    """What the server reports about a request; see `records.Record`."""

    prompt_tokens: int = 0
    cached: int = 0
    tokens: int | None = None
    tier: str = ""
    revision: str = ""
    queue_s: float | None = None
    load_s: float | None = None


class TargetStream(ABC):
    """A running request; iterating yields the number of new tokens in each message.

    Attributes:
        facts: complete once the iteration has ended.
    """

    def __init__(self) -> None:
        self.facts = Facts()

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[int]: ...


class Target(ABC):
    """Sends requests; use it in an ``async with``."""

    def __init__(self, load: LoadSpec) -> None:
        self._load = load

    @abstractmethod
    def send(self, request: Planned) -> AbstractAsyncContextManager[TargetStream]:
        """Send a request; leaving the ``async with`` early cancels it on the server.

        Raises, inside:
            VeneerError: the server rejected the request, failed, or cannot be reached.
        """

    @abstractmethod
    async def connect(self) -> None:
        """Send something small, so that the first request does not pay for the connection.

        Raises:
            VeneerError: no server answers.
        """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @abstractmethod
    async def close(self) -> None:
        """Cancel running requests and close connections."""


class _VeneerStream(TargetStream):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self._call = call

    async def __aiter__(self) -> AsyncIterator[int]:
        async for chunk in self._call:
            if chunk.token_ids:
                yield len(chunk.token_ids)
        end = self._call.final
        timings, tier = end.provenance.timings, end.provenance.tier
        self.facts = Facts(
            prompt_tokens=end.usage.prompt_tokens,
            cached=end.usage.cached_prompt_tokens,
            tokens=end.usage.completion_tokens,
            tier=tier.name.lower() if tier else "",
            revision=end.provenance.revision,
            queue_s=timings.queue_s,
            load_s=timings.adapter_load_s,
        )


class VeneerTarget(Target):
    """See `VeneerSpec`. Nothing is retried: a rejection is a result of the run."""

    def __init__(self, load: LoadSpec, target: VeneerSpec) -> None:
        super().__init__(load)
        self._target = target
        self._client = AsyncClient(target.address, retry=RetryPolicy(attempts=1))

    @asynccontextmanager
    async def send(self, request: Planned) -> AsyncIterator[TargetStream]:
        """See `Target.send`."""
        text = self._load.text or bool(request.prompt)
        beginning = self._target.beginnings.get(request.adapter, ())
        async with self._client.generate_stream(
            Text(prompt_text(self._load, request))
            if text
            else Tokens((*beginning, *prompt_ids(self._load, request))),
            adapter=request.adapter,
            max_tokens=request.tokens,
            temperature=0.0,
            ignore_eos=self._load.ignore_eos,
            use_prefix_cache=self._target.use_prefix_cache,
        ) as call:
            yield _VeneerStream(call)

    async def connect(self) -> None:
        """See `Target.connect`."""
        await self._client.info()

    async def close(self) -> None:
        """See `Target.close`."""
        await self._client.close()


def make_target(load: LoadSpec, target: TargetSpec) -> Target:
    """Create the target that ``target`` describes."""
    if isinstance(target, VeneerSpec):
        return VeneerTarget(load, target)
    from veneer_loadtest.load.openai_target import OpenAiTarget  # needs aiohttp

    return OpenAiTarget(load, target)
