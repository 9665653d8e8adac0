"""Builds the backend for CUDA for an engine, or says why it cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from veneer_server.backends.cuda.attention.decode import SPLIT
from veneer_server.backends.cuda.buckets import Sizes
from veneer_server.backends.cuda.decoder import CudaDecoder
from veneer_server.backends.cuda.device import open_device
from veneer_server.backends.cuda.draws import CudaDraws
from veneer_server.backends.cuda.weights import load
from veneer_server.models.config import read_decoder_config
from veneer_server.models.loader import DecoderWeights
from veneer_server.wire.messages import EngineConfig

__all__ = ["CudaUnavailable", "build"]


class CudaUnavailable(Exception):
    """Why the kernels cannot serve, as a phrase."""


def build(
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    num_blocks: int,
    repaired: Callable[[Callable[[], DecoderWeights]], DecoderWeights],
) -> tuple[CudaDecoder, CudaDraws]:
    """A decoder over the base, and what samples from its logits.

    Args:
        repaired: calls what loads the base, which may find it damaged.

    Raises:
        CudaUnavailable: there is no card, or the kernels do not support the base.
    """
    if dtype != torch.bfloat16:
        raise CudaUnavailable(
            f"it computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
        )
    if SPLIT % config.block_size:
        raise CudaUnavailable(
            f"KV blocks hold {config.block_size} tokens, which does not divide {SPLIT}"
        )
    folder = Path(config.base_folder)
    model = read_decoder_config(folder)
    try:
        card = open_device(device)
        weights = repaired(
            lambda: load(
                card,
                folder,
                quantization=config.quantization,
                cache_dir=Path(config.cache_folder),
                fingerprint=config.weights_fingerprint,
            )
        )
    except (RuntimeError, ValueError) as reason:
        raise CudaUnavailable(str(reason)) from reason
    sizes = Sizes(
        rows=config.max_batch_tokens + config.max_running,
        sequences=config.max_running,
        context=model.context_length,
    )
    decoder = CudaDecoder(
        card,
        weights,
        sizes,
        blocks=num_blocks,
        block_size=config.block_size,
        adapter_bytes=config.device_adapter_bytes,
        exact=config.exact,
    )
    return decoder, CudaDraws(card, config.max_running, model.vocab_size)
