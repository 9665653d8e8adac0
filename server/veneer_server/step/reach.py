"""The KV blocks that attention still reaches if every layer has a window.

A token attends to as many tokens as the largest window has, including itself. Blocks that lie
wholly before these tokens are freed while the sequence runs. No torch.
"""

from __future__ import annotations


def first_reached(computed: int, window: int | None, block_size: int) -> int:
    """Index of the first block that the token at position ``computed`` attends to; later tokens
    reach no earlier block. ``window`` None: attention reaches all."""
    return 0 if window is None else max(0, computed - window + 1) // block_size


def most_blocks(tokens: int, window: int | None, chunk: int, block_size: int) -> int:
    """Maximum number of blocks that a sequence of ``tokens`` tokens holds at a time.

    Args:
        chunk: maximum number of its tokens that a step computes.
    """
    whole = -(-tokens // block_size)
    if window is None:
        return whole
    # A step reaches window + chunk - 1 tokens, at worst only the last one of the first block.
    return min(whole, -(-(window + chunk - 2) // block_size) + 1)
