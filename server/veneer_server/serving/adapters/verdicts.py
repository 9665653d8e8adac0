"""The self-test's judgement: what was served against what it must be. Pure.

An adapter passes when each log-probability is within the bound of its own reference,
and nearer to it than to any other reference that the bound can tell from it.

What the bound is: above all that serving in the dtype adds by rounding, and below what
another adapter's weights do. Largest differences that were measured on SmolLM2-135M, 4-bit
and not, on four texts of 28 to 32 tokens, over the base and 24 adapters of ranks 1 to 64,
on a CPU: 0.00005 in float32, 0.035 in float16, 0.29 in bfloat16; the two example adapters'
references lie 3.6 to 6.1 apart. So in float32 a tenth more on a single matrix shows; in
bfloat16 an exchanged, missing or doubled adapter does, and a small error need not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from veneer_registry.errors import VeneerError

__all__ = ["BOUNDS", "Answers", "Verdict", "judge"]

BOUNDS: Final[Mapping[str, float]] = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference of a log-probability that passes, by serving dtype; see the module."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What there is to compare for one adapter, or for the base.

    Attributes:
        name: ``name@revision``, or empty for the base.
        served, reference: log-probabilities of the same tokens, or why there are none.
    """

    name: str
    served: Sequence[float] | VeneerError
    reference: Sequence[float] | VeneerError


@dataclass(frozen=True, slots=True)
class Verdict:
    """See `SelfTestResult`. ``max_difference`` is NaN where there is nothing to compare."""

    name: str
    passed: bool
    max_difference: float
    bound: float
    nearest_other: float
    detail: str


def judge(answers: Sequence[Answers], bound: float) -> list[Verdict]:
    """One verdict for each, in order; each is also compared with the others' references."""
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
        detail = f"it answers as {_shown(nearest)} must: evict both, and test again"
    else:
        detail = "its answer is not that of its files: evict it, and test again"
        if not one.name:
            detail = "the base's answer is not that of its weights: restart the server"
    return Verdict(one.name, passed, own, bound, nearest_other, detail)


def _cannot_tell(alike: Sequence[str]) -> str:
    if not alike:
        return ""
    names = ", ".join(map(_shown, alike))
    return (
        f"by this prompt it cannot be told from {names}: their references are within the bound"
    )


def _shown(name: str) -> str:
    return name or "the base"


def _farthest(one: object, other: object) -> float:
    """Largest difference; NaN where any of them is, so that no comparison holds."""
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape:
        return float("nan")
    return float(np.abs(a - b).max())
