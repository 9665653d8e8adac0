"""The native kernels against torch in float32, each by itself and as a whole step."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer_registry.adapter import LoraModule
from veneer_server.backends.native import linear as native_linear
from veneer_server.backends.native.compiler import NativeUnavailable, build, cpu_flags
from veneer_server.backends.native.decoder import NativeDecoder
from veneer_server.backends.native.forms import InstructionSet
from veneer_server.backends.native.library import BFLOAT16, EIGHT_BIT, Library
from veneer_server.models.loader import load_weights
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.arrays import Segment, StepArrays
from veneer_server.step.layout import Layout

from tests.kernels_once import EMULATED, emulated_kernels, kernels_built
from tests.paired import paired, with_pairs
from tests.unit.server import test_decoder as oracle

SEED = 11
ROWS = (1, 2, 3, 5, 12, 13, 40, 97, 200)
"""Each kernel for few rows, groups of it, and more rows than a panel."""


def draw(*shape: int) -> torch.Tensor:
    """Numbers that bfloat16 holds."""
    return torch.randn(*shape).bfloat16()


def numbers(linear: native_linear.NativeLinear) -> torch.Tensor:
    return torch.cat([part for part, _ in linear.expanded()])


# ------------------------------------------------------------------------- products


def four_bit(kind: str) -> Callable[[Library, int, int], Any]:
    def make(library: Library, outputs: int, inputs: int) -> Any:
        import bitsandbytes as bnb

        module = bnb.nn.Linear4bit(inputs, outputs, bias=True, quant_type=kind)
        module = module.to("cpu").eval()
        linear = native_linear.fuse(library, [module], torch.bfloat16)
        exact = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return linear, exact.float(), module.bias.detach().float()

    return make


def dense(kind: int) -> Callable[[Library, int, int], Any]:
    def make(library: Library, outputs: int, inputs: int) -> Any:
        weight = draw(outputs, inputs)
        bias = torch.randn(outputs)
        return native_linear.pack_dense(library, kind, weight, bias), weight.float(), bias

    return make


KINDS = {
    # What the packed form may differ from the weight by, of the largest of its block: bfloat16
    # code books, nothing, half a 127th.
    "nf4": (four_bit("nf4"), 2**-8),
    "fp4": (four_bit("fp4"), 2**-8),
    "bfloat16": (dense(BFLOAT16), 0.0),
    "eight bits": (dense(EIGHT_BIT), 0.5 / 127 + 1e-6),
}


@pytest.mark.verify
@pytest.mark.parametrize("form", EMULATED, ids=lambda form: form.name)
def test_the_emulation_has_the_hardware_s_bits(
    tmp_path_factory: pytest.TempPathFactory, form: InstructionSet
) -> None:
    """Where there is the hardware; elsewhere the emulation stands for it."""
    if not form.needs <= cpu_flags():
        pytest.skip(f"this CPU has no {form.name}")
    results = []
    for file in (
        kernels_built(tmp_path_factory, form.name),
        emulated_kernels(tmp_path_factory, form),
    ):
        torch.manual_seed(SEED)
        library = Library(file)
        for make, _ in KINDS.values():
            linear, *_ = make(library, 40, 192)
            results.append([linear(draw(rows, 192)).view(torch.int32) for rows in ROWS])
    half = len(results) // 2
    for real, emulated in zip(results[:half], results[half:], strict=True):
        assert all(map(torch.equal, real, emulated))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 64), (96, 192), (40, 128), (7, 64)])
def test_a_product_is_the_sum_in_float32(
    library: Library, kind: str, outputs: int, inputs: int
) -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    make, bound = KINDS[kind]
    linear, weight, bias = make(library, outputs, inputs)
    packed = numbers(linear)
    assert packed.shape == weight.shape
    largest = weight.view(outputs, -1, 64).abs().amax(-1, keepdim=True)
    apart = (packed - weight).view(outputs, -1, 64).abs()
    assert bool((apart <= bound * largest).all())
    for rows in ROWS:
        x = draw(rows, inputs)
        got = linear(x)
        want = torch.nn.functional.linear(x.double(), packed.double(), bias.double())
        # Products of two bfloat16 are exact in float32; sums of up to 192 lose a few units.
        scale = torch.nn.functional.linear(x.abs().double(), packed.abs().double()) + 1
        assert float(((got - want).abs() / scale).max()) < 1e-6, rows


def test_q_k_and_v_are_multiplied_as_one(library: Library) -> None:
    torch.manual_seed(SEED)
    modules = [torch.nn.Linear(64, n, bias=n != 32) for n in (96, 32, 32)]
    fused = native_linear.fuse(library, modules, torch.bfloat16)
    x = draw(3, 64)
    want = torch.cat(
        [
            torch.nn.functional.linear(
                x.float(), m.weight.bfloat16().float(), m.bias if m.bias is not None else None
            )
            for m in modules
        ],
        dim=1,
    )
    torch.testing.assert_close(fused(x), want, atol=1e-5, rtol=1e-5)


def test_what_the_kernels_cannot_multiply_is_told(library: Library) -> None:
    # `NativeUnavailable` has words for the operator only; this is the size in them.
    with pytest.raises(NativeUnavailable, match="96 inputs"):
        native_linear.fuse(library, [torch.nn.Linear(96, 32)], torch.bfloat16)


# ---------------------------------------------------------------------- whole steps


def decoder(
    library: Library,
    folder: Path,
    threads: int = 2,
    head: int = EIGHT_BIT,
    num_blocks: int = 40,
    *,
    int8_activations: bool = False,
) -> NativeDecoder:
    weights = load_weights(
        folder,
        quantization="none",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        fuse=lambda modules, _: native_linear.fuse(library, modules, torch.bfloat16),
    )
    return NativeDecoder(
        library,
        weights,
        num_blocks=num_blocks,
        block_size=oracle.BLOCK,
        threads=threads,
        head=head,
        int8_activations=int8_activations,
    )


def saved(name: str, folder: Path) -> Path:
    """A base whose weights are bfloat16, so that rounding them is no difference."""
    oracle.save_random(oracle.SHAPES[name], folder).to(torch.bfloat16).save_pretrained(folder)
    return folder


def steps(tables: tuple[AdapterTable | None, AdapterTable | None]) -> list[StepArrays]:
    """Two sequences, mixed: a whole prompt, chunks, decoding, scattered blocks."""
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    first = torch.randint(3, 320, (70,), generator=generator).tolist()
    second = torch.randint(3, 320, (45,), generator=generator).tolist()
    one, other = [7, 3, 11, 1, 9], [2, 14, 5]
    parts = [[(first[:60], 0, one[:4]), (second[:20], 0, other[:2])]]
    parts.append([(first[60:61], 60, one[:4]), (second[20:40], 20, other)])
    for i in range(5):
        parts.append(
            [(first[61 + i : 62 + i], 61 + i, one), (second[40 + i :][:1], 40 + i, other)]
        )
    made = []
    for part in parts:
        arrays = oracle.step(part)
        split = len(part[0][0])
        edges = ((0, split), (split, len(arrays.tokens)))
        segments = tuple(
            Segment(begin, end, table)
            for (begin, end), table in zip(edges, tables, strict=True)
            if table is not None
        )
        fields = {name: getattr(arrays, name) for name in StepArrays.__slots__}
        made.append(StepArrays(**(fields | {"segments": segments})))
    return made


def adapter(
    config: Any,
    dtype: torch.dtype,
    ranks: tuple[int, ...],
    projections: tuple[Any, ...] | None = None,
    seed: int = 0,
) -> AdapterTable:
    generator = torch.Generator().manual_seed(seed)
    chosen = projections or tuple(config.shapes)
    modules = [
        LoraModule(
            layer=layer,
            projection=projection,
            rank=ranks[(layer + place) % len(ranks)],
            scaling=1.5,
            a_key="",
            b_key="",
        )
        for layer in range(config.num_layers)
        for place, projection in enumerate(chosen)
        if not (projections and layer == 1)
    ]
    layout = Layout.of(modules, config.shapes, config.num_layers)
    run = 0.1 * torch.randn(layout.length, generator=generator)
    return AdapterTable(layout, run.bfloat16().to(dtype))


def wrong_by(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Root mean square of the differences of logits, of their spread."""
    a, b = torch.cat(got), torch.cat(want)
    assert bool(a.isfinite().all())
    return float((a - b).square().mean().sqrt() / b.std())


def run_all(backend: Any, parts: list[StepArrays]) -> list[torch.Tensor]:
    if isinstance(backend, NativeDecoder):
        parts = [with_pairs(part) for part in parts]
    return [backend.execute(part).clone() for part in parts]  # a backend may use it again


@pytest.mark.parametrize("name", sorted(oracle.SHAPES))
def test_a_step_is_as_close_to_float32_as_torch_s_in_bfloat16(
    name: str, library: Library, tmp_path: Path
) -> None:
    folder = saved(name, tmp_path)
    exact = run_all(oracle.build(folder, torch.float32), steps((None, None)))
    rounded = run_all(oracle.build(folder, torch.bfloat16), steps((None, None)))
    native = run_all(decoder(library, folder, head=BFLOAT16), steps((None, None)))
    assert wrong_by(native, exact) <= wrong_by(rounded, exact)
    # Its head in 8 bits adds half a 127th of a block's largest weight: in three layers most of
    # what there is.
    native = run_all(decoder(library, folder), steps((None, None)))
    assert wrong_by(native, exact) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_of_any_rank_are_added_to_their_rows_alone(
    dtype: torch.dtype, library: Library, tmp_path: Path
) -> None:
    folder = saved("qwen2", tmp_path)
    plain = oracle.build(folder, torch.float32)
    config = plain.weights.config
    wide = {"ranks": (16, 3, 70, 1, 33)}
    few = {"ranks": (8,), "projections": ("v_proj", "down_proj"), "seed": 1}
    for first, second in ((wide, None), (few, wide), (None, few)):

        def tables(dtype: torch.dtype, *kinds: Any) -> Any:
            return tuple(adapter(config, dtype, **kind) if kind else None for kind in kinds)

        exact = run_all(plain, steps(tables(torch.float32, first, second)))
        native = run_all(decoder(library, folder), steps(tables(dtype, first, second)))
        base = run_all(plain, steps((None, None)))
        assert wrong_by(native, exact) < 0.02
        assert wrong_by(base, exact) > 0.2, "control: adapters that change nothing"


def test_a_broken_adapter_harms_its_own_rows_alone(library: Library, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    native = decoder(library, folder)
    config = native.weights.config
    whole, broken = (adapter(config, torch.bfloat16, (8,), seed=s) for s in (1, 2))
    broken.run[broken.run.numel() // 2] = torch.inf
    (want, *_) = run_all(native, steps((whole, None))[:1])
    (got, *_) = run_all(native, steps((whole, broken))[:1])
    assert torch.equal(got[:60], want[:60])
    assert not bool(got[60:].isfinite().all(-1).all())
    # The kernels say of each row whether it is all numbers.
    assert native.finite(got) == got.isfinite().all(-1).tolist()


def test_what_is_no_number_in_a_query_stays_none(library: Library, tmp_path: Path) -> None:
    """It reaches the logits through softmax alone, whose bounds must not make it a number."""
    folder = saved("llama", tmp_path)
    native = decoder(library, folder)
    broken = adapter(native.weights.config, torch.bfloat16, (8,), ("q_proj",))
    broken.run.fill_(torch.nan)
    (got, *_) = run_all(native, steps((None, broken))[:1])
    assert bool(got[:60].isfinite().all())
    assert bool(got[60:].isnan().all(-1).all())
    assert native.finite(got) == [True] * 60 + [False] * 20


def test_threads_change_nothing(library: Library, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    results = []
    for threads in (1, 2, 5):
        native = decoder(library, folder, threads)
        config = native.weights.config
        pair = tuple(adapter(config, torch.bfloat16, (8, 70), seed=s) for s in (1, 2))
        for _ in range(20):  # chunks fall to threads by chance
            results.append(torch.cat(run_all(native, steps(pair))))  # type: ignore[arg-type]
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.verify
def test_threads_that_are_put_aside_change_nothing(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled so that threads sleep with a chunk of work in their hands, now and then: others
    do it again and go on, and it is done once more when they are back."""
    folder = saved("llama", tmp_path)
    monkeypatch.setenv("CXX", f"{os.environ.get('CXX', 'c++')} -DVENEER_STALLS")
    stalling = Library(build(tmp_path, library.instructions))

    def run(chosen: Library, threads: int) -> list[torch.Tensor]:
        native = decoder(chosen, folder, threads)
        config = native.weights.config
        pair = tuple(adapter(config, torch.bfloat16, (8, 70), seed=s) for s in (1, 2))
        mine = list(range(1, 35))  # 521 tokens: pieces of attention that threads share
        tokens = [3 + at % 300 for at in range(521)]
        long = [oracle.step([(tokens[a:b], a, mine)]) for a, b in ((0, 520), (520, 521))]
        return run_all(native, [*steps(pair), *long])  # type: ignore[arg-type]

    expected = run(library, 1)
    for threads in (2, 3, 5):
        for _ in range(2):
            for got, want in zip(run(stalling, threads), expected, strict=True):
                assert torch.equal(got, want), threads


def test_a_row_s_logits_do_not_depend_on_its_company(library: Library, tmp_path: Path) -> None:
    """To the bit: alone or beside others, in one chunk or several, whoever shares a product."""
    print(f"seed {SEED}")
    folder = saved("qwen2-window", tmp_path)
    native = decoder(library, folder)
    config = native.weights.config
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(3, 320, (70,), generator=generator).tolist()
    table = adapter(config, torch.bfloat16, (16, 3, 70))
    mine = [2, 14, 5, 9, 20]

    def ask(begin: int, end: int, *others: tuple[list[int], int, list[int]]) -> torch.Tensor:
        arrays = oracle.step([(tokens[begin:end], begin, mine), *others])
        fields = {name: getattr(arrays, name) for name in StepArrays.__slots__}
        fields["segments"] = (Segment(0, end - begin, paired(table)),)
        return native.execute(StepArrays(**fields))[: end - begin].clone()

    alone = torch.cat([ask(at, at + 1) for at in range(70)])
    native.clear(mine)
    assert torch.equal(ask(0, 70), alone)
    native.clear(mine)
    crowd = [(tokens[i : i + 3], 0, [21 + i]) for i in range(15)]
    edges = (0, 2, 5, 9, 20, 21, 48, 70)
    chunks = [
        ask(begin, end, *crowd[: 2 * number])
        for number, (begin, end) in enumerate(pairwise(edges))
    ]
    assert torch.equal(torch.cat(chunks), alone)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_a_long_context_is_the_same_shared_by_threads_or_not(
    name: str, library: Library, tmp_path: Path
) -> None:
    """1,100 tokens: three pieces of attention, which threads share where sequences are few."""
    print(f"seed {SEED}")
    folder = saved(name, tmp_path)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(3, 320, (1105,), generator=generator).tolist()
    mine = list(range(1, 71))
    crowd = [(tokens[i : i + 3], 0, [80 + i]) for i in range(20)]

    def run(backend: Any, *others: Any) -> torch.Tensor:
        parts = [(tokens[:700], 0, mine), (tokens[700:1100], 700, mine)]
        parts += [(tokens[i : i + 1], i, mine) for i in range(1100, 1105)]
        logits = [
            backend.execute(oracle.step([part, *others]))[: len(part[0])].clone()
            for part in parts
        ]
        return torch.cat(logits)

    alone = run(decoder(library, folder, threads=1, num_blocks=120))
    assert torch.equal(run(decoder(library, folder, threads=3, num_blocks=120)), alone)
    # Beside twenty others nothing is cut.
    assert torch.equal(run(decoder(library, folder, num_blocks=120), *crowd), alone)
    exact = run(oracle.build(folder, torch.float32, num_blocks=120))
    assert wrong_by([alone], [exact]) < 0.02


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("name", "context"), [("qwen2-window", 30), ("llama", 1100)])
def test_verified_rows_have_the_bits_of_rows_decoded_one_by_one(
    name: str, context: int, int8: bool, library: Library, tmp_path: Path
) -> None:
    """Speculation computes a sequence's newest token and a draft in one step. Rows of wrong
    drafts leave K and V behind the sequence's end, and must not reach a later row."""
    print(f"seed {SEED}")
    folder = saved(name, tmp_path)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(3, 320, (context + 60,), generator=generator).tolist()
    wrong = torch.randint(3, 320, (20,), generator=generator).tolist()
    mine = list(range(1, 75))
    native = decoder(library, folder, threads=2, num_blocks=120, int8_activations=int8)
    table = adapter(native.weights.config, torch.bfloat16, (16, 3, 70))

    def ask(rows: list[int], begin: int, *others: tuple[list[int], int, list[int]]) -> Any:
        arrays = oracle.step([(rows, begin, mine), *others])
        fields = {name: getattr(arrays, name) for name in StepArrays.__slots__}
        fields["segments"] = (Segment(0, len(rows), paired(table)),)
        return native.execute(StepArrays(**fields))[: len(rows)].clone()

    ask(tokens[:context], 0)
    one_by_one = [ask(tokens[at : at + 1], at) for at in range(context, context + 60)]
    for crowd in ([], [(tokens[i : i + 3], 0, [80 + i]) for i in range(20)]):
        native.clear(mine)
        ask(tokens[:context], 0)
        at, verified = context, []
        for right, refused in (
            (0, 1),
            (1, 0),
            (2, 5),
            (7, 0),
            (15, 0),
            (3, 12),
            (11, 20),
            (12, 3),
        ):
            known = tokens[at : at + 1 + right]
            logits = ask([*known, *wrong[:refused]], at, *crowd)
            verified.append(logits[: 1 + right])
            at += 1 + right
        assert at > context + 50
        got, want = torch.cat(verified), torch.cat(one_by_one)[: at - context]
        assert torch.equal(got, want), (got != want).any(-1).nonzero().flatten().tolist()
