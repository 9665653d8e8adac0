"""The processes that have the other parts of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from veneer_server.backends.parallel.sharding import Shard
from veneer_server.models.config import DecoderConfig


class Peers(Protocol):
    """The processes that have the other parts."""

    def add(self, partial: torch.Tensor) -> None:
        """Replace ``partial`` by the sum of all processes' ones, of the same bits in each."""


class GroupPeers:
    """A process group of torch.distributed: gloo on CPUs, NCCL on cards."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def add(self, partial: torch.Tensor) -> None:
        """See `Peers.add`."""
        dist.all_reduce(partial, group=self._group)


@dataclass(frozen=True, slots=True)
class Member:
    """This process among those that serve a model together.

    Attributes:
        whole: the whole model.
    """

    shard: Shard
    whole: DecoderConfig
    peers: Peers
