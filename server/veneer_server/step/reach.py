"""Which blocks of the KV cache attention still reaches, where every layer has a window.

A token attends to as many tokens as the largest window has, itself included. Blocks that lie
wholly before them are given back while the sequence runs. No torch.
"""

from __future__ import annotations


def first_reached(computed: int, window: int | None, block_size: int) -> int:
    """Index of the first block that the token at position ``computed`` attends to, and so do
    none before it. ``window`` None: attention reaches all."""
    return 0 if window is None else max(0, computed - window + 1) // block_size


def most_blocks(tokens: int, window: int | None, chunk: int, block_size: int) -> int:
    """Most blocks that a sequence of so many tokens holds at a time.

    Args:
        chunk: most tokens of it that a step computes.
    """
    whole = -(-tokens // block_size)
    if window is None:
        return whole
    # A step reaches window + chunk - 1 tokens. Of their first block, only the last may be.
    return min(whole, -(-(window + chunk - 2) // block_size) + 1)
