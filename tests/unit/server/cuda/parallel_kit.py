"""A tiny base with adapters, whole or by one of several processes, and a step's logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from veneer_registry.adapter import LoraModule
from veneer_server.backends.parallel.adapters import shard_adapter
from veneer_server.backends.parallel.decoder import ParallelDecoder
from veneer_server.backends.parallel.peers import GroupPeers, Peers
from veneer_server.backends.parallel.sharding import Shard
from veneer_server.backends.parallel.weights import shard_weights
from veneer_server.backends.torch.attention import KvCache
from veneer_server.backends.torch.decoder import Decoder
from veneer_server.models.config import DecoderConfig
from veneer_server.models.linear import Dense
from veneer_server.models.loader import DecoderWeights, LayerWeights
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.arrays import Segment, StepArrays
from veneer_server.step.layout import Layout

from tests.unit.server.cuda.steps import step

CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    context_length=256,
    eos_token_ids=(2,),
    windows=(None, None),
    qk_norm=False,
    tied_head=True,
    quantization=None,
)


def base(dtype: torch.dtype = torch.float32, config: DecoderConfig = CONFIG) -> DecoderWeights:
    """Random weights, and biases of all linears."""
    generator = torch.Generator().manual_seed(3)

    def linear(outputs: int, inputs: int) -> Dense:
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        bias = 0.3 * torch.randn(outputs, generator=generator)
        return Dense(weight.to(dtype), bias.to(dtype))

    c = config
    heads = c.num_heads * c.head_dim
    layers = tuple(
        LayerWeights(
            input_norm=1 + 0.1 * torch.randn(c.hidden_size, generator=generator),
            post_norm=1 + 0.1 * torch.randn(c.hidden_size, generator=generator),
            query_norm=None,
            key_norm=None,
            qkv=linear(heads + 2 * c.num_kv_heads * c.head_dim, c.hidden_size),
            output=linear(c.hidden_size, heads),
            gate_up=linear(2 * c.intermediate_size, c.hidden_size),
            down=linear(c.hidden_size, c.intermediate_size),
        )
        for _ in range(c.num_layers)
    )
    embedding = torch.randn(c.vocab_size, c.hidden_size, generator=generator).to(dtype)
    return DecoderWeights(
        config=c,
        dtype=dtype,
        device=torch.device("cpu"),
        dense_embedding=embedding,
        dense_head=embedding,
        final_norm=torch.ones(c.hidden_size),
        layers=layers,
        inv_freq=10000.0 ** (-torch.arange(0, c.head_dim, 2) / c.head_dim),
        rotary_scale=1.0,
        parameters=0,
        nbytes=0,
    )


def adapter(seed: int, config: DecoderConfig = CONFIG) -> tuple[Layout, torch.Tensor]:
    """On all projections, of ranks that differ between them."""
    modules = [
        LoraModule(
            layer=layer,
            projection=projection,
            rank=1 + (3 * place + layer + seed) % 7,
            scaling=0.7,
            a_key="",
            b_key="",
        )
        for layer in range(config.num_layers)
        for place, projection in enumerate(config.shapes)
    ]
    layout = Layout.of(modules, config.shapes, config.num_layers)
    generator = torch.Generator().manual_seed(seed)
    return layout, 0.3 * torch.randn(layout.length, generator=generator)


def _cache(weights: DecoderWeights) -> KvCache:
    return KvCache(
        num_layers=weights.config.num_layers,
        num_blocks=12,
        block_size=16,
        kv_heads=weights.config.num_kv_heads,
        head_dim=weights.config.head_dim,
        dtype=weights.dtype,
        device=weights.device,
    )


def steps(one: AdapterTable | None, other: AdapterTable | None) -> list[StepArrays]:
    """A prompt of each of three sequences, then a decode step of all: the first without an
    adapter, the others with one each."""
    prompts = [list(range(5, 24)), list(range(40, 47)), [9, 8, 7]]
    blocks = [[1, 2], [3], [4]]
    starts, ends = (0, 19, 26, 29), (0, 1, 2, 3)
    made = []
    for places, parts in (
        (starts, [(p, 0, b) for p, b in zip(prompts, blocks, strict=True)]),
        (ends, [([11], len(p), b) for p, b in zip(prompts, blocks, strict=True)]),
    ):
        segments = tuple(
            Segment(places[row], places[row + 1], table)
            for row, table in ((1, one), (2, other))
            if table is not None
        )
        made.append(replace(step(parts), segments=segments))
    return made


def serve(dtype: torch.dtype, *, adapters: bool = True) -> torch.Tensor:
    """All rows' logits, by one process."""
    weights = base(dtype)
    tables = [AdapterTable(*adapter(seed)) if adapters else None for seed in (1, 2)]
    decoder = Decoder(weights, _cache(weights), torch.float32)
    return torch.cat([decoder.execute(each).clone() for each in steps(*tables)])


def serve_part(shard: Shard, peers: Peers, dtype: torch.dtype) -> torch.Tensor:
    """The same, by one of several."""
    weights = shard_weights(base(dtype), shard)
    tables = [shard_adapter(*adapter(seed), CONFIG, shard) for seed in (1, 2)]
    decoder = ParallelDecoder(weights, _cache(weights), torch.float32, peers)
    return torch.cat([decoder.execute(each).clone() for each in steps(*tables)])


def process(index: int, count: int, folder: str) -> None:
    """One of ``count`` processes: serves in both dtypes, and writes its logits."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), count)
    dist.init_process_group("gloo", store=store, rank=index, world_size=count)
    try:
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            logits = serve_part(Shard(index, count), GroupPeers(), dtype)
            logits.numpy().tofile(Path(folder) / f"{name}.{index}")
    finally:
        dist.destroy_process_group()
