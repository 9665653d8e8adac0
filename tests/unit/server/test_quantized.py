"""Codes and scales of every quantized format keep their values: numbers equal, bit for bit in
float32, what the format's own formulas give."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from veneer_registry.gguf_header import BLOCK_TYPES
from veneer_server.models import packed
from veneer_server.models.checkpoint import code_books
from veneer_server.models.checkpoint.ggml import read_matrix
from veneer_server.models.checkpoint.int_codes import DamagedCodes, read_linear
from veneer_server.models.quantized import (
    BlockFactors,
    QuantizedMatrix,
    packed_codes,
    stacked,
)
from veneer_server.models.stored_format import UnsupportedModel, read_stored

from tests import quantized_files
from tests.quantized_files import Floats, Written
from tests.refused import refused

SHAPE = (96, 512)


def weights(seed: int, shape: tuple[int, int] = SHAPE) -> Floats:
    made = np.random.default_rng(seed).standard_normal(shape) * 0.03
    return made.astype(np.float32)


def blocks_of(kind: str, seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Random bytes of a type, with every code and every pattern of its scales; float16 factors
    are finite."""
    rows, columns = shape
    block, size = BLOCK_TYPES[kind]
    found = np.random.default_rng(seed)
    data = found.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    if kind == "MXFP4":
        data[:, :, 0] %= 250  # larger scales overflow
    at = {"Q6_K": [208], "MXFP4": []}.get(kind, [0])
    if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        at.append(2)
    for begin in at:
        factors = (found.standard_normal((rows, columns // block, 1)) * 0.01).astype(np.float16)
        factors[0, 0], factors[1, 0] = 0, -0.0
        data[:, :, begin : begin + 2] = factors.view(np.uint8)
    return data.reshape(rows, -1)


def matrix_of(kind: str, data: np.ndarray, shape: tuple[int, int] = SHAPE) -> QuantizedMatrix:
    return read_matrix(kind, torch.from_numpy(data.reshape(-1)), shape)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_gguf_type_has_the_numbers_of_llama_cpp(kind: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    data = blocks_of(kind, seed)
    meant = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    made = matrix_of(kind, data)
    assert made.shape == SHAPE
    assert torch.equal(made.dequantize(), torch.from_numpy(meant))
    # All rows in a few slices, and rows in any order.
    assert torch.equal(made[32:64].dequantize(), torch.from_numpy(meant[32:64]))
    chosen = torch.tensor([5, 90, 5, 0])
    assert torch.equal(made[chosen].dequantize(), torch.from_numpy(meant[chosen.numpy()]))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_matrix_takes_at_most_a_tenth_more_than_its_file(kind: str) -> None:
    shape = (256, 512)
    data = blocks_of(kind, 1, shape)
    assert matrix_of(kind, data, shape).nbytes <= 1.1 * data.nbytes


def test_a_large_matrix_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SLICE", SHAPE[1] * 40)
    data = blocks_of("Q6_K", 2)
    meant = gguf.dequantize(data, gguf.GGMLQuantizationType.Q6_K)
    assert torch.equal(matrix_of("Q6_K", data).dequantize(), torch.from_numpy(meant))


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_bitsandbytes_codes_have_the_same_form(table: str) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.from_numpy(weights(3))
    codes, state = quantize_4bit(weight, quant_type=table, compress_statistics=False)
    pairs = codes.view(SHAPE[0], -1)  # the even column is in the high half
    opened = torch.stack((pairs >> 4, pairs & 0xF), dim=2).view(SHAPE)
    low, high = packed_codes(opened, 4)
    scales = BlockFactors(state.absmax.view(SHAPE[0], -1))
    made = QuantizedMatrix(SHAPE[1], 4, low, high, state.code.float(), scales)
    assert torch.equal(made.dequantize(), dequantize_4bit(codes, state))
    if table == "nf4":
        assert made.table.tolist() == list(code_books.NF4)


ORDER = np.random.default_rng(5).permutation(SHAPE[1])

INTEGERS: dict[str, Callable[[Floats], Written]] = {
    "gptq": quantized_files.gptq,
    "gptq-symmetric": partial(quantized_files.gptq, symmetric=True, group=128),
    "gptq-v2": partial(quantized_files.gptq, form="gptq_v2", group=32),
    "gptq-8": partial(quantized_files.gptq, bits=8),
    "gptq-desc-act": partial(quantized_files.gptq, order=ORDER),
    "awq": quantized_files.awq,
    "awq-32": partial(quantized_files.awq, group=32),
    "packed": quantized_files.compressed,
    "packed-asymmetric": partial(quantized_files.compressed, symmetric=False),
    "packed-float16": partial(quantized_files.compressed, dtype=torch.float16, group=128),
    "packed-8": partial(quantized_files.compressed, bits=8, symmetric=False),
    "packed-channel": partial(quantized_files.compressed, group=None),
    "packed-float32": partial(quantized_files.compressed, dtype=torch.float32),
    "mxfp4": quantized_files.mxfp4,
}


def read(written: Written, shape: tuple[int, int] = SHAPE, **more: object) -> QuantizedMatrix:
    stored = read_stored({"quantization_config": {**written.config, **more}})
    assert stored is not None
    return read_linear(stored, written.tensors.get, shape)


@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_codes_have_the_numbers_of_their_formula(kind: str) -> None:
    """float32 holds scale * (q - zero) exactly, so there is no tolerance; a float32 scale is
    multiplied once, as in the formula."""
    written = INTEGERS[kind](weights(4))
    made = read(written)
    assert torch.equal(made.dequantize(), torch.from_numpy(written.weight))
    assert (made.order is not None) == (kind == "gptq-desc-act")
    near = np.abs(written.weight - weights(4)).mean() / np.abs(weights(4)).mean()
    assert near < 0.15, "the file itself is no quantization of these weights"


def test_the_projects_own_rounding_is_that_of_our_numbers() -> None:
    """GPTQ, AWQ and compressed-tensors compute in the scale's 16 bits: our exact numbers,
    rounded to them, are theirs."""
    written = quantized_files.gptq(weights(6), group=64)
    scales = written.tensors["scales"]  # [groups, rows] float16
    exact = read(written)
    codes = exact.numbers().t().to(torch.int8)
    assert exact.mins is not None
    assert exact.mins.inner is not None
    zeros = -exact.mins.inner.t().to(torch.int8)
    groups = written.tensors["g_idx"].long()
    theirs = scales[groups] * (codes - zeros[groups])
    assert theirs.dtype == torch.float16
    assert torch.equal(exact.dequantize().to(torch.float16), theirs.t())


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q4_0"])
def test_rows_of_one_kind_are_stacked(kind: str) -> None:
    parts = [matrix_of(kind, blocks_of(kind, seed)) for seed in (7, 8)]
    whole = stacked(parts)
    assert whole is not None
    assert torch.equal(whole.dequantize(), torch.cat([each.dequantize() for each in parts]))


def test_rows_of_other_kinds_or_orders_are_not_stacked() -> None:
    parts = [matrix_of(kind, blocks_of(kind, 9)) for kind in ("Q4_K", "Q6_K")]
    assert stacked(parts) is None
    orders = [np.random.default_rng(seed).permutation(SHAPE[1]) for seed in (1, 2)]
    both = [read(quantized_files.gptq(weights(1), order=each)) for each in orders]
    assert stacked(both) is None
    assert stacked([both[0], both[0]]) is not None


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "missing": lambda tensors: tensors.pop("scales"),
    "shape": lambda tensors: tensors.update(qweight=tensors["qweight"][1:]),
    "dtype": lambda tensors: tensors.update(qzeros=tensors["qzeros"].long()),
    "infinite": lambda tensors: tensors["scales"].fill_(torch.inf),
    "groups": lambda tensors: tensors["g_idx"].fill_(0),
    "far-group": lambda tensors: tensors["g_idx"].add_(1000),
    "g_idx": lambda tensors: tensors.update(g_idx=tensors["g_idx"][:8]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit_are_refused(damage: str) -> None:
    written = quantized_files.gptq(weights(10))
    tensors = {name: each.clone() for name, each in written.tensors.items()}
    DAMAGE[damage](tensors)
    with pytest.raises(DamagedCodes):
        read(Written(tensors, written.weight, written.config))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"quant_method": "aqlm"}, "quant_method"),
        ({"quant_method": "gptq", "bits": 3}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 7}, "group_size"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format",
        ),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 8}}}, "dynamic"),
        ({"quant_method": "gptq", "bits": 4, "rotation": "hadamard"}, "rotation"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_4bit"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ([], "quantization_config"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_name(settings: object, key: str) -> None:
    with refused(UnsupportedModel, key=key):
        read_stored({"quantization_config": settings})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"r1": {}}}, "transform_config"),
    ],
)
def test_other_compressed_tensors_are_refused_by_name(
    change: dict[str, object], key: str
) -> None:
    with refused(UnsupportedModel, key=key):
        read(quantized_files.compressed(weights(11)), **change)


# ------------------------------------------------------------------------- mutations

MUTANTS = 2000
JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 7, 2**63, 1e308, "", "x", "gptq", [], [1], {}, {"a": {"b": 1}}),
    *("pack-quantized", "group", "int", "float", 32, 64, "int32", [[]] * 3),
)


def mutated_settings(source: random.Random, settings: Any) -> Any:
    """One value replaced, removed or added, at any depth."""
    if not isinstance(settings, dict) or not settings or source.random() < 0.05:
        return source.choice(JUNK)
    key = source.choice(sorted(settings, key=str))
    match source.randrange(4):
        case 0:
            return {name: value for name, value in settings.items() if name != key}
        case 1:
            return settings | {source.choice(("bits", "dynamic", "format", "new")): True}
        case _:
            return settings | {key: mutated_settings(source, settings[key])}


def mutated_tensors(
    source: random.Random, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    found = dict(tensors)
    name = source.choice(sorted(found))
    tensor = found[name]
    match source.randrange(6):
        case 0:
            del found[name]
        case 1:
            found[name] = tensor.reshape(-1)
        case 2:
            found[name] = tensor[: len(tensor) // 2]
        case 3:
            found[name] = tensor.to(source.choice((torch.float64, torch.int64, torch.bool)))
        case 4:
            found[name] = tensor.new_full(tensor.shape, source.choice((0, 1, 127)))
        case 5:
            random_ = np.random.default_rng(source.randrange(1 << 30))
            data = random_.integers(0, 256, tensor.nbytes, dtype=np.uint8)
            found[name] = torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)
    return found


def test_mutated_settings_and_tensors_are_read_or_clearly_refused() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    source = random.Random(seed)
    shape = (32, 128)
    kinds = [kind for kind in INTEGERS if kind != "gptq-desc-act"]  # of another width
    kinds.sort()
    whole = {kind: INTEGERS[kind](weights(1, shape)) for kind in kinds}
    fates = {"read": 0, "refused": 0, "damaged": 0}
    for _ in range(MUTANTS):
        written = whole[source.choice(kinds)]
        config, tensors = written.config, written.tensors
        if source.random() < 0.5:
            config = mutated_settings(source, dict(config))
        else:
            tensors = mutated_tensors(source, tensors)
        try:
            stored = read_stored({"quantization_config": config})
            if stored is None or not stored.is_codes or stored.format == "gguf":
                continue
            made = read_linear(stored, tensors.get, shape)
        except UnsupportedModel as error:
            fates["refused"] += bool(error.metadata["key"])
        except DamagedCodes:
            fates["damaged"] += 1
        else:
            assert made.dequantize().shape == shape
            fates["read"] += 1
    print(fates)
    assert min(fates.values()) > MUTANTS / 20
