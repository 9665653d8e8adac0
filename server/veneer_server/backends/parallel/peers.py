"""The all-reduce among the processes that share a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from veneer_server.backends.parallel.sharding import Shard
from veneer_server.models.config import DecoderConfig


class Peers(Protocol):
    """The processes that hold the other parts of a model."""

    def add(self, partial: torch.Tensor) -> None:
        """Replace ``partial`` by its sum over all processes; each gets the same bits."""


class GroupPeers:
    """`Peers` over a torch.distributed process group: gloo on CPUs, NCCL on GPUs."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def add(self, partial: torch.Tensor) -> None:
        """See `Peers.add`."""
        dist.all_reduce(partial, group=self._group)


@dataclass(frozen=True, slots=True)
class Member:
    """This process's place among those that serve a model together.

    Attributes:
        whole: the whole model's config.
    """

    shard: Shard
    whole: DecoderConfig
    peers: Peers
