"""Types that the messages share."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec

TierName = Literal["disk", "host", "device"]

MemoryTier = Literal["host", "device"]

Tops = list[tuple[int, float]]
"""The most likely tokens at one position, with their log-probabilities."""

PackedTops = bytes
"""`Tops` in 12 bytes each. As Python objects they take 128, and as many allocations on the
event loop when a frame is decoded: a prompt has thousands of positions."""

_TOP: Final = struct.Struct("<id")


def pack_tops(tops: Sequence[tuple[int, float]]) -> PackedTops:
    """Pack the tokens of one position."""
    pack = _TOP.pack
    return b"".join([pack(token, logprob) for token, logprob in tops])


def unpack_tops(packed: PackedTops) -> Iterator[tuple[int, float]]:
    """Unpack the tokens of one position, likeliest first."""
    return _TOP.iter_unpack(packed)


def first_tops(packed: PackedTops, count: int) -> PackedTops:
    """Only the likeliest ``count`` tokens."""
    return packed[: count * _TOP.size]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all wire types."""
