"""Logs what the engine does with adapters, which explains slow first tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.engine_client.client import EngineEvent
from veneer_server.logs import get_logger
from veneer_server.wire.messages import AdapterFailed, AdapterLoaded, Evicted, split_key

_DIGITS: int = 12
_log = get_logger(__name__)


class Names(Protocol):
    """The part of `Tenants` that this module uses."""

    def names(self, key: str) -> Iterable[str]:
        """The names that share the weights of a resident copy."""


class AdapterLog:
    """Listener for `EngineClient`. Weights that no longer have a name appear by digest."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def on_engine_event(self, event: EngineEvent) -> None:
        """Log each load, move, eviction and failure."""
        match event:
            case AdapterLoaded(weights_digest=digest, source=source, stages=stages):
                seconds = {f"{stage}_s": round(took, 4) for stage, took in stages.items()}
                _log.info("adapter loaded", **self._which(digest), source=source, **seconds)
            case Evicted(weights_digest=digest, tier=tier, cause=cause):
                _log.info("adapter evicted", **self._which(digest), tier=tier, cause=cause)
            case AdapterFailed(weights_digest=digest, error=error):
                _log.warning(
                    "adapter not loaded",
                    **self._which(digest),
                    reason=error.reason,
                    error=error.message,
                )
            case _:
                pass

    def _which(self, key: str) -> dict[str, object]:
        tenant, digest = split_key(key)
        named: dict[str, object] = {
            "adapter": ",".join(sorted(self._names.names(key))),
            "weights": digest[:_DIGITS],
        }
        return named if tenant == DEFAULT_TENANT else {"tenant": tenant, **named}
