"""All that we use of Ray that is not a stable public interface.

- The version of a deployment (private). Serve replaces every replica of another version, and
  gives what a program deploys a random one (record 92).
- Which replicas run, and what each says of itself (`RequestRouter`, alpha).
- Whether Serve runs, without starting it (the name of its controller's actor).

`check` says what of it the installed Ray lacks; ``python -m tests.ray`` runs it on a real Ray.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import ray
from ray.serve import Deployment
from ray.serve.request_router import RequestRouter, RunningReplica
from veneer_registry.errors import FailedPrecondition

from veneer_ray.replicas import RunningEngine

SUPPORTED: Final = "2.60"
ROUTER: Final = f"{__name__}:EngineWatcher"
_CONTROLLER: Final = "SERVE_CONTROLLER_ACTOR"
_NAMESPACE: Final = "serve"

Listener = Callable[[Mapping[str, RunningEngine]], object]


def check() -> None:
    """Raise FailedPrecondition, which names the fix, if this Ray lacks what we need."""
    missing = [name for name, has in _needed() if not has]
    if missing:
        raise FailedPrecondition(
            f"Ray {ray.__version__} lacks {', '.join(missing)}: install Ray {SUPPORTED} on all "
            f"machines (pip install 'ray[serve]=={SUPPORTED}.*')"
        )


def _needed() -> list[tuple[str, bool]]:
    options = inspect.signature(Deployment.options).parameters
    return [
        ("Deployment.options(version=, _internal=)", {"version", "_internal"} <= set(options)),
        ("RequestRouter.update_replicas", hasattr(RequestRouter, "update_replicas")),
        ("RequestRouter.choose_replicas", hasattr(RequestRouter, "choose_replicas")),
        ("RunningReplica.replica_id", hasattr(RunningReplica, "replica_id")),
        ("RunningReplica.routing_stats", hasattr(RunningReplica, "routing_stats")),
        ("RunningReplica.replica_metadata", hasattr(RunningReplica, "replica_metadata")),
    ]


def versioned(deployment: Any, text: str) -> Any:
    """The deployment with a version of our own."""
    return deployment.options(version=text, _internal=True)


def serve_runs() -> bool:
    """Whether Serve runs in the cluster that this process is connected to."""
    try:
        ray.get_actor(_CONTROLLER, namespace=_NAMESPACE)
    except ValueError:
        return False
    return True


class EngineWatcher(RequestRouter):  # type: ignore[misc]  # Ray's types are not read
    """What Serve tells the router of the engines' handle. The calls go directly to the engines'
    servers; Serve routes only the one that makes it tell."""

    def update_replicas(self, replicas: list[Any]) -> None:
        """Called by Serve whenever the replicas or their reports have changed."""
        super().update_replicas(replicas)
        running = {
            each.replica_id.unique_id: RunningEngine(
                **each.replica_metadata, stats=each.routing_stats or {}
            )
            for each in replicas
            if each.replica_metadata
        }
        # Serve copies this class by value into a process, with a copy of the module's globals.
        from veneer_ray.ray_api import tell

        tell(running)

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Any of them."""
        return [candidate_replicas]


_listeners: Final[list[Listener]] = []
"""Global because Serve makes the router, and knows its class only."""


def tell(running: Mapping[str, RunningEngine]) -> None:
    """Pass what runs to this process's listeners."""
    for listener in _listeners:
        listener(running)


def watch_engines(listener: Listener) -> None:
    """Call ``listener`` with the engines that run, by id, whenever Serve tells this process of
    a change. The calls come from a thread of Serve's."""
    _listeners.append(listener)
