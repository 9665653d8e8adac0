"""Labs on quantization alone: the error of weights, and its effect on perplexity."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import bitsandbytes.functional as bnb
import torch
from matplotlib.figure import Figure
from veneer_registry.errors import InvalidField

from veneer_train.labs.output import Lab, Row
from veneer_train.merge import linears, source_base
from veneer_train.model import load_tokenizer

BLOCK: Final = 64

MODES: Final = ("bf16", "nf4", "nf4-dq", "fp4", "int4")
"""Unquantized 16 bits; and 4 bits: normal quantiles, the same with 8-bit scales (double
quantization), floating point, and evenly spaced (-7 to 7), each in blocks of 64 with one
scale."""

BITS: Final = {
    "bf16": 16.0,
    "nf4": 4 + 32 / BLOCK,
    "nf4-dq": 4 + 8 / BLOCK + 32 / (BLOCK * 256),
    "fp4": 4 + 32 / BLOCK,
    "int4": 4 + 32 / BLOCK,
}


def restored(weight: torch.Tensor, mode: str) -> torch.Tensor:
    """Quantize a weight in a mode and dequantize it again; same shape and dtype.

    Raises:
        InvalidField: there is no such mode.
    """
    if mode == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    if mode == "int4":
        return _int4(weight)
    if mode not in MODES:
        raise InvalidField(
            f"mode {mode!r} is not one of {', '.join(MODES)}", metadata={"field": "modes"}
        )
    packed, state = bnb.quantize_4bit(
        weight,
        blocksize=BLOCK,
        compress_statistics=mode.endswith("-dq"),
        quant_type=mode.removesuffix("-dq"),
    )
    found: torch.Tensor = bnb.dequantize_4bit(packed, state)
    return found.to(weight.dtype)


def _int4(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
    return (torch.round(blocks / scale) * scale).reshape(weight.shape).to(weight.dtype)


def quant_error(base: Path, *, seed: int, command: str) -> Lab:
    """Mean absolute error of each codebook, on normal numbers and on the base's weights."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(1024, 1024, generator=draw)
    model = source_base(base)
    weights = [layer.weight.detach() for layer in linears(model)]
    rows: list[Row] = []
    for mode in MODES[1:]:
        on_normal = float((restored(normal, mode) - normal).abs().mean())
        gap = scale = 0.0
        for weight in weights:
            gap += float((restored(weight, mode) - weight).double().square().sum())
            scale += float(weight.double().square().sum())
        rows.append(
            {
                "mode": mode,
                "bits a weight": BITS[mode],
                "mean absolute error on N(0, 1)": on_normal,
                "relative error on the base": math.sqrt(gap / scale),
            }
        )
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, column in (
        (left, "mean absolute error on N(0, 1)"),
        (right, "relative error on the base"),
    ):
        axis.bar([r["mode"] for r in rows], [r[column] for r in rows], color="#2563eb")
        axis.set_title(column, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    ordered = sorted(rows, key=lambda r: r["mean absolute error on N(0, 1)"])
    double = BITS["nf4"] - BITS["nf4-dq"]
    return Lab(
        name="quant-error",
        title="Error of 4-bit code books",
        question=(
            "How far is a weight from itself after 4 bits? On 1024 x 1024 numbers of N(0, 1), "
            "as bitsandbytes' own tests measure it, and on all linear layers of the base."
        ),
        rows=rows,
        plot=figure,
        says=[
            f"On N(0, 1), from best to worst: {', '.join(r['mode'] for r in ordered)}.",
            f"Double quantization saves {double:.9g} bits a weight.",
        ],
        limits=[
            "The bundled base comes from a Q4_1 file: its weights lie on evenly spaced levels "
            "already, so the right column is the error of quantizing once more.",
            "An error of weights is not an error of answers: see quant-ppl.",
        ],
        command=command,
        seed=seed,
        setting={"base": base.name, "block": BLOCK},
    )


def library_text(characters: int) -> str:
    """Python's standard library, file by file: a text that every machine has."""
    found: list[str] = []
    length = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text("utf-8", errors="ignore")
        found.append(text)
        length += len(text)
        if length >= characters:
            break
    return "\n".join(found)[:characters]


def perplexity_of(model: Any, ids: torch.Tensor, window: int) -> float:
    """Perplexity of token ids [n], in windows that do not share context."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, window):
            part = ids[start : start + window + 1]
            logits = model(part[None, :-1]).logits[0].float()
            total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
            count += len(part) - 1
    return math.exp(total / count)


def quant_ppl(
    base: Path,
    modes: Sequence[str],
    *,
    tokens: int,
    window: int,
    seed: int,
    command: str,
    told: Callable[[str], None] = lambda line: None,
) -> Lab:
    """Perplexity of the base with its linear layers quantized in each mode.

    Args:
        tokens: tokens of text to measure on.
        window: tokens of context.
    """
    for mode in modes:
        restored(torch.zeros(1, BLOCK), mode)  # refuses an unknown mode before any work
    tokenizer = load_tokenizer(base)
    ids = torch.tensor(tokenizer(library_text(tokens * 6))["input_ids"][: tokens + 1])
    model = source_base(base).to(torch.bfloat16)
    originals = {layer: layer.weight.detach().clone() for layer in linears(model)}
    rows: list[Row] = []
    for mode in modes:
        told(f"{mode}: {len(ids) - 1} tokens")
        for layer, weight in originals.items():
            with torch.no_grad():
                layer.weight.copy_(restored(weight, mode))
        rows.append(
            {
                "mode": mode,
                "bits a weight": BITS[mode],
                "perplexity": perplexity_of(model, ids, window),
            }
        )
    best = rows[0]["perplexity"]
    rows = [{**row, "above the first, %": 100 * (row["perplexity"] / best - 1)} for row in rows]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.bar([r["mode"] for r in rows], [r["perplexity"] for r in rows], color="#2563eb")
    axis.set_ylabel("perplexity")
    axis.set_ylim(bottom=0.9 * min(r["perplexity"] for r in rows))
    axis.grid(axis="y", alpha=0.3)
    return Lab(
        name="quant-ppl",
        title="Perplexity of the base in 4 bits",
        question=(
            "What does quantizing all linear layers cost the model? Perplexity on Python's "
            "standard library; weights are quantized, restored, and computed with in bf16."
        ),
        rows=rows,
        plot=figure,
        says=[
            f"{r['mode']}: {r['perplexity']:.3f}, {r['above the first, %']:+.1f} %"
            for r in rows[1:]
        ],
        limits=[
            "The bundled base comes from a Q4_1 file: bf16 holds what that left, and every "
            "4-bit mode is a second quantization. int4, the closest to Q4_1, gains by that.",
            "One text, one small model: the paper's Pile-CC figures (Int4 34.34, FP4 31.07, "
            "NF4 with double quantization 27.41) are means over much larger ones.",
        ],
        command=command,
        seed=seed,
        setting={"base": base.name, "tokens": len(ids) - 1, "window": window},
    )
