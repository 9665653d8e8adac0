"""Reference for `decode` and `prefill`: one sequence at a time, in float64."""

from __future__ import annotations

import torch


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: torch.Tensor,
    position: int,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    window: int | None,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of one sequence's new rows, and the same sum over the values'
    magnitudes.

    Args:
        query: [rows, heads, dim], the rows from ``position`` on.
        keys, values: [blocks, kv_heads, block_size, dim].
        blocks: the sequence's blocks in order.

    Returns:
        Two tensors [rows, heads, dim] float64; rounding errors are judged against the second.
    """
    rows, heads, _ = query.shape
    _, kv_heads, block_size, _ = keys.shape
    tokens = torch.arange(position + rows)
    chosen = (blocks.long()[tokens // block_size], slice(None), tokens % block_size)
    group = heads // kv_heads
    # [heads, tokens, dim]; tokens that no row sees may be NaN.
    key, value = (
        cache[chosen].double().transpose(0, 1).repeat_interleave(group, dim=0)
        for cache in (keys, values)
    )
    scores = torch.einsum("rhd,htd->hrt", query.double(), key) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    last = torch.arange(position, position + rows).unsqueeze(1)
    seen = tokens <= last
    if window is not None:
        seen &= tokens > last - window
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.double().view(heads, 1, 1).expand(heads, rows, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(tokens)]
    value = value.masked_fill(~seen.any(dim=0).unsqueeze(-1), 0)
    out = torch.einsum("hrt,htd->rhd", weights, value)
    return out, torch.einsum("hrt,htd->rhd", weights, value.abs())
