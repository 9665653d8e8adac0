"""A Llama in float64 that rounds to bfloat16 where the native kernels do, and nowhere else.

So a kernel may differ only by its float32 sums, 1e-6, and a factor that is off by a
thousandth is detected. It uses nothing of the product: the formulas are those of the models'
papers, reimplemented for one sequence at a time, without a cache.

The kernels round the inputs of every GEMM, queries, keys and values, the attention weights (of
each piece of 512 tokens, relative to its largest score), and the outputs of attention and gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

PIECE = 512
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16, as float64."""
    return x.float().bfloat16().double()


def int8_rounded(x: torch.Tensor) -> torch.Tensor:
    """Inputs of 8 bits: of each 64 neighbours, the nearest 127th of the largest; float64."""
    blocks = x.view(len(x), -1, 64)
    largest = blocks.abs().amax(-1, keepdim=True).float()
    inverse = (127 / largest.numpy()).astype("float32")
    steps = (blocks.float() * torch.from_numpy(inverse)).round().double()
    return (steps.nan_to_num() * (largest.double() / 127)).view_as(x)


@dataclass(frozen=True)
class Update:
    """One projection's adapter: y += scaling (x A^T) B^T.

    Attributes:
        a: [rank, inputs].
        b: [outputs, rank].
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass
class Base:
    """Weights as in a base's files: matrices with bfloat16 values, [outputs, inputs].

    Attributes:
        layers: for each layer its matrices by the names of `LINEARS`.
        biases: the same for biases, float32; a missing name has none.
        norms: for each layer ``input`` and ``post``, and perhaps ``query`` and ``key``.
        windows: tokens that a token attends to, including itself; None: all.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    epsilon: float
    embedding: torch.Tensor
    head: torch.Tensor
    final_norm: torch.Tensor
    inv_freq: torch.Tensor
    rotary_scale: float
    layers: list[dict[str, torch.Tensor]]
    norms: list[dict[str, torch.Tensor]]
    windows: list[int | None]
    biases: list[dict[str, torch.Tensor]] = field(default_factory=list)
    int8: bool = False


def logits_of(
    base: Base,
    tokens: Sequence[int],
    adapter: Mapping[tuple[int, str], Update] | None = None,
    *,
    int8: bool = False,
) -> torch.Tensor:
    """Logits after each token of one sequence, float64 [tokens, vocabulary].

    Args:
        int8: the layers' weights are multiplied by inputs of 8 bits, of attention where the
            heads that are computed together are whole blocks.
    """
    if int8:
        base = replace(base, int8=True)
    positions = torch.arange(len(tokens)).float().unsqueeze(1)
    # In float32 by definition of the models, as in a base's training.
    angles = (positions * base.inv_freq.float()).double()
    turns = tuple(
        (part.float() * base.rotary_scale).double() for part in (angles.cos(), angles.sin())
    )
    hidden = base.embedding.double()[list(tokens)]
    for index in range(len(base.layers)):
        hidden = hidden + _attention(base, index, hidden, adapter or {}, turns)
        hidden = hidden + _mlp(base, index, hidden, adapter or {})
    return rounded(_norm(hidden, base.final_norm, base.epsilon)) @ base.head.double().T


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def _project(
    base: Base,
    index: int,
    name: str,
    x: torch.Tensor,
    adapter: Mapping[tuple[int, str], Update],
) -> torch.Tensor:
    bias = base.biases[index].get(name) if base.biases else None
    group = base.heads // base.kv_heads
    whole = group * base.dim % 64 == 0
    inputs = int8_rounded(x) if base.int8 and (name != "o" or whole) else x
    weight = base.layers[index][name].double()
    y = F.linear(inputs, weight, None if bias is None else bias.double())
    update = adapter.get((index, name))
    if update is not None:
        y = y + update.scaling * (x @ update.a.double().T @ update.b.double().T)
    return y


def _attention(
    base: Base,
    index: int,
    hidden: torch.Tensor,
    adapter: Mapping[tuple[int, str], Update],
    turns: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    norms = base.norms[index]
    x = rounded(_norm(hidden, norms["input"], base.epsilon))
    count = len(x)

    def heads(name: str, number: int) -> torch.Tensor:
        """[number, tokens, dim]"""
        y = _project(base, index, name, x, adapter)
        return y.view(count, number, base.dim).transpose(0, 1)

    query, key = heads("q", base.heads), heads("k", base.kv_heads)
    if "query" in norms:
        query = _norm(query, norms["query"], base.epsilon)
        key = _norm(key, norms["key"], base.epsilon)
    query, key = rounded(_turned(query, turns)), rounded(_turned(key, turns))
    value = rounded(heads("v", base.kv_heads))
    group = base.heads // base.kv_heads
    results = [
        _attend(query[head], key[head // group], value[head // group], base.windows[index])
        for head in range(base.heads)
    ]
    return _project(base, index, "o", rounded(torch.cat(results, dim=1)), adapter)


def _turned(x: torch.Tensor, turns: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Rotary embedding of [heads, tokens, dim], halves convention."""
    cosine, sine = turns
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Attention of one head: [tokens, dim]."""
    count, dim = query.shape
    scores = query @ key.T / math.sqrt(dim)
    places = torch.arange(count)
    seen = places <= places.unsqueeze(1)
    if window is not None:
        seen &= places > places.unsqueeze(1) - window
    scores = scores.masked_fill(~seen, -math.inf)
    top = scores.amax(dim=1, keepdim=True)
    total = torch.zeros(count, 1, dtype=torch.float64)
    out = torch.zeros(count, dim, dtype=torch.float64)
    for begin in range(0, count, PIECE):
        piece = slice(begin, begin + PIECE)
        highest = scores[:, piece].amax(dim=1, keepdim=True)
        weights = rounded((scores[:, piece] - highest).exp().nan_to_num())
        share = (highest - top).exp()
        total += share * weights.sum(dim=1, keepdim=True)
        out += share * (weights @ value[piece])
    return out / total


def _mlp(
    base: Base, index: int, hidden: torch.Tensor, adapter: Mapping[tuple[int, str], Update]
) -> torch.Tensor:
    x = rounded(_norm(hidden, base.norms[index]["post"], base.epsilon))
    gate = _project(base, index, "gate", x, adapter)
    up = _project(base, index, "up", x, adapter)
    return _project(base, index, "down", rounded(F.silu(gate) * up), adapter)
