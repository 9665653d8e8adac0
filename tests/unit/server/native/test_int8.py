"""Inputs of 8 bits (``--int8-activations``): products against float64 that rounds the same
inputs, and whole steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from veneer_server.backends.native.compiler import cpu_flags
from veneer_server.backends.native.forms import AMX, forms_of
from veneer_server.backends.native.library import BFLOAT16, EIGHT_BIT, FOUR_BIT, Library, Linear
from veneer_server.backends.native.linear import int8_gain, table_bits, table_bytes
from veneer_server.models.checkpoint.code_books import NF4

from tests.kernels_once import EMULATED, emulated_kernels, kernels_built
from tests.unit.server.native.model_kit import (
    Served,
    adapter_of,
    make_base,
    table_of,
    with_bytes,
)
from tests.unit.server.native.rounded_model import int8_rounded, logits_of
from tests.unit.server.native.test_kernels import assert_same, seeded, some_tokens
from tests.unit.server.native.test_native import KINDS, ROWS, SEED, draw

INT8_KINDS = sorted(set(KINDS) - {"bfloat16"})
SHAPES = ((32, 64), (96, 192), (40, 128), (7, 64))
TINY = 2.0**-130
"""Too small for a scale: a 127th of it is denormal."""


def made(library: Library, kind: str, outputs: int, inputs: int) -> Any:
    """A linear with inputs of 8 bits, and its bias."""
    torch.manual_seed(SEED)
    linear, _, bias = KINDS[kind][0](library, outputs, inputs)
    linear.struct.int8_inputs = 1
    return linear, bias


@pytest.mark.parametrize("kind", INT8_KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_product_is_that_of_the_rounded_inputs(
    library: Library, kind: str, outputs: int, inputs: int
) -> None:
    print(f"seed {SEED}")
    linear, bias = made(library, kind, outputs, inputs)
    exact = with_bytes(library, linear).double()
    for rows in ROWS:
        x = draw(rows, inputs)
        got = linear(x)
        want = torch.nn.functional.linear(int8_rounded(x.double()), exact, bias.double())
        # Sums are of integers; scales and totals of three blocks lose some units of float32.
        scale = torch.nn.functional.linear(x.abs().double(), exact.abs()) + 1
        assert float(((got - want).abs() / scale).max()) < 1e-6, rows
        for row in {0, rows // 2, rows - 1}:
            alone = linear(x[row : row + 1])
            assert torch.equal(alone[0].view(torch.int32), got[row].view(torch.int32)), row


def test_bytes_fit_the_code_book() -> None:
    """NF4's numbers before they were rounded to bfloat16, which others would fit better."""
    fitted, unit = table_bytes(table_bits(torch.tensor(NF4).bfloat16()))
    assert fitted == (
        -112,
        -78,
        -59,
        -44,
        -32,
        -21,
        -10,
        0,
        9,
        18,
        28,
        38,
        49,
        63,
        81,
        112,
    )
    assert unit == pytest.approx(1 / 112.03, abs=1e-6)
    # Thirds, halves and a 192nd: FP4. Any other book is fitted as it is.
    book = torch.tensor([0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]).bfloat16()
    fitted, unit = table_bytes(table_bits(torch.cat([book, -book])))
    apart = torch.tensor(fitted[:8]).double() * unit - book.double()
    assert float(apart.abs().max()) < 0.0045


@pytest.mark.parametrize("kind", INT8_KINDS)
def test_rounding_costs_less_than_a_hundredth(library: Library, kind: str) -> None:
    linear, bias = made(library, kind, 96, 192)
    x = draw(40, 192)
    rounded = linear(x) - bias
    linear.struct.int8_inputs = 0
    exact = linear(x) - bias
    apart = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < apart < 0.01, "a control: it does round"


class Slow(Library):
    """A FAKE: a multiply takes as long as it says."""

    def __init__(self, real: Library, seconds: Callable[[int, bool], float]) -> None:
        self._real, self._seconds = real, seconds
        self.now = 0.0

    def pack_four_bit(self, *given: Any, **options: Any) -> torch.Tensor:
        return self._real.pack_four_bit(*given, **options)

    def multiply(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        self.now += self._seconds(len(x), bool(linear.int8_inputs))
        return x


def test_what_inputs_of_8_bits_would_gain_is_told_if_it_is_much(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(seconds: Callable[[int, bool], float]) -> str:
        slow = Slow(library, seconds)
        monkeypatch.setattr(time, "perf_counter", lambda: slow.now)
        return int8_gain(slow)

    assert told(lambda rows, int8: 1.0) == ""
    assert told(lambda rows, int8: 0.9 if int8 else 1.0) == ""
    much = told(lambda rows, int8: 1.0 if int8 and rows > 1 else 4.0)
    assert "1, 8 and 32 sequences about 1.0, 1.8 and 2.1 times as fast" in much
    assert "perplexity" in much


def test_halves_are_rounded_to_even(library: Library) -> None:
    linear, _ = made(library, "eight bits", 32, 64)
    x = torch.zeros(2, 64).bfloat16()
    x[:, 0] = 127
    x[0, 1:9] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 62.5, 63.5])
    x[1, 1:9] = torch.tensor([0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 62.0, 64.0])
    got = linear(x)
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("rows", [2, 6, 20])
def test_what_is_no_number_stays_none_in_its_own_row(library: Library, rows: int) -> None:
    linear, bias = made(library, "nf4", 40, 128)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = draw(rows, 128)
        want = linear(x)
        x[1, 70] = bad
        got = linear(x)
        assert bool(got[1].isnan().all())
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[2:], want[2:])
    nothing = torch.zeros(rows, 128).bfloat16()
    assert torch.equal(linear(nothing), bias.expand(rows, -1))
    nothing[0, 3], nothing[rows - 1, 100] = TINY, -TINY
    torch.testing.assert_close(linear(nothing), bias.expand(rows, -1), rtol=0, atol=1e-30)


@pytest.mark.verify
@pytest.mark.parametrize("kind", INT8_KINDS)
def test_every_instruction_set_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    """Integers add up exactly in any order."""
    results = {}
    # The system may deny matrix registers; "auto" has them where it does not.
    here = [f for f in forms_of("x86_64") if f.needs <= cpu_flags() and f is not AMX]
    files = {
        **{f"{f.name} emulated": emulated_kernels(tmp_path_factory, f) for f in EMULATED},
        **{f.name: kernels_built(tmp_path_factory, f.name) for f in here},
        "software-matrix": kernels_built(tmp_path_factory, "software-matrix"),
        "auto": kernels_built(tmp_path_factory),
    }
    for form, file in files.items():
        library = Library(file)
        linear, _ = made(library, kind, 104, 192)
        torch.manual_seed(SEED)
        results[form] = torch.cat([linear(draw(rows, 192)) for rows in ROWS])
    for form, result in results.items():
        assert torch.equal(result.view(torch.int32), results["auto"].view(torch.int32)), form


# ---------------------------------------------------------------------- whole steps


STEPS: dict[str, dict[str, Any]] = {
    "heads of whole blocks": {"heads": 4, "kv_heads": 2, "dim": 32},
    "heads of parts of a block": {"heads": 8, "kv_heads": 8, "dim": 16},
    "heads beyond those at once": {"heads": 14, "kv_heads": 1, "dim": 64},
    "two layers": {"layers": 2},
    "a window, biases and norms": {
        "windows": [9],
        "biases": ("q", "o", "up", "down"),
        "qk_norm": True,
    },
}


@pytest.mark.parametrize("kind", [FOUR_BIT, EIGHT_BIT])
@pytest.mark.parametrize("shape", sorted(STEPS))
def test_a_step_rounds_what_its_weights_are_multiplied_by(
    library: Library, shape: str, kind: int
) -> None:
    """And nothing else: adapters get the same inputs as ever."""
    generator = seeded()
    base = make_base(generator, **STEPS[shape])
    adapter = adapter_of(generator, base, dict.fromkeys(base.layers[0], 5))
    tokens = some_tokens(generator, 110)
    served = Served.over(library, base, threads=2, kind=kind, int8_activations=True)
    (got,) = served.step([(tokens, 0, range(1, 8), table_of(base, adapter))])
    packed = served.as_packed(library, base)
    want = logits_of(packed, tokens, adapter, int8=True)
    plain = logits_of(packed, tokens, adapter)

    def apart(one: torch.Tensor) -> float:
        return float((one.double() - want).square().mean().sqrt() / want.std())

    # What rounds the other way in bfloat16 may do so in 8 bits too, by a 127th.
    assert apart(got) < 0.25 * apart(plain)
    assert apart(got) < 6e-3


def test_long_contexts_are_rounded_too(library: Library) -> None:
    """Pieces of attention that threads share are merged by another phase."""
    generator = seeded()
    base = make_base(generator)
    tokens = some_tokens(generator, 540)
    served = Served.over(library, base, threads=3, kind=FOUR_BIT, int8_activations=True)
    served.step([(tokens[:535], 0, range(1, 36), None)])
    steps = [served.step([([tokens[at]], at, range(1, 36), None)])[0] for at in range(535, 540)]
    packed = served.as_packed(library, base)
    want = logits_of(packed, tokens, int8=True)[535:]
    apart = float((torch.cat(steps).double() - want).square().mean().sqrt() / want.std())
    plain = float((logits_of(packed, tokens)[535:] - want).square().mean().sqrt() / want.std())
    assert apart < 0.25 * plain


def test_the_head_s_inputs_are_rounded(library: Library) -> None:
    generator = seeded()
    base = make_base(generator, zero=("o", "down"))
    tokens = some_tokens(generator, 20)
    options: Any = {"kind": EIGHT_BIT, "head": EIGHT_BIT}
    (got,) = Served.over(library, base, int8_activations=True, **options).step(
        [(tokens, 0, [1, 2], None)]
    )
    (plain,) = Served.over(library, base, **options).step([(tokens, 0, [1, 2], None)])
    want = int8_rounded(plain.double())  # the head is an identity matrix
    assert not torch.equal(got, plain)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-6)


def test_rows_threads_and_chunks_change_nothing(library: Library) -> None:
    generator = seeded()
    base = make_base(generator, layers=2)
    adapter = table_of(base, adapter_of(generator, base, dict.fromkeys(base.layers[0], 17)))
    tokens = some_tokens(generator, 70)
    mine = [2, 14, 5, 9, 20]
    options: Any = {"kind": FOUR_BIT, "head": EIGHT_BIT, "int8_activations": True}
    (whole,) = Served.over(library, base, **options).step([(tokens, 0, mine, adapter)])
    served = Served.over(library, base, threads=3, **options)
    chunks = []
    for number, (begin, end) in enumerate(pairwise((0, 1, 2, 5, 9, 20, 21, 48, 70))):
        others = [(tokens[i : i + 3], 0, [21 + i], None) for i in range(2 * number)]
        chunks.append(served.step([(tokens[begin:end], begin, mine, adapter), *others])[0])
    assert torch.equal(torch.cat(chunks).view(torch.int32), whole.view(torch.int32))


def test_weights_in_bfloat16_keep_their_inputs(library: Library) -> None:
    generator = seeded()
    base = make_base(generator)
    tokens = some_tokens(generator, 20)
    served = Served.over(library, base, kind=BFLOAT16, int8_activations=True)
    (got,) = served.step([(tokens, 0, [1, 2], None)])
    assert_same(got, logits_of(base, tokens))
