"""The Serve application: its deployments, and how they are started and changed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, Final

from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    HTTPOptions,
    RequestRouterConfig,
    gRPCOptions,
)
from veneer_server import __version__

from veneer_ray.deployments.engine import Engine
from veneer_ray.deployments.ingress import Ingress
from veneer_ray.deployments.registry import Registry
from veneer_ray.servicers import SERVICERS
from veneer_ray.settings import RayCluster

NAME: Final = "veneer"

_MOST_CALLS: Final = 100_000
"""Maximum number of calls at a replica, too high to be reached: the servers limit their calls
themselves and refuse the rest with an error that says so, whereas Serve would queue it."""
_HEALTH_S: Final = 2.0
_STATS_S: Final = 1.0


def application(cluster: RayCluster) -> Any:
    """The application, for `serve.run`."""
    number = _number(cluster)
    # Without the number of replicas, so that changing it replaces no replica.
    settings = replace(cluster, replicas=1, most_replicas=0).as_text()
    registry = _versioned(
        serve.deployment(
            Registry,
            name="registry",
            num_replicas=1,
            max_ongoing_requests=_MOST_CALLS,
            health_check_period_s=_HEALTH_S,
            graceful_shutdown_timeout_s=60.0,
            ray_actor_options={"num_cpus": 0},
        ),
        settings,
    ).bind(settings)
    ingress = _versioned(
        serve.deployment(
            Ingress,
            name="ingress",
            num_replicas=cluster.ingresses,
            max_ongoing_requests=_MOST_CALLS,
            health_check_period_s=_HEALTH_S,
            graceful_shutdown_timeout_s=cluster.drain_s,
            ray_actor_options={"num_cpus": 0},
        ),
        settings,
    )
    return ingress.bind(settings, _engines(cluster, settings, number), registry)


def _versioned(deployment: Any, settings: str) -> Any:
    """The deployment with a version of our own, the same for equal settings of the same Veneer.

    Serve replaces every replica of another version, and `serve.run` gives a deployment without
    a version a random one. There is no public way to set it (see record 92); a test checks that
    this works, and Ray's minor version is pinned.
    """
    version = hashlib.sha256(f"{__version__}\n{settings}".encode()).hexdigest()[:16]
    return deployment.options(version=version, _internal=True)


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


def _engines(cluster: RayCluster, settings: str, number: dict[str, Any]) -> Any:
    engines = serve.deployment(
        Engine,
        name="engines",
        max_ongoing_requests=_MOST_CALLS,
        health_check_period_s=_HEALTH_S,
        # A drained replica goes as soon as its calls have ended.
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=cluster.drain_s,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class="veneer_ray.routing.request_router:AdapterRequestRouter",
            request_routing_stats_period_s=_STATS_S,
        ),
        **number,
    )
    return _versioned(engines, settings).bind(settings)


def deploy(cluster: RayCluster) -> None:
    """Start the application, or change it to match ``cluster``; return once it is ready. Ray
    must be connected."""
    serve.start(
        http_options=HTTPOptions(host=cluster.http_host, port=cluster.http_port),
        grpc_options=gRPCOptions(
            port=cluster.grpc_port, grpc_servicer_functions=list(SERVICERS)
        ),
    )
    serve.run(application(cluster), name=NAME, route_prefix="/")
