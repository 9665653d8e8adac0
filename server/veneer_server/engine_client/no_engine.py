"""A stand-in for the engine, for a server that stores adapters and generates nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NoReturn

from veneer_registry.errors import FailedPrecondition

from veneer_server.engine_client.client import EngineClient, EngineEvent
from veneer_server.engine_client.places import Place, Places, Refusal
from veneer_server.models.config import read_decoder_config
from veneer_server.queues.fairness import Fairness
from veneer_server.wire.messages import AdapterSource, EngineConfig, EngineInfo, EvictMode


class NoEngine(EngineClient):
    """Refuses operations that need an engine, and has nothing in memory to evict."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_queue: int,
        max_wait_s: float,
        on_refused: Callable[[str, Refusal], None],
        on_event: Callable[[EngineEvent], None],
        on_health: Callable[[bool], None],
        hold: Callable[[AdapterSource], AbstractContextManager[object]],
    ) -> None:
        super().__init__(
            config,
            max_queue=max_queue,
            max_wait_s=max_wait_s,
            on_refused=on_refused,
            on_event=on_event,
            on_health=lambda healthy: None,  # InferenceService is not served here
            hold=hold,
        )
        self.places = _NoPlaces(config.max_running, max_queue)
        self._config = config

    async def start(self) -> EngineInfo:
        """Fill in `info` from the base's config; there is nothing to start."""
        decoder = read_decoder_config(Path(self._config.base_folder))
        self.info = EngineInfo(
            device="none",
            backend="none",
            architecture=decoder.architecture,
            parameters=0,
            weights_bytes=0,
            context_length=decoder.context_length,
            vocab_size=decoder.vocab_size,
            kv_cache_tokens=0,
            adapter_itemsize=4 if self._config.dtype == "float32" else 2,
            load_seconds=0.0,
            longest_sequence=decoder.context_length,
        )
        return self.info

    @property
    def healthy(self) -> bool:
        """Always true, for ``GET /health``: this server's work does not depend on an engine."""
        return True

    async def stop(self) -> None:
        """Do nothing, since there is nothing to stop."""

    async def evict(
        self, weights_digest: str, *, mode: EvictMode, unpin: bool
    ) -> tuple[bool, int]:
        return False, 0

    async def unpin(self, weights_digest: str) -> None:
        pass

    def _check_ready(self) -> None:
        refuse_engine_work()


class _NoPlaces(Places):
    """Refuses requests before anything is done for them."""

    @contextmanager
    def hold(
        self,
        count: int,
        whose: Fairness | None = None,
        *,
        within_s: float | None = None,
        at_once: int = 1,
    ) -> Iterator[Place]:
        refuse_engine_work()
        yield  # makes it a generator


def refuse_engine_work() -> NoReturn:
    """Raise FailedPrecondition, because this server's role has no engine."""
    raise FailedPrecondition(
        "this server has the role registry: it stores adapters and does not load them or "
        "generate; use a server with --role engine that follows it",
        metadata={"cause": "role", "role": "registry"},
    )
