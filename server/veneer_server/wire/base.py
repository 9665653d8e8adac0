"""What messages are made of."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["MemoryTier", "Message", "TierName", "Tops"]

TierName = Literal["disk", "host", "device"]

MemoryTier = Literal["host", "device"]

Tops = list[tuple[int, float]]
"""The most likely tokens at one place with their log-probabilities."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all wire types."""
