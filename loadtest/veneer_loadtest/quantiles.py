"""Percentiles of samples, by one rule for every figure of this package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Samples = Sequence[float] | npt.NDArray[np.float64]


def percentiles(values: Samples, shares: Samples) -> list[float]:
    """The values below which each of ``shares`` (0 to 1) of ``values`` lies, interpolated.

    Raises:
        ValueError or IndexError: there are no values.
    """
    found: list[float] = np.quantile(np.asarray(values, dtype=np.float64), shares).tolist()
    return found


def percentile(values: Samples, share: float) -> float:
    """The same for one share."""
    return percentiles(values, [share])[0]


def median(values: Samples) -> float:
    """The 50th percentile."""
    return percentile(values, 0.5)
