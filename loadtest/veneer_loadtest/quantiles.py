"""Percentiles of samples, computed the same way for every figure of this package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Samples = Sequence[float] | npt.NDArray[np.float64]


def percentiles(values: Samples, shares: Samples) -> list[float]:
    """Return the interpolated value below which each of ``shares`` (0 to 1) of ``values`` lies.

    Raises:
        ValueError or IndexError: there are no values.
    """
    found: list[float] = np.quantile(np.asarray(values, dtype=np.float64), shares).tolist()
    return found


def percentile(values: Samples, share: float) -> float:
    """Return the interpolated value below which ``share`` (0 to 1) of ``values`` lies."""
    return percentiles(values, [share])[0]


def median(values: Samples) -> float:
    """The 50th percentile."""
    return percentile(values, 0.5)
