"""The bytes and operations of a whole step, from a model's shape, and the time they take on
paper.

Lower bounds for any implementation: each weight, each token in the KV cache and each adapter of
the step is read once, and nothing waits for anything. ``python -m tests.gpu.check.steps``
prints the table of docs/measurements/gpu-checks.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from tests.gpu.cards import CARDS, Card

Weights = Literal["nf4", "fp8", "bf16"]
BITS: Final[dict[Weights, float]] = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "fp8": 8, "bf16": 16}
"""Of a weight, scales included; FP8's scale for each output counts nothing."""


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a Llama."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocab: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of each projection of a layer."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        h, i = self.hidden, self.inner
        return (q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)

    @property
    def linear_weights(self) -> int:
        """Of all layers."""
        return self.layers * sum(outputs * inputs for outputs, inputs in self.linears)

    def lora_weights(self, rank: int) -> int:
        """Of an adapter of all projections."""
        return self.layers * rank * sum(outputs + inputs for outputs, inputs in self.linears)


LLAMA_7B: Final = Model(32, 4096, 11008, 32, 32, 128, 32000)
LLAMA_70B: Final = Model(80, 8192, 28672, 64, 8, 128, 128256)


@dataclass(frozen=True, slots=True)
class Step:
    """Attributes:
    rows: tokens of the step, of ``sequences`` sequences with ``context`` tokens each at its
    end.
    adapters: distinct ones, of ``rank``; every row has one. 0: none has.
    """

    rows: int
    sequences: int
    context: int
    adapters: int = 0
    rank: int = 16


def seconds(model: Model, step: Step, weights: Weights, card: Card) -> float:
    """On paper. Linears, attention, adapters and the head run one after the other."""
    linears = model.linear_weights
    total = card.seconds(linears * BITS[weights] / 8, 2 * step.rows * linears)
    kv = 2 * model.layers * model.kv_heads * model.head
    # A row sees those before it: the last of its sequence all of the context.
    pairs = step.rows * (step.context - (step.rows / step.sequences - 1) / 2)
    attended = 4 * model.layers * model.heads * model.head * pairs
    total += card.seconds(2 * kv * step.sequences * step.context, attended)
    lora = model.lora_weights(step.rank)
    if step.adapters:
        total += card.seconds(2 * lora * step.adapters, 2 * step.rows * lora)
    head = model.vocab * model.hidden
    return total + card.seconds(2 * head, 2 * step.sequences * head)


ROWS: Final = (
    ("decode, 1 row", Step(1, 1, 1024)),
    ("decode, 8 rows", Step(8, 8, 1024)),
    ("decode, 8 rows of 8 adapters", Step(8, 8, 1024, 8)),
    ("decode, 64 rows", Step(64, 64, 1024)),
    ("decode, 64 rows of 32 adapters", Step(64, 64, 1024, 32)),
    ("prefill, 2 prompts of 1,024", Step(2048, 2, 1024)),
    ("prefill, 2 prompts of 1,024 with 2 adapters", Step(2048, 2, 1024, 2)),
)


def moved(model: Model, step: Step, weights: Weights) -> float:
    """Bytes that a step must read."""
    kv = 2 * model.layers * model.kv_heads * model.head
    numbers = kv * step.sequences * step.context + model.vocab * model.hidden
    numbers += step.adapters * model.lora_weights(step.rank)
    return model.linear_weights * BITS[weights] / 8 + 2 * numbers


def table(model: Model = LLAMA_7B) -> str:
    """In Markdown: a row for each step, milliseconds in NF4, FP8 and bfloat16 on each card."""
    lines = [
        "| step | " + " | ".join(CARDS) + " |",
        "| --- |" + " --- |" * len(CARDS),
    ]
    for name, step in ROWS:
        cells = [
            " / ".join(f"{1e3 * seconds(model, step, kind, card):.1f}" for kind in BITS)
            for card in CARDS.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
