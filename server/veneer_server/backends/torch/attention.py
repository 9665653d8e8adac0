"""Paged attention in torch.

K and V of a layer are [kv_heads, blocks, block_size, head_dim], so that picking
a sequence's blocks by `index_select` gives [kv_heads, tokens, head_dim] with no
further copy. Sequences with one new row (decode) are batched by length; those
with several (prefill) run one by one through torch's fused attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch.nn import functional as F

from veneer_server.backends.torch.threads import Threads
from veneer_server.step.arrays import StepArrays

GROUP_NUMBERS: Final = 120_000
"""Elements of K that take as long to read as the overhead of one more group of sequences:
about 0.1 ms within a step (AVX512 CPU, bfloat16)."""


class KvCache:
    """The KV pool of all layers, zeroed so that padding is finite.

    Attributes:
        block_numbers: elements of a block's K in one layer (or of its V).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (kv_heads, num_blocks, block_size, head_dim)
        self.block_size = block_size
        self.block_numbers = kv_heads * block_size * head_dim
        self.keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(num_layers)]

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store K and V ([rows, kv_heads, head_dim]) at ``slots`` [rows]."""
        for cache, new in ((self.keys[layer], keys), (self.values[layer], values)):
            flat = cache.view(cache.shape[0], -1, cache.shape[-1])
            flat.index_copy_(1, slots, new.transpose(0, 1).to(cache.dtype))

    def clear(self, blocks: list[int]) -> None:
        """Zero all K and V of these blocks."""
        for cache in (*self.keys, *self.values):
            cache[:, blocks] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros. On a CPU the system only backs pages once they are written to: a cache may
    be gigabytes that few requests ever need, and `torch.zeros` writes all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    numbers = np.zeros(shape, dtype=f"int{8 * dtype.itemsize}")
    return torch.from_numpy(numbers).view(dtype)


@dataclass(frozen=True, slots=True)
class _Decode:
    """Sequences of similar length that add one row each.

    Attributes:
        rows: [n] their rows, or None if the step has exactly these rows in order.
        blocks: [n * width] their blocks, padded. If every layer has a window, they start at the
            first block that any layer reaches.
        bias: window -> [n, 1, width * block_size] float32, 0 or -inf.
    """

    rows: torch.Tensor | None
    blocks: torch.Tensor
    bias: dict[int | None, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence with several rows.

    Attributes:
        seen: number of tokens from the start of the first block that any layer reaches to the
            last token.
        blocks: [width] the blocks of these tokens, or None if the K and V of all of them are
            computed in this step.
        mask: window -> [new, seen] bool, or None for a plain causal mask.
    """

    begin: int
    end: int
    seen: int
    blocks: torch.Tensor | None
    mask: dict[int | None, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The indices and masks that all layers of a step share, computed once per step."""

    decodes: tuple[_Decode, ...]
    prefills: tuple[_Prefill, ...]

    @classmethod
    def of(
        cls,
        step: StepArrays,
        *,
        cache: KvCache,
        windows: frozenset[int | None],
        device: torch.device,
    ) -> AttentionPlan:
        counts = np.diff(step.row_starts)
        # Each sequence's blocks from the first that a layer reaches.
        firsts = np.zeros_like(step.contexts)
        reaching = [window for window in windows if window is not None]
        if len(reaching) == len(windows):
            before = step.contexts - counts - max(reaching) + 1
            firsts = np.maximum(before, 0) // cache.block_size
        widths = -(-step.contexts // cache.block_size) - firsts
        decodes = tuple(
            _decode(step, chosen, firsts, widths, cache.block_size, windows, device)
            for chosen in _similar(np.flatnonzero(counts == 1), widths, cache.block_numbers)
        )
        prefills = tuple(
            _prefill(
                step, int(s), int(firsts[s]), int(widths[s]), cache.block_size, windows, device
            )
            for s in np.flatnonzero(counts > 1)
        )
        return cls(decodes, prefills)


def _similar(
    sequences: np.ndarray[tuple[int], np.dtype[np.int64]],
    widths: np.ndarray[tuple[int], np.dtype[np.int64]],
    block_numbers: int,
) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Group sequences of similar length to be read together, each group in the given order.

    Sequences are padded to the widest of their group. Those of the next smaller width
    join a group as long as all its padding costs less than another group would.
    """
    groups: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    widest = padding = 0
    for width in np.unique(widths[sequences])[::-1]:
        alike = sequences[widths[sequences] == width]
        padding += len(alike) * (widest - width) * block_numbers
        if groups and padding <= GROUP_NUMBERS:
            groups[-1] = np.sort(np.concatenate((groups[-1], alike)))
        else:
            groups.append(alike)
            widest, padding = width, 0
    return groups


def _decode(
    step: StepArrays,
    chosen: np.ndarray[tuple[int], np.dtype[np.int64]],
    firsts: np.ndarray[tuple[int], np.dtype[np.int64]],
    widths: np.ndarray[tuple[int], np.dtype[np.int64]],
    block_size: int,
    windows: frozenset[int | None],
    device: torch.device,
) -> _Decode:
    width = int(widths[chosen].max())
    first = firsts[chosen]
    contexts = torch.from_numpy(step.contexts[chosen] - first * block_size).unsqueeze(1)
    places = torch.arange(width * block_size).unsqueeze(0)
    bias: dict[int | None, torch.Tensor] = {}
    for window in windows:
        seen = places < contexts
        if window is not None:
            seen &= places >= contexts - window
        hidden = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        bias[window] = hidden.unsqueeze(1).to(device)
    everyone = len(chosen) == len(step.tokens)
    rows = None if everyone else torch.from_numpy(step.row_starts[chosen]).to(device)
    if first.any():
        # Past a table's end any block will do: nothing attends to it.
        columns = first[:, np.newaxis] + np.arange(width)
        columns = np.minimum(columns, step.block_tables.shape[1] - 1)
        table = step.block_tables[chosen[:, np.newaxis], columns]
    else:
        table = step.block_tables[chosen, :width]
    blocks = np.ascontiguousarray(table).reshape(-1)
    return _Decode(rows, torch.from_numpy(blocks).to(device), bias)


def _prefill(
    step: StepArrays,
    sequence: int,
    first: int,
    width: int,
    block_size: int,
    windows: frozenset[int | None],
    device: torch.device,
) -> _Prefill:
    begin, end = int(step.row_starts[sequence]), int(step.row_starts[sequence + 1])
    seen_tokens = int(step.contexts[sequence]) - first * block_size
    new = end - begin
    queries = torch.arange(seen_tokens - new, seen_tokens).unsqueeze(1)
    keys = torch.arange(seen_tokens).unsqueeze(0)
    mask: dict[int | None, torch.Tensor | None] = {}
    for window in windows:
        if new == seen_tokens and (window is None or seen_tokens <= window):
            mask[window] = None
            continue
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        mask[window] = seen.to(device)
    blocks = None
    if new < seen_tokens:
        table = step.block_tables[sequence, first : first + width]
        blocks = torch.from_numpy(table.copy()).to(device)
    return _Prefill(begin, end, seen_tokens, blocks, mask)


def attend(
    plan: AttentionPlan,
    cache: KvCache,
    layer: int,
    window: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    threads: Threads,
) -> torch.Tensor:
    """Attention of one layer, after the new K and V were written to the cache.

    Args:
        query: [rows, heads, head_dim] in the cache's dtype.
        key, value: [rows, kv_heads, head_dim], of the new rows.

    Returns:
        [rows, heads * head_dim] in the cache's dtype.
    """
    out = torch.empty_like(query)
    for group in plan.decodes:
        rows = query if group.rows is None else query.index_select(0, group.rows)
        result = _attend_decode(group, cache, layer, window, rows)
        if group.rows is None:
            out = result
        else:
            out.index_copy_(0, group.rows, result)
    for chunk in plan.prefills:
        here = slice(chunk.begin, chunk.end)
        if chunk.blocks is None:
            keys, values = key[here].transpose(0, 1), value[here].transpose(0, 1)
        else:
            keys = _pick(cache.keys[layer], chunk.blocks)[:, : chunk.seen]
            values = _pick(cache.values[layer], chunk.blocks)[:, : chunk.seen]
        mask = chunk.mask[window]
        with threads.product(2 * chunk.seen * query[here].numel()):
            attended = F.scaled_dot_product_attention(
                query[here].transpose(0, 1).unsqueeze(0),
                keys.unsqueeze(0),
                values.unsqueeze(0),
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )
        out[here] = attended[0].transpose(0, 1)
    return out.reshape(out.shape[0], -1)


def _pick(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[kv_heads, tokens, head_dim] of the blocks, in order."""
    picked = cache.index_select(1, blocks)
    return picked.view(cache.shape[0], -1, cache.shape[-1])


def _attend_decode(
    group: _Decode, cache: KvCache, layer: int, window: int | None, query: torch.Tensor
) -> torch.Tensor:
    """Attend with one query row per sequence: [n, heads, head_dim] -> the same shape."""
    # torch's fused attention is made for many query rows; for one it takes 20
    # times as long as two plain batched GEMMs (AVX512 CPU, bfloat16).
    n, heads, dim = query.shape
    kv_heads = cache.keys[layer].shape[0]
    keys = _pick(cache.keys[layer], group.blocks).view(kv_heads, n, -1, dim)
    values = _pick(cache.values[layer], group.blocks).view(kv_heads, n, -1, dim)
    # [kv_heads, n, heads / kv_heads, dim]
    grouped = query.view(n, kv_heads, heads // kv_heads, dim).transpose(0, 1)
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).float()
    scores.mul_(dim**-0.5).add_(group.bias[window])
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    return torch.matmul(weights, values).transpose(0, 1).reshape(n, heads, dim)
