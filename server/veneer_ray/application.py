"""The Serve application: its deployments, and how they are started, changed and removed.

Nothing here touches another application, and Serve itself is shut down only where a failed
start was what started it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from veneer_registry.errors import FailedPrecondition, Unavailable, VeneerError
from veneer_server import __version__

from veneer_ray import ray_api
from veneer_ray.deployments.engine import Engine
from veneer_ray.deployments.ingress import Ingress
from veneer_ray.deployments.registry import Registry
from veneer_ray.settings import RayCluster

_MOST_CALLS: Final = 100_000
"""Maximum number of calls at a replica, too high to be reached: the servers limit their calls
themselves and refuse the rest with an error that says so, whereas Serve would queue it."""
_HEALTH_S: Final = 2.0
_STATS_S: Final = 1.0
_STOP_S: Final = 60.0
"""What a replica may take to stop once its calls have ended."""
_ANSWER_S: Final = 30.0
_READY_S: Final = 120.0
"""How long the ports may take to answer once Serve counts everything as running."""
_DEPLOYMENTS: Final = frozenset(("registry", "ingress", "engines"))


# ------------------------------------------------------------------ what is deployed


def application(cluster: RayCluster) -> Any:
    """The application, for `serve.run`."""
    number = _number(cluster)
    # Without the number of replicas, so that changing it replaces no replica.
    settings = replace(cluster, replicas=1, most_replicas=0).as_text()
    drain_s = cluster.drain_s + _STOP_S
    registry = _versioned(
        serve.deployment(
            Registry,
            name="registry",
            num_replicas=1,
            max_ongoing_requests=_MOST_CALLS,
            health_check_period_s=_HEALTH_S,
            graceful_shutdown_timeout_s=_STOP_S,
            ray_actor_options={"num_cpus": 0},
        ),
        settings,
    ).bind(settings)
    engines = _versioned(
        serve.deployment(
            Engine,
            name="engines",
            max_ongoing_requests=_MOST_CALLS,
            health_check_period_s=_HEALTH_S,
            # How long the ingresses have to learn that a replica goes, before it refuses calls.
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=drain_s,
            ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
            request_router_config=RequestRouterConfig(
                request_router_class=ray_api.ROUTER,
                request_routing_stats_period_s=_STATS_S,
            ),
            **number,
        ),
        settings,
    ).bind(settings)
    ingress = _versioned(
        serve.deployment(
            Ingress,
            name="ingress",
            num_replicas=cluster.ingresses,
            max_constructor_retry_count=1,  # a port that is taken stays taken
            max_ongoing_requests=_MOST_CALLS,
            health_check_period_s=_HEALTH_S,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=drain_s,
            ray_actor_options={"num_cpus": 0},
        ),
        settings,
    )
    return ingress.bind(settings, engines, registry)


def _versioned(deployment: Any, settings: str) -> Any:
    """The deployment with a version that is the same for equal settings of the same Veneer."""
    version = hashlib.sha256(f"{__version__}\n{settings}".encode()).hexdigest()[:16]
    return ray_api.versioned(deployment, version)


def _number(cluster: RayCluster) -> dict[str, Any]:
    if not cluster.scales:
        return {"num_replicas": cluster.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=cluster.replicas,
            max_replicas=cluster.most_replicas,
            upscale_delay_s=10.0,
            downscale_delay_s=300.0,
            policy=AutoscalingPolicy(policy_function="veneer_ray.scaling:policy"),
        )
    }


# ------------------------------------------------------------------ start, change, remove


def deploy(cluster: RayCluster, name: str) -> str:
    """Start the application, or change it to match ``cluster``; return the address of the
    machine whose ports answer. Ray must be connected.

    What a failed start has started is removed again, Serve included.

    Raises:
        FailedPrecondition: the name is another application's, or this Ray lacks something.
        Unavailable: it did not start; the error says why.
    """
    ray_api.check()
    serve_ran = ray_api.serve_runs()
    before = status(name)
    if before is not None:
        _check_same(settings_of(name), cluster, name)
    try:
        if not serve_ran:
            # The cluster's ports are the ingress's: Serve's proxies would only take more.
            serve.start(proxy_location="Disabled")
        handle = _run(application(cluster), name)
        _wait_ready(lambda: str(handle.not_ready.remote().result(timeout_s=_ANSWER_S)))
        return str(handle.machine.remote().result(timeout_s=_ANSWER_S))
    except BaseException:
        if before is None:
            remove(name)
            if not serve_ran and not serve.status().applications:
                serve.shutdown()
        raise


def _run(made: Any, name: str) -> Any:
    try:
        return serve.run(made, name=name, route_prefix=None)
    except RuntimeError as error:
        found = status(name)
        told = [str(error)] if found is None else [found.message]
        told += [each.message for each in found.deployments.values()] if found else []
        raise Unavailable(f"{name} did not start: {cause_of(told)}") from None


def cause_of(told: list[str]) -> str:
    """The line that names the cause in what Serve tells of deployments that failed, which is
    mostly tracebacks."""
    lines = [line.strip() for text in told for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(PortTaken|Error): ", line)]
    if not errors:
        return " ".join(filter(None, lines))[-500:]
    return errors[-1].partition(": ")[2]


def _wait_ready(ask: Callable[[], str]) -> None:
    """Wait until an ingress finds nothing that is not ready."""
    until = time.monotonic() + _READY_S
    while why := ask():
        if time.monotonic() > until:
            raise Unavailable(f"all parts run, but {why}: see Ray's logs of the ingress")
        time.sleep(0.2)  # Serve has no event for it


def scale(replicas: int, name: str) -> None:
    """Change the number of engines.

    Raises:
        FailedPrecondition: there is no such application of ours.
    """
    if status(name) is None:
        raise FailedPrecondition(
            f"no application is called {name}: start it with veneer-ray up"
        )
    deploy(replace(settings_of(name), replicas=replicas, most_replicas=0), name)


def remove(name: str) -> bool:
    """Delete the application, and return once its calls and processes have ended. Returns False
    if there is none. Other applications, Serve and Ray stay.

    Raises:
        FailedPrecondition: the name is another application's.
    """
    if status(name) is None:
        return False
    serve.delete(name, _blocking=False)  # blocking, it gives up after a minute
    while name in serve.status().applications:
        time.sleep(0.2)  # Serve has no event for it
    return True


def status(name: str) -> Any:
    """Serve's status of the application; None if it is not deployed.

    Raises:
        FailedPrecondition: the name is another application's.
    """
    found = serve.status().applications.get(name)
    # While it is built it has none.
    if found is not None and set(found.deployments) not in (set(), _DEPLOYMENTS):
        raise FailedPrecondition(
            f"the application {name} is not veneer-ray's: choose another name with --name"
        )
    return found


def settings_of(name: str) -> RayCluster:
    """The settings of a deployed application.

    Raises:
        Unavailable: it does not answer.
    """
    try:
        found = serve.get_app_handle(name).settings.remote().result(timeout_s=_ANSWER_S)
        return RayCluster.of_text(found)
    except (RayError, RuntimeError, TimeoutError, VeneerError, TypeError) as error:
        raise Unavailable(
            f"the application {name} does not answer ({type(error).__name__}): retry, or "
            f"remove it with veneer-ray down --name {name}"
        ) from None


def _check_same(now: RayCluster, wanted: RayCluster, name: str) -> None:
    if now.data_dir != wanted.data_dir:
        raise FailedPrecondition(
            f"an application {name} with the data folder {now.data_dir} is deployed: choose "
            f"another name with --name, or remove it with veneer-ray down --name {name}"
        )
