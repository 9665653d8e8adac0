"""The torch decoder of one process of several."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from veneer_server.backends.torch.attention import KvCache
from veneer_server.backends.torch.decoder import Decoder
from veneer_server.backends.torch.lora import LoraBatch
from veneer_server.models.linear import Linear
from veneer_server.models.loader import DecoderWeights
from veneer_server.step.layout import Group

__all__ = ["GroupPeers", "ParallelDecoder", "Peers"]


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


class ParallelDecoder(Decoder):
    """Implements `Backend`. All processes execute the same steps, with tables of their own
    parts of the adapters, and get the same logits.

    Args:
        weights: this process's part.
    """

    def __init__(
        self, weights: DecoderWeights, cache: KvCache, lora_dtype: torch.dtype, peers: Peers
    ) -> None:
        super().__init__(weights, cache, lora_dtype)
        self._peers = peers

    def _project(
        self, linear: Linear, index: int, group: Group, x: torch.Tensor, lora: LoraBatch | None
    ) -> torch.Tensor:
        y = super()._project(linear, index, group, x, lora)
        if group not in (Group.OUTPUT, Group.DOWN):
            return y
        # Partial sums are added in float32, as the residual stream is.
        y = y.float()
        self._peers.add(y)
        return y
