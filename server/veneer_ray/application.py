"""The Serve application: its deployments, and how they are started, changed and ended."""

from __future__ import annotations

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

from veneer_ray.deployments.engine import Engine
from veneer_ray.deployments.ingress import Ingress
from veneer_ray.deployments.registry import Registry
from veneer_ray.servicers import SERVICERS
from veneer_ray.settings import Cluster

__all__ = ["NAME", "application", "deploy"]

NAME: Final = "veneer"

_MOST_CALLS: Final = 100_000
"""At a replica. The servers bound what they take, and refuse the rest with an error that says
so; Serve would let it wait."""
_HEALTH_S: Final = 2.0
_STATS_S: Final = 1.0


def application(cluster: Cluster) -> Any:
    """The application, for `serve.run`."""
    number = _number(cluster)
    # Serve replaces every replica that would now be made with other arguments.
    settings = replace(cluster, replicas=1, most_replicas=0).as_text()
    registry = serve.deployment(
        Registry,
        name="registry",
        num_replicas=1,
        max_ongoing_requests=_MOST_CALLS,
        health_check_period_s=_HEALTH_S,
        graceful_shutdown_timeout_s=60.0,
        ray_actor_options={"num_cpus": 0},
    ).bind(settings)
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=cluster.ingresses,
        max_ongoing_requests=_MOST_CALLS,
        health_check_period_s=_HEALTH_S,
        graceful_shutdown_timeout_s=cluster.drain_s,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(settings, _engines(cluster, settings, number), registry)


def _number(cluster: Cluster) -> dict[str, Any]:
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


def _engines(cluster: Cluster, settings: str, number: dict[str, Any]) -> Any:
    return serve.deployment(
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
    ).bind(settings)


def deploy(cluster: Cluster) -> None:
    """Start it, or change it to what ``cluster`` says; returns once it is ready. Ray must be
    connected."""
    serve.start(
        http_options=HTTPOptions(host=cluster.http_host, port=cluster.http_port),
        grpc_options=gRPCOptions(
            port=cluster.grpc_port, grpc_servicer_functions=list(SERVICERS)
        ),
    )
    serve.run(application(cluster), name=NAME, route_prefix="/")
