"""The launches in torch, in place of the kernels, for runs of thousands of steps.

They read and write the same device memory at the same addresses (tables, slots, the arena), so
what a graph has captured, and what is where, counts as it does for the kernels. That these
compute the same is the subject of ``python -m tests.gpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.nn import functional as F
from veneer_server.backends.cuda.attention import decode, prefill
from veneer_server.backends.cuda.fp8 import panels as fp8_panels
from veneer_server.backends.cuda.fp8 import reference as fp8
from veneer_server.backends.cuda.fp8 import rows as fp8_rows
from veneer_server.backends.cuda.fp8.packing import PackedFp8
from veneer_server.backends.cuda.lora import panels as lora_panels
from veneer_server.backends.cuda.lora import rows as lora_rows
from veneer_server.backends.cuda.lora.tables import AdapterSlots
from veneer_server.backends.cuda.nf4 import panels as nf4_panels
from veneer_server.backends.cuda.nf4 import reference as nf4
from veneer_server.backends.cuda.nf4 import rows as nf4_rows
from veneer_server.backends.cuda.nf4.packing import PackedNf4
from veneer_server.backends.cuda.pointwise.gate import gate
from veneer_server.backends.cuda.pointwise.norm import normalize
from veneer_server.backends.cuda.pointwise.rotary import place
from veneer_server.backends.cuda.sampling import draw, logprobs

Packed = PackedNf4 | PackedFp8
_EXPANDED: dict[int, tuple[Packed, torch.Tensor]] = {}


def _expanded(weight: Packed) -> torch.Tensor:
    """[out, in] bfloat16, computed once."""
    found = _EXPANDED.get(weight.numbers.data_ptr())
    if found is None:
        whole = nf4.expand(weight) if isinstance(weight, PackedNf4) else fp8.expand(weight)
        found = _EXPANDED[weight.numbers.data_ptr()] = weight, whole.bfloat16()
    return found[1]


def _normalize(hidden: Any, added: Any, weight: Any, out: Any, epsilon: float) -> None:
    if added is not None:
        hidden += added.float()
    scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + epsilon)
    out.copy_(hidden * scale * weight)


def _place(
    qkv: Any,
    positions: Any,
    slots: Any,
    turns: Any,
    norms: Any,
    query: Any,
    keys: Any,
    values: Any,
    epsilon: float,
) -> None:
    heads, kv, size = query.shape[1], *keys.shape[1:3]
    used = (slots >= 0).nonzero().squeeze(1)
    parts, slots = qkv[used].float(), slots[used]
    turned = parts[:, : heads + kv]
    if norms is not None:
        scale = torch.rsqrt(turned.square().mean(dim=-1, keepdim=True) + epsilon)
        weight = norms[[0] * heads + [1] * kv]
        turned = turned * scale * weight
    cosine, sine = turns[positions[used].long()].unsqueeze(2).unbind(dim=1)
    left, right = turned.chunk(2, dim=-1)
    turned = torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)
    query[used] = turned[:, :heads].bfloat16()
    keys[slots // size, :, slots % size] = turned[:, heads:].bfloat16()
    values[slots // size, :, slots % size] = parts[:, heads + kv :].bfloat16()


def _gate(pairs: Any, out: Any) -> None:
    left, right = pairs.float().chunk(2, dim=-1)
    out.copy_(F.silu(left) * right)


def _attended(
    query: Any, keys: Any, values: Any, table: Any, position: int, scale: float, window: Any
) -> torch.Tensor:
    """[rows, heads, dim] of one sequence's rows from ``position`` on."""
    rows, heads, _ = query.shape
    size = keys.shape[2]
    first = 0 if window is None else max(0, position - window + 1)
    tokens = torch.arange(first, position + rows)
    chosen = (table.long()[tokens // size], slice(None), tokens % size)
    group = heads // keys.shape[1]
    key, value = (
        c[chosen].float().transpose(0, 1).repeat_interleave(group, dim=0)
        for c in (keys, values)
    )
    scores = torch.einsum("rhd,htd->hrt", query.float(), key) * scale
    last = torch.arange(position, position + rows).unsqueeze(1)
    seen = tokens <= last
    if window is not None:
        seen &= tokens > last - window
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    return torch.einsum("hrt,htd->rhd", weights, value)


def _decode(
    query: Any,
    keys: Any,
    values: Any,
    tables: Any,
    contexts: Any,
    sinks: Any,
    sums: Any,
    weights: Any,
    out: Any,
    *,
    scale: float,
    window: int | None,
    cap: float,
) -> None:
    for row, context in enumerate(contexts.tolist()):
        assert context <= sums.shape[2] * decode.SPLIT, "more pieces than the launch has"
        if context:
            one = query[row : row + 1]
            out[row] = _attended(
                one, keys, values, tables[row], context - 1, scale, window
            ).bfloat16()


def _prefill(
    query: Any,
    keys: Any,
    values: Any,
    tables: Any,
    tiles: Any,
    sinks: Any,
    out: Any,
    *,
    scale: float,
    window: int | None,
    cap: float,
) -> None:
    for sequence, first, count, position in tiles.tolist():
        # Row by row, as in `_add`: torch's sums depend on shapes, the kernel's do not.
        for row in range(count):
            one = query[first + row : first + row + 1]
            out[first + row] = _attended(
                one, keys, values, tables[sequence], position + row, scale, window
            ).bfloat16()


def _add(
    x: Any, y: Any, arena: Any, tiles: Any, adapters: AdapterSlots, columns: Any, scratch: Any
) -> None:
    places = adapters.places.tolist()
    for first, count, slot in tiles.tolist():
        a, ranks, *rest = places[slot]
        if not count or not ranks:
            continue
        here = slice(first, first + count)
        matrix = arena[a : a + adapters.fan_in * ranks].view(adapters.fan_in, ranks).float()
        # Row by row: a row's bits must not depend on its tile.
        shrunk = torch.stack([row.float() @ matrix for row in x[here]])
        column = 0
        for member, fan_out in enumerate(adapters.fan_outs):
            b, rank, before = rest[3 * member : 3 * member + 3]
            if rank:
                grown = arena[b : b + rank * fan_out].view(rank, fan_out).float()
                scaling = float(adapters.scalings[slot, member])
                part = shrunk[:, before : before + rank]
                more = torch.stack([row @ grown for row in part]) * scaling
                y[here, column : column + fan_out] += more
            column += fan_out


def _multiply(x: Any, weight: Packed, bias: Any, partials: Any, y: Any) -> None:
    numbers = _expanded(weight).float()
    result = torch.stack([numbers @ row.float() for row in x])
    y.copy_(result if bias is None else result + bias)


def _expand(weight: Packed, begin: int, end: int, panel: Any) -> None:
    panel.copy_(_expanded(weight)[begin:end])


def _draw(logits: Any, settings: Any, top_k: Any, shares: Any, tokens: Any) -> None:
    for at, row in enumerate(logits):
        temperature, min_p = settings[at].tolist()
        top_p, random = shares[at].tolist()
        if temperature < draw.COLDEST:
            tokens[at] = row.argmax()
            continue
        weights = torch.softmax((row - row.max()) / temperature, dim=0).double()
        order = torch.arange(len(row))
        if int(top_k[at]) or top_p < 1 or min_p:
            weights, order = weights.sort(descending=True, stable=True)
            total = 1.0
            if int(top_k[at]):
                weights[int(top_k[at]) :] = 0
                total = float(weights.sum())
            before = weights.cumsum(dim=0) - weights
            gone = weights < min_p * weights[0]
            if top_p < 1:
                gone |= before >= top_p * total
            gone[0] = False
            weights = weights.masked_fill(gone, 0)
        sums = weights.cumsum(dim=0)
        place = torch.searchsorted(sums, sums[-1:] * random, right=True)
        tokens[at] = order[place.clamp(max=len(row) - 1)]


def _logprobs(logits: Any, tokens: Any, counts: Any, own: Any, tops: Any, top_own: Any) -> None:
    # Row by row, as the host computes those of rows that it samples.
    sums = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    every = logits - sums.unsqueeze(1)
    own.copy_(every.gather(1, tokens.unsqueeze(1)).squeeze(1))
    values, ids = every.sort(dim=1, descending=True, stable=True)
    width = tops.shape[1]
    tops.copy_(ids[:, :width])
    top_own.copy_(values[:, :width])


PLAIN: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    normalize: _normalize,
    place: _place,
    gate: _gate,
    decode.attend: _decode,
    prefill.attend: _prefill,
    lora_rows.add_rows: _add,
    lora_panels.add_panels: _add,
    nf4_rows.multiply: _multiply,
    nf4_panels.expand: _expand,
    fp8_rows.multiply: _multiply,
    fp8_panels.expand: _expand,
    draw.draw: _draw,
    logprobs.logprobs: _logprobs,
}
"""By the function that launches the kernels."""
