"""What cards can do by the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Card:
    """Attributes:
    bytes_per_s: of its memory.
    operations: dense bfloat16 multiplications and additions a second.
    """

    bytes_per_s: float
    operations: float

    def seconds(self, moved: float, operations: float) -> float:
        """The longer of moving bytes and computing: a bound for any kernel."""
        return max(moved / self.bytes_per_s, operations / self.operations)


CARDS: Final = {
    "L4": Card(300e9, 121e12),
    "A100": Card(2039e9, 312e12),
    "H100": Card(3350e9, 989e12),
}
"""A100 and H100 with 80 GB, SXM."""


def card_of(name: str) -> Card | None:
    """By the name that torch gives, such as "NVIDIA H100 80GB HBM3". PCIe models and other
    sizes have slower memory, so they are not known."""
    words = name.replace("-", " ").split()
    if "PCIe" in words or "NVL" in words or "40GB" in words or "MIG" in words:
        return None
    return next((card for known, card in CARDS.items() if known in words), None)
