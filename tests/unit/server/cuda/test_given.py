"""What the card's sampler is given of a request's options."""

from __future__ import annotations

import numpy as np
from veneer_server.backends.cuda.sampling.draw import given
from veneer_server.step.choice import TokenChoice
from veneer_server.wire.messages import SamplingParams


def test_the_largest_top_k_fits_the_kernels_numbers() -> None:
    """It is a uint32 in the APIs and an int32 in the kernel."""
    choice = TokenChoice(SamplingParams(top_k=(1 << 32) - 1), 0)
    numbers = np.zeros(1, np.int32)
    numbers[:] = given([choice])["top_k"]
    assert numbers[0] > 1 << 20, "still more than any vocabulary has"
