"""The torch decoder of a tensor-parallel process."""

from __future__ import annotations

import torch

from veneer_server.backends.parallel.peers import Peers
from veneer_server.backends.torch.attention import KvCache
from veneer_server.backends.torch.decoder import Decoder
from veneer_server.backends.torch.lora import LoraBatch
from veneer_server.models.linear import ServedLinear
from veneer_server.models.loader import DecoderWeights
from veneer_server.step.layout import Group


class ParallelDecoder(Decoder):
    """Implements `Backend`. All processes execute the same steps, each with its own parts of
    the adapters, and get the same logits.

    Args:
        weights: this process's part of the base.
    """

    def __init__(
        self, weights: DecoderWeights, cache: KvCache, lora_dtype: torch.dtype, peers: Peers
    ) -> None:
        super().__init__(weights, cache, lora_dtype)
        self._peers = peers

    def _project(
        self,
        linear: ServedLinear,
        index: int,
        group: Group,
        x: torch.Tensor,
        lora: LoraBatch | None,
    ) -> torch.Tensor:
        y = super()._project(linear, index, group, x, lora)
        if group not in (Group.OUTPUT, Group.DOWN):
            return y
        # Partial sums are added in float32, as the residual stream is.
        y = y.float()
        self._peers.add(y)
        return y
