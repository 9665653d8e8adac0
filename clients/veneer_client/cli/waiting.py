"""``--wait-replicas``: return once servers that follow the registry have a change."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer_client.replicas import ReplicasReached, WaitReplicas

__all__ = ["WaitReplicasOption", "replicas_shown"]

WaitReplicasOption = Annotated[
    WaitReplicas,
    typer.Option(
        "--wait-replicas",
        help="Return once this many of the registry's followers have applied the change.",
    ),
]


def replicas_shown(reached: ReplicasReached | None) -> str:
    """The end of a line about a change; "" if it did not wait."""
    if reached is None:
        return ""
    short = "" if reached.enough else " (timed out; the others catch up later)"
    return f"; applied on {reached.applied} of {reached.live} followers{short}"
