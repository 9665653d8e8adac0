"""The front's view of the engine: an async facade over the engine process.

`EngineClient` starts the process, keeps the socket, restarts it when it dies,
and turns its messages into one async iterator a request. It knows no names and
no text: token ids in, token ids out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Literal

from veneer_server.engine.messages import (
    AdapterLoaded,
    AdapterSource,
    EngineConfig,
    EngineInfo,
    Evicted,
    Residency,
    SamplingParams,
    SequenceOutput,
    StepDone,
)

__all__ = ["EngineClient", "EngineEvent"]

EngineEvent = StepDone | Residency | AdapterLoaded | Evicted
"""What a listener (metrics) is told, in the front's event loop."""


class EngineClient:
    """Owns the engine process. All methods belong to one asyncio event loop.

    Contract: every `generate` iterator ends: by its last `SequenceOutput` (with
    ``finish`` set), by a `VeneerError`, or by being closed (which cancels the
    sequence in the engine). `EngineFailed` is raised into every open iterator
    and operation when the process dies; the process is then started again.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_queue: int,
        on_event: Callable[[EngineEvent], None] = lambda event: None,
        on_health: Callable[[bool], None] = lambda healthy: None,
    ) -> None: ...

    info: EngineInfo
    """What the running engine said of itself; after `start`."""

    starts: int
    """Times the engine process was started."""

    healthy: bool
    """The process is up and its step loop answered the last ping in time."""

    in_flight: int
    """Sequences submitted and not ended."""

    async def start(self) -> EngineInfo:
        """Start the process and wait until it has loaded the base model."""
        raise NotImplementedError

    async def stop(self) -> None:
        """End the process; open iterators get `EngineFailed`."""

    def generate(
        self,
        prompt: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        adapter: AdapterSource | None = None,
        ignore_eos: bool = False,
        logprobs: bool = False,
        prompt_logprobs: bool = False,
    ) -> AsyncIterator[SequenceOutput]:
        """Submit a sequence; one `SequenceOutput` for each step it took part in.

        Raises at once `QueueFull` (in flight >= max_running + max_queue),
        `EngineFailed` (process down, being restarted), `ModelLoading`. Use
        ``contextlib.aclosing`` so that leaving the loop early cancels it.
        """
        raise NotImplementedError

    async def activate(
        self, adapter: AdapterSource, *, tier: Literal["host", "device"], pin: bool
    ) -> None:
        """Bring an adapter to a tier; raises what the load raised."""

    async def evict(
        self,
        weights_digest: str,
        *,
        mode: Literal["drain", "fail_if_busy", "abort"],
        unpin: bool,
    ) -> tuple[bool, int]:
        """(evicted now, bytes freed); raises AdapterInUse, AdapterPinned."""
        raise NotImplementedError

    def tier(self, weights_digest: str) -> Residency | None:
        """Last known residency of an adapter, or None where it is on disk only."""
        raise NotImplementedError
