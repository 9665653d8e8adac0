"""Judges a self-test: compares served answers with references. Pure functions.

An adapter passes if each log-probability is within the bound of its own reference, and the
answer is nearer to its own reference than to any other that the bound can distinguish from it.

The bound is above the rounding error of serving in the dtype, and below the effect of another
adapter's weights. Largest differences measured on SmolLM2-135M, 4-bit and unquantized, on four
texts of 28 to 32 tokens, over the base and 24 adapters of ranks 1 to 64, on a CPU: 0.00005 in
float32, 0.035 in float16, 0.29 in bfloat16; the two example adapters' references are 3.6 to 6.1
apart. So float32 reveals a single matrix scaled by 1.1; bfloat16 reveals a swapped, missing or
doubled adapter, but possibly not a small error. With inputs of 8 bits the largest difference
on 21 texts, over the base and the three example adapters, was 1.16, so that only an adapter
whose answer is farther than 2 from another's is told from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from veneer_registry.errors import VeneerError

__all__ = ["BOUNDS", "Answers", "Verdict", "judge"]

BOUNDS: Final[Mapping[str, float]] = {
    "float32": 1e-3,
    "float16": 0.1,
    "bfloat16": 0.5,
    "int8": 2.0,
}
"""Largest log-probability difference that passes, by what the base's weights are multiplied by;
see the module."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to compare for one adapter, or for the base.

    Attributes:
        name: ``name@revision``, or empty for the base.
        served, reference: log-probabilities of the same tokens, or the error that came instead.
    """

    name: str
    served: Sequence[float] | VeneerError
    reference: Sequence[float] | VeneerError


@dataclass(frozen=True, slots=True)
class Verdict:
    """See `SelfTestResult`. ``max_difference`` is NaN if there is nothing to compare."""

    name: str
    passed: bool
    max_difference: float
    bound: float
    nearest_other: float
    detail: str


def judge(answers: Sequence[Answers], bound: float) -> list[Verdict]:
    """One verdict per answer, in order; each is also compared with the others' references."""
    return [_judge(one, [o for o in answers if o is not one], bound) for one in answers]


def _judge(one: Answers, rest: Sequence[Answers], bound: float) -> Verdict:
    for found in (one.served, one.reference):
        if isinstance(found, VeneerError):
            return Verdict(one.name, False, float("nan"), bound, 0.0, str(found))
    own = _farthest(one.served, one.reference)
    others = [o for o in rest if not isinstance(o.reference, VeneerError)]
    distances = {o.name: _farthest(one.served, o.reference) for o in others}
    alike = [o.name for o in others if _farthest(one.reference, o.reference) <= bound]
    nearer = [name for name, far in distances.items() if name not in alike and not own < far]
    nearest = min(distances, key=lambda name: distances[name], default=None)
    nearest_other = 0.0 if nearest is None else distances[nearest]
    passed = own <= bound and not nearer
    if passed:
        detail = _cannot_tell(alike)
    elif nearest is not None and nearest_other <= bound:
        detail = f"it answers as {_shown(nearest)} should: evict both, and test again"
    else:
        detail = "its answer does not match its files: evict it, and test again"
        if not one.name:
            detail = "the base's answer does not match its weights: restart the server"
    return Verdict(one.name, passed, own, bound, nearest_other, detail)


def _cannot_tell(alike: Sequence[str]) -> str:
    if not alike:
        return ""
    names = ", ".join(map(_shown, alike))
    return (
        f"this prompt cannot distinguish it from {names}: their references are within the bound"
    )


def _shown(name: str) -> str:
    return name or "the base"


def _farthest(one: object, other: object) -> float:
    """Largest difference; NaN if any difference is NaN, so that every comparison fails."""
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape:
        return float("nan")
    return float(np.abs(a - b).max())
