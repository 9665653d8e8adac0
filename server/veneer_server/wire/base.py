"""Types that the messages share."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["MemoryTier", "Message", "TierName", "Tops"]

TierName = Literal["disk", "host", "device"]

MemoryTier = Literal["host", "device"]

Tops = list[tuple[int, float]]
"""The most likely tokens at one position, with their log-probabilities."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all wire types."""
