"""The file that ``make gpu-check`` writes; its schema is docs/gpu-check.schema.json."""

from __future__ import annotations

import inspect
import json
from typing import Final

import msgspec

FORMAT: Final = 1


class Kernels(msgspec.Struct, frozen=True, kw_only=True):
    """The self-test of the kernels on this card.

    Attributes:
        wrong: by subject, what is wrong.
        seeds: how often each was run, with other numbers.
        seconds: of all, compilation included.
    """

    checked: list[str]
    wrong: dict[str, str]
    seeds: int
    seconds: float


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """One number of streams over some adapters, each stream with one in turn.

    Attributes:
        adapters: 0: the base alone.
        ratio_to_base: of tokens/s, to our own base without adapters.
        ratio_to_peft: of tokens/s, to PEFT with the same adapters.
        bandwidth_share: bytes that a decode step must read on paper, a second, as a share of
            the data sheet's; None for a card or a base whose figures are not known.
    """

    adapters: int
    streams: int
    tokens_per_s: float
    first_token_p50_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    ratio_to_base: float | None = None
    ratio_to_peft: float | None = None
    bandwidth_share: float | None = None


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """A short run by one method, from the lab ``qlora-vs-lora``.

    Attributes:
        base_loss, val_loss: on held-out samples, before and after; it failed if they do not
            fall.
        peak_mb, planned_mb: of the card's memory; ``veneer-train plan``.
    """

    method: str
    base_loss: float
    val_loss: float
    tokens_per_s: float
    peak_mb: float
    planned_mb: float


class GpuCheck(msgspec.Struct, frozen=True, kw_only=True):
    """All that was checked and measured, in the order of its fields.

    Attributes:
        card: torch's name of it.
        capability: such as 9.0.
        answers: how far served answers of mixed batches are from PEFT's, by number of adapters:
            mean difference of log-probabilities, nats. Speed is measured only where it is
            small.
        swap: medians, milliseconds, by `veneer-loadtest swap`'s names; by tier.
        failed: steps that failed, and why. Where it is not empty, the command's status is 1.
    """

    format: int = FORMAT
    card: str
    capability: str
    versions: dict[str, str]
    base: str
    kernels: Kernels
    answers: dict[str, float] = {}
    serving: list[Serving] = []
    swap: dict[str, float] = {}
    training: list[Training] = []
    failed: dict[str, str] = {}
    seconds: float = 0.0


def schema_text() -> str:
    """The schema, with the classes' docstrings as descriptions."""
    schema = msgspec.json.schema(GpuCheck)
    for each in schema["$defs"].values():
        if "description" in each:
            each["description"] = inspect.cleandoc(each["description"])
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Result of make gpu-check"
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
