"""The kernel benchmark knows all the parts that the kernels time."""

from __future__ import annotations

from tests.bench.kernels import part_names
from tests.bench.work import EXPANDS, SHRINKS, kernel_work, packed_bytes


def test_every_part_with_work_is_timed() -> None:
    assert {*SHRINKS, *EXPANDS, "attend", "head"} <= set(part_names())


def test_work_of_a_product_is_its_packed_weight_and_its_sums() -> None:
    # 64 weights of 4 bits and the scale of them: 36 bytes.
    assert packed_bytes("nf4", 32, 64) == 32 * 36
    assert packed_bytes("8-bit", 32, 64) == 32 * 68
    assert packed_bytes("bf16", 32, 64) == 32 * 128
    work = kernel_work("nf4", 32, 64, rows=3)
    assert (work.bytes, work.flops) == (32 * 36, 2 * 3 * 32 * 64)
