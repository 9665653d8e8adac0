"""Sampling options: the only list of them, with the range of each.

Both APIs pass on the options that a caller set (`serving.records.Sampling`), under these names;
the base's defaults fill in the rest, and the record crosses the wire unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Final, NamedTuple, get_type_hints

import msgspec

from veneer_server.wire.base import Message


class Range(NamedTuple):
    """Allowed values of an option.

    Attributes:
        fix: advice for a caller whose value is out of range.
        of_base: whether a base's ``generation_config.json`` may set a default for it.
    """

    least: float
    most: float
    fix: str
    of_base: bool = False


_PENALTY: Final = Range(-2, 2, "give -2 to 2; 0 is off")


class SamplingParams(Message, frozen=True):
    """Resolved sampling: every option is set. The defaults turn an option off.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        seed: the random stream of this request; the same seed, request and
            logits give the same tokens.
        repetition_penalty: for tokens in the prompt or output; 1 is off. Logits are divided
            by it, and would overflow if it were much less than 0.01.
        presence_penalty, frequency_penalty: for tokens in the output; 0 is off.
        logit_bias: added to the logits of these token ids; see `serving.checks`.
    """

    temperature: Annotated[
        float, Range(0, 100, "give 0 (greedy) to 100, or leave it unset", of_base=True)
    ] = 1.0
    top_k: Annotated[int, Range(0, (1 << 32) - 1, "give 0 (off) or more", of_base=True)] = 0
    top_p: Annotated[
        float, Range(math.ulp(0.0), 1, "give more than 0 and at most 1", of_base=True)
    ] = 1.0
    seed: int = 0
    min_p: Annotated[float, Range(0, 1, "give 0 (off) to 1", of_base=True)] = 0.0
    repetition_penalty: Annotated[
        float, Range(0.01, 100, "give 0.01 to 100; 1 is off", of_base=True)
    ] = 1.0
    presence_penalty: Annotated[float, _PENALTY] = 0.0
    frequency_penalty: Annotated[float, _PENALTY] = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)

    @property
    def needs_token_counts(self) -> bool:
        """Whether choosing a token requires counts of the tokens before it."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


_HINTS: Final = get_type_hints(SamplingParams, include_extras=True)

RANGES: Final[Mapping[str, Range]] = {
    name: said[0]
    for name, hint in _HINTS.items()
    if (said := getattr(hint, "__metadata__", ()))
}
"""Range of each numeric option except ``seed``: all seeds are valid. Biases are checked
separately."""

FRACTIONS: Final = tuple(name for name in RANGES if _HINTS[name].__origin__ is float)

OF_BASE: Final = tuple(name for name, allowed in RANGES.items() if allowed.of_base)
