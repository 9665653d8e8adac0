"""Attention of sequences with several new rows (prefill), over paged keys and values.

The new rows' keys and values are in the cache already, so a later chunk of a prompt needs no
special case. A program attends with a tile of rows of one head to tiles of tokens in order
(FlashAttention-2, Dao 2023). Tiles of tokens begin at multiples of their size, and a tile that
a row does not see leaves the row's result unchanged. So a row's bits depend neither on the
other rows of its tile nor on where chunks begin.

Layouts (for the others see `decode`):
    query      [rows, heads, dim] bfloat16; row stride given
    tiles      [tiles, 4] int32: sequence, first row, number of rows (0: an unused tile),
               position of the first row in its sequence. Rows of a tile are adjacent.
    out        [rows, heads, dim] bfloat16; row stride given

Grid: (tiles, heads).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
import triton
import triton.language as tl

from veneer_server.backends.cuda.attention.decode import capped

ROWS: Final = 64
"""Rows of a tile."""
BLOCK_TOKENS: Final = 32


@triton.jit
def attend_tiles(
    query,
    keys,
    values,
    tables,
    tiles,
    sinks,
    out,
    query_stride,
    out_stride,
    width,
    window,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.load(tiles + tile * 4)
    first = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    position = tl.load(tiles + tile * 4 + 3)
    if count == 0:
        return
    kv_head = head // (HEADS // KV_HEADS)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    of_row = (first + row).to(tl.int64)
    mine = (row[:, None] < count) & (d[None, :] < DIM)
    asked = tl.load(
        query + of_row[:, None] * query_stride + head * DIM + d[None, :], mask=mine, other=0.0
    )
    last = position + row
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    begin = tl.maximum(position + 1 - window, 0) // BLOCK_T * BLOCK_T
    for start in range(begin, position + count, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        stored = token < position + count
        block = tl.load(
            tables + sequence * width + token // BLOCK_SIZE, mask=stored, other=0
        ).to(tl.int64)
        place = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE) * DIM
        known = stored[:, None] & (d[None, :] < DIM)
        # A block that no row's window reaches may hold anything by now.
        known &= (token > position - window)[:, None]
        key = tl.load(keys + place[:, None] + d[None, :], mask=known, other=0.0)
        value = tl.load(values + place[:, None] + d[None, :], mask=known, other=0.0)
        scores = capped(tl.dot(asked, tl.trans(key)) * scale, CAP)
        seen = (token[None, :] <= last[:, None]) & (token[None, :] > last[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        # For a row that has seen nothing yet, minus infinity minus itself would be NaN.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(peak - level)
        each = tl.exp(scores - level[:, None])
        weight = weight * shrink + tl.sum(each, axis=1)
        total = tl.dot(each.to(tl.bfloat16), value, total * shrink[:, None])
        peak = higher
    if SINKS:
        sink = tl.load(sinks + head)
        higher = tl.maximum(peak, sink)
        shrink = tl.exp(peak - higher)
        weight = weight * shrink + tl.exp(sink - higher)
        total = total * shrink[:, None]
    target = out + of_row[:, None] * out_stride + head * DIM + d[None, :]
    tl.store(target, (total / weight[:, None]).to(out.dtype.element_ty), mask=mine)


def tile_table(
    chunks: Iterable[tuple[int, int, int, int]], tiles: int, device: torch.device
) -> torch.Tensor:
    """Cut chunks into tiles of at most `ROWS` rows: [tiles, 4], padded with unused tiles.

    Args:
        chunks: tuples of sequence, first row, one past the last row, position of the first row.

    Raises:
        ValueError: more than ``tiles`` tiles are needed.
    """
    cut = [
        (sequence, row, min(ROWS, end - row), position + row - begin)
        for sequence, begin, end, position in chunks
        for row in range(begin, end, ROWS)
    ]
    if len(cut) > tiles:
        raise ValueError(f"{len(cut)} tiles, more than the launch's {tiles}")
    cut += [(0, 0, 0, 0)] * (tiles - len(cut))
    return torch.tensor(cut, dtype=torch.int32, device=device).view(tiles, 4)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    cap: float,
) -> None:
    """Attend with all rows of ``tiles``. `decode.attend` describes ``scale``, ``window`` and
    ``cap``."""
    heads, dim = query.shape[1:]
    kv_heads, block_size = keys.shape[1:3]
    assert query.stride()[1:] == out.stride()[1:] == (dim, 1)
    assert heads % kv_heads == 0
    attend_tiles[(len(tiles), heads)](
        query,
        keys,
        values,
        tables,
        tiles,
        query if sinks is None else sinks,
        out,
        query.stride(0),
        out.stride(0),
        tables.shape[1],
        1 << 30 if window is None else window,
        scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        CAP=cap,
        SINKS=sinks is not None,
        BLOCK_SIZE=block_size,
        ROWS=ROWS,
        BLOCK_D=triton.next_power_of_2(max(dim, 16)),
        BLOCK_T=BLOCK_TOKENS,
        num_warps=8,
        num_stages=2,  # with 4 and 3, compiled for sm_80, registers spill
        enable_fp_fusion=True,
    )
