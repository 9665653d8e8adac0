"""Builds the CUDA backend for an engine, or says why it cannot serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from veneer_server.backends.cuda.attention.decode import SPLIT
from veneer_server.backends.cuda.buckets import Sizes
from veneer_server.backends.cuda.decoder import CudaDecoder
from veneer_server.backends.cuda.device import Device, open_device
from veneer_server.backends.cuda.draws import CudaDraws
from veneer_server.backends.cuda.weights import load
from veneer_server.backends.parallel.leading import Leading
from veneer_server.backends.parallel.peers import Member
from veneer_server.backends.parallel.sharding import Shard
from veneer_server.models.config import read_decoder_config
from veneer_server.models.loader import DecoderWeights
from veneer_server.wire.messages import EngineConfig

__all__ = ["CudaUnavailable", "build", "decoder_of", "loaded", "open_device"]

log = logging.getLogger(__name__)


class CudaUnavailable(Exception):
    """The CUDA backend cannot serve; the message gives the reason as a phrase."""


def build(
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    num_blocks: int,
    repaired: Callable[[Callable[[], DecoderWeights]], DecoderWeights],
) -> tuple[CudaDecoder | Leading, CudaDraws]:
    """Build a decoder over the base, and the sampler for its logits.

    Args:
        repaired: calls the function that loads the base, and handles a damaged base.

    Raises:
        CudaUnavailable: there is no GPU, or the kernels do not support the base.
        UnsupportedModel: the base cannot be divided among the processes.
    """
    count = config.tensor_parallel
    if dtype != torch.bfloat16:
        raise CudaUnavailable(
            f"it computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
        )
    stored = read_decoder_config(Path(config.base_folder)).stored
    if stored is not None and stored.is_codes:
        raise CudaUnavailable(
            f"its kernels do not read weights that are stored as {stored.format}"
        )
    if SPLIT % config.block_size:
        raise CudaUnavailable(
            f"KV blocks hold {config.block_size} tokens, which does not divide {SPLIT}"
        )
    if config.exact and count > 2:
        raise CudaUnavailable(
            f"the order of sums over {count} GPUs is not fixed, so --exact needs "
            "--tensor-parallel 2 or 1"
        )
    try:
        card = open_device(device)
        shard = Shard(0, count) if count > 1 else None
        weights = repaired(lambda: loaded(config, card, shard))
    except (RuntimeError, ValueError) as reason:
        raise CudaUnavailable(str(reason)) from reason
    of = partial(decoder_of, config, card, weights, num_blocks)
    decoder: CudaDecoder | Leading
    if shard is None:
        decoder = of(None)
    else:
        # Imported here, since it imports this module.
        from veneer_server.backends.cuda.follower import lead

        decoder = lead(config, num_blocks, card.join, of)
    began = time.monotonic()
    try:
        graphs = decoder.prepare()
    except RuntimeError as reason:
        raise CudaUnavailable(f"a step cannot be captured: {reason}") from reason
    log.info("captured %d graphs in %.1f s", graphs, time.monotonic() - began)
    return decoder, CudaDraws(card, config.max_running, weights.config.vocab_size)


def loaded(config: EngineConfig, card: Device, shard: Shard | None) -> DecoderWeights:
    """Load the base, or one process's part of it, into device memory.

    Raises:
        ValueError: the kernels cannot read its weights.
        UnsupportedModel: the base cannot be divided among the processes.
    """
    return load(
        card,
        Path(config.base_folder),
        quantization=config.quantization,
        cache_dir=Path(config.cache_folder),
        fingerprint=config.weights_fingerprint,
        shard=shard,
    )


def decoder_of(
    config: EngineConfig,
    card: Device,
    weights: DecoderWeights,
    num_blocks: int,
    member: Member | None,
) -> CudaDecoder:
    """Build a decoder over weights from `loaded`.

    Args:
        member: this process's place among the others, if the weights are a part of a base.
    """
    sizes = Sizes(
        rows=config.max_batch_tokens + config.max_running,
        sequences=config.max_running,
        context=weights.config.context_length,
    )
    return CudaDecoder(
        card,
        weights,
        sizes,
        blocks=num_blocks,
        block_size=config.block_size,
        adapter_bytes=config.device_adapter_bytes,
        exact=config.exact,
        member=member,
    )
