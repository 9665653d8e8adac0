"""Random bases and adapters for `rounded_model`, and the native decoder on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from veneer_registry.adapter import LoraModule
from veneer_server.backends.native import linear as native_linear
from veneer_server.backends.native.decoder import NativeDecoder
from veneer_server.backends.native.library import BFLOAT16, FOUR_BIT, Library
from veneer_server.backends.native.linear import NativeLinear
from veneer_server.models.config import DecoderConfig
from veneer_server.models.linear import stack_biases
from veneer_server.models.loader import DecoderWeights, LayerWeights
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.arrays import Segment, StepArrays
from veneer_server.step.layout import Layout

from tests.paired import place_a
from tests.unit.server import test_decoder as oracle
from tests.unit.server.native.rounded_model import LINEARS, Base, Update

PROJECTIONS: Final[Mapping[str, Any]] = {name: f"{name}_proj" for name in LINEARS}
BF16: Final = torch.bfloat16
VOCABULARY: Final = 128
"""Vocabulary of a base with an identity head: its logits are the last norm's results."""


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Numbers of a normal distribution, the same on every CPU: `torch.randn` gives others with
    other instruction sets, and how many roundings go the other way depends on the numbers."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def make_base(
    generator: torch.Generator,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    inner: int = 192,
    layers: int = 1,
    epsilon: float = 1e-5,
    windows: Sequence[int | None] = (),
    zero: Sequence[str] = (),
    biases: Sequence[str] = (),
    qk_norm: bool = False,
    scale: Mapping[str, float] | None = None,
    rotary_scale: float = 1.0,
    vocabulary: int = VOCABULARY,
) -> Base:
    """Args:
    zero: matrices that are zero, so that their results do not contribute.
    biases: linears that have one.
    scale: factors for matrices; without one, their outputs have a spread of 1.
    """
    hidden = heads * dim

    def draw(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (normal(generator, *shape) * spread).bfloat16()

    def near_one(length: int) -> torch.Tensor:
        return 1 + 0.2 * normal(generator, length)

    shapes = {
        "q": (heads * dim, hidden),
        "k": (kv_heads * dim, hidden),
        "v": (kv_heads * dim, hidden),
        "o": (hidden, heads * dim),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    factors = dict.fromkeys(zero, 0.0) | dict(scale or {})
    matrices, norms, offsets = [], [], []
    for _ in range(layers):
        matrices.append(
            {
                name: draw(*shape, spread=factors.get(name, 1.0) / shape[1] ** 0.5)
                for name, shape in shapes.items()
            }
        )
        names = ("query", "key") if qk_norm else ()
        norms.append(
            {n: near_one(hidden) for n in ("input", "post")} | {n: near_one(dim) for n in names}
        )
        offsets.append({name: normal(generator, shapes[name][0]) for name in biases})
    return Base(
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        epsilon=epsilon,
        embedding=draw(vocabulary, hidden),
        head=torch.eye(vocabulary, hidden).bfloat16(),
        final_norm=near_one(hidden),
        inv_freq=10000.0 ** -(torch.arange(0, dim, 2).float() / dim),
        rotary_scale=rotary_scale,
        layers=matrices,
        norms=norms,
        windows=list(windows) or [None] * layers,
        biases=offsets,
    )


def adapter_of(
    generator: torch.Generator,
    base: Base,
    ranks: Mapping[str, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    scaling: float = 1.5,
) -> dict[tuple[int, str], Update]:
    """An adapter in every layer, with ranks by name; its updates are about as large as the
    base's outputs."""
    found = {}
    for index, matrices in enumerate(base.layers):
        for name, rank in ranks.items():
            outputs, inputs = matrices[name].shape
            a = normal(generator, rank, inputs) / inputs**0.5
            b = normal(generator, outputs, rank) / rank**0.5
            found[index, name] = Update(a.to(dtype), b.to(dtype), scaling)
    return found


def table_of(
    base: Base, adapter: Mapping[tuple[int, str], Update], dtype: torch.dtype = torch.bfloat16
) -> AdapterTable:
    """The adapter in a loader's memory layout."""
    modules = [
        LoraModule(
            layer=layer,
            projection=PROJECTIONS[name],
            rank=len(update.a),
            scaling=update.scaling,
            a_key="",
            b_key="",
        )
        for (layer, name), update in adapter.items()
    ]
    shapes = {PROJECTIONS[name]: tuple(m.shape) for name, m in base.layers[0].items()}
    pairs = dtype == torch.bfloat16
    layout = Layout.of(modules, shapes, len(base.layers), paired=pairs)
    run = torch.zeros(layout.length, dtype=dtype)
    for slot in layout.slots:
        update = adapter[slot.module.layer, slot.module.projection.removesuffix("_proj")]
        rank = slot.module.rank
        place_a(run, slot, update.a.T, paired=pairs)
        run.as_strided((rank, slot.fan_out), (slot.fan_out, 1), slot.b).copy_(update.b.T)
    return AdapterTable(layout, run)


Part = tuple[Sequence[int], int, Sequence[int], AdapterTable | None]
"""A sequence's part of a step: new tokens, their start, its blocks, its adapter."""


@dataclass
class Served:
    """The native decoder on a base.

    Attributes:
        block_size: tokens of a KV block.
        weights: its linears.
    """

    decoder: NativeDecoder
    block_size: int
    weights: DecoderWeights

    @classmethod
    def over(
        cls,
        library: Library,
        base: Base,
        *,
        threads: int = 1,
        blocks: int = 96,
        block_size: int = oracle.BLOCK,
        head: int = BFLOAT16,
        kind: int = BFLOAT16,
        int8_activations: bool = False,
    ) -> Served:
        """Args:
        kind: of the layers' weights.
        """
        weights = _weights(library, base, kind)
        decoder = NativeDecoder(
            library,
            weights,
            num_blocks=blocks,
            block_size=block_size,
            threads=threads,
            head=head,
            int8_activations=int8_activations,
        )
        return cls(decoder, block_size, weights)

    def as_packed(self, library: Library, base: Base) -> Base:
        """The base with the weights that the kernels have where inputs are of 8 bits. Those of
        attention are in bfloat16 where a key's heads are no whole blocks."""
        whole = base.heads // base.kv_heads * base.dim % 64 == 0
        layers = []
        for layer, matrices in zip(self.weights.layers, base.layers, strict=True):
            packed: dict[str, torch.Tensor] = {}
            for linear, names in (
                (layer.qkv, "q k v"),
                (layer.output, "o"),
                (layer.gate_up, "gate up"),
                (layer.down, "down"),
            ):
                assert isinstance(linear, NativeLinear)
                plain = torch.cat([part for part, _ in linear.expanded()])
                bytes_ = names != "o" or whole
                numbers = with_bytes(library, linear) if bytes_ else plain
                sizes = [len(matrices[name]) for name in names.split()]
                packed |= dict(zip(names.split(), numbers.split(sizes), strict=True))
            layers.append(packed)
        return replace(base, layers=layers)

    def step(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """One step of some sequences; returns the logits of each."""
        logits = self.rows(parts, range(sum(len(new) for new, *_ in parts)))
        return list(torch.split(logits, [len(new) for new, *_ in parts]))

    def rows(self, parts: Sequence[Part], rows: Sequence[int]) -> torch.Tensor:
        """One step; returns the logits of some of its rows, in this order."""
        arrays = oracle.step(
            [(list(new), start, list(blocks)) for new, start, blocks, _ in parts],
            self.block_size,
        )
        starts = arrays.row_starts.tolist()
        segments = tuple(
            Segment(begin, end, table)
            for (begin, end), (*_, table) in zip(pairwise(starts), parts, strict=True)
            if table is not None
        )
        fields = {name: getattr(arrays, name) for name in StepArrays.__slots__}
        fields |= {"segments": segments, "logit_rows": np.array(rows)}
        return self.decoder.execute(StepArrays(**fields)).clone()


def in_four_bits(module: nn.Linear) -> Any:
    """The same in NF4."""
    import bitsandbytes as bnb

    outputs, inputs = module.weight.shape
    bias = module.bias is not None
    made = bnb.nn.Linear4bit(inputs, outputs, bias=bias, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(
        module.weight.data.clone(), requires_grad=False, quant_type="nf4"
    )
    if bias:
        made.bias = module.bias
    return made.to("cpu").eval()


def with_bytes(library: Library, linear: NativeLinear) -> torch.Tensor:
    """The weights that inputs of 8 bits are multiplied by, float32 [outputs, inputs]."""
    struct = linear.struct
    book = None
    if struct.kind == FOUR_BIT:
        book = torch.tensor(list(struct.bytes)).float() * struct.unit
    twin = NativeLinear(
        library, struct.kind, linear.packed, linear.shape, None, book, struct.parts
    )
    return torch.cat([part for part, _ in twin.expanded()])


def _weights(library: Library, base: Base, kind: int) -> DecoderWeights:
    def fused(index: int, *names: str) -> Any:
        modules = []
        for name in names:
            matrix = base.layers[index][name]
            bias = base.biases[index].get(name) if base.biases else None
            module = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
            module.weight = nn.Parameter(matrix, requires_grad=False)
            if bias is not None:
                module.bias = nn.Parameter(bias, requires_grad=False)
            modules.append(module)
        if kind == BFLOAT16:
            return native_linear.fuse(library, modules, torch.bfloat16)
        if kind == FOUR_BIT:
            return native_linear.fuse(library, [in_four_bits(m) for m in modules], BF16)
        weight = torch.cat([module.weight for module in modules])
        parts = native_linear.parts_of(len(modules), len(weight))
        bias = stack_biases(modules, torch.float32)
        return native_linear.pack_dense(library, kind, weight, bias, parts)

    config = DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=len(base.embedding),
        hidden_size=base.hidden,
        intermediate_size=base.inner,
        num_layers=len(base.layers),
        num_heads=base.heads,
        num_kv_heads=base.kv_heads,
        head_dim=base.dim,
        rms_norm_eps=base.epsilon,
        context_length=4096,
        eos_token_ids=(0,),
        windows=tuple(base.windows),
        qk_norm="query" in base.norms[0],
        tied_head=False,
        quantization=None,
    )
    layers = tuple(
        LayerWeights(
            input_norm=norms["input"],
            post_norm=norms["post"],
            query_norm=norms.get("query"),
            key_norm=norms.get("key"),
            qkv=fused(index, "q", "k", "v"),
            output=fused(index, "o"),
            gate_up=fused(index, "gate", "up"),
            down=fused(index, "down"),
        )
        for index, norms in enumerate(base.norms)
    )
    return DecoderWeights(
        config=config,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        dense_embedding=base.embedding,
        dense_head=base.head,
        final_norm=base.final_norm,
        layers=layers,
        inv_freq=base.inv_freq,
        rotary_scale=base.rotary_scale,
        parameters=0,
        nbytes=0,
    )
