"""bfloat16 rounding and the check on magnitudes, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from veneer_registry.values import find_problem, peak_bits, to_bfloat16

EDGES = [0.0, -0.0, 1.0, 3.4028235e38, 3.3895314e38, 1e-45, 65504.0, 65520.0, 1.00390625]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_rounding_equals_torch(values: list[float]) -> None:
    array = np.array(values + EDGES, np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(to_bfloat16(array), expected.view(np.uint16))


def test_nan_stays_nan() -> None:
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    rounded = to_bfloat16(bits.view(np.float32)).astype(np.uint32) << 16
    assert np.isnan(rounded.view(np.float32)).all()


NEAR_THE_LIMIT = st.floats(9900, 10100, width=32).flatmap(lambda x: st.sampled_from([x, -x]))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("serving", ["float32", "float16", "bfloat16"])
@given(values=st.lists(st.floats(width=16) | NEAR_THE_LIMIT, min_size=1, max_size=20))
def test_verdict_equals_a_look_at_every_element(
    dtype: str, serving: str, values: list[float]
) -> None:
    array = np.array(values, np.float32)
    in_file = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    tensor = torch.from_numpy(array).to(in_file)
    data = memoryview(tensor.view(torch.uint8).numpy().tobytes())
    served = tensor.to(getattr(torch, serving)).float()
    good = bool(torch.isfinite(served).all()) and float(tensor.float().abs().max()) <= 1e4
    assert (find_problem(peak_bits(data, dtype), dtype, serving) is None) == good  # type: ignore[arg-type]
