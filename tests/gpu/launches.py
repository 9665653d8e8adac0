"""Launches at the sizes of Llama-2-7B, on tensors without memory, to be compiled.

Everything a kernel is compiled for (types, constants, warps) is taken from the launch that the
backend's own function makes; nothing is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from triton.runtime.jit import JITFunction
from veneer_server.backends.cuda.attention import decode, prefill
from veneer_server.backends.cuda.fp8 import panels as fp8_panels
from veneer_server.backends.cuda.fp8 import rows as fp8_rows
from veneer_server.backends.cuda.fp8.packing import PackedFp8
from veneer_server.backends.cuda.lora import panels as lora_panels
from veneer_server.backends.cuda.lora import rows as lora_rows
from veneer_server.backends.cuda.lora.tables import AdapterSlots
from veneer_server.backends.cuda.nf4 import panels as nf4_panels
from veneer_server.backends.cuda.nf4 import rows as nf4_rows
from veneer_server.backends.cuda.nf4.packing import PackedNf4
from veneer_server.backends.cuda.pointwise import gate, norm, rotary
from veneer_server.backends.cuda.sampling import draw, logprobs

HIDDEN: Final = 4096
INNER: Final = 11008
META: Final = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Launch:
    """A call of one of the backend's functions, which launches one or more kernels.

    Attributes:
        name: what it does, with the sizes.
        decode: whether it runs in steps that only decode: no spills allowed.
        moved: bytes that must be read or written.
        operations: multiplications and additions.
        call: makes the launches.
    """

    name: str
    decode: bool
    moved: int
    operations: int
    call: Callable[[], None]


def recorded(launch: Launch) -> list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]]:
    """Kernels, arguments and options of a launch, which is not executed."""
    found: list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = []

    def note(kernel: JITFunction[Any], grid: Any) -> Callable[..., None]:
        return lambda *args, **options: found.append((kernel, args, options))

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = note  # type: ignore[method-assign]
    try:
        launch.call()
    finally:
        JITFunction.__getitem__ = original  # type: ignore[method-assign]
    return found


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Of the meta device."""
    return torch.empty(shape, dtype=dtype, device=META)


def table(*shape: int) -> torch.Tensor:
    """int32, of the meta device."""
    return empty(*shape, dtype=torch.int32)


def _lora(module: Any, rows: int, rank: int) -> Launch:
    """q, k and v with rows of 8 adapters."""
    members, ranks, out = 3, 3 * rank, 3 * HIDDEN
    tiles = max(8, rows // module.ROWS)
    decode = module is lora_rows
    scratch = (rows, ranks)
    if decode:
        scratch = (lora_rows.splits(HIDDEN), *scratch)

    def call() -> None:
        adapters = AdapterSlots(64, HIDDEN, [HIDDEN] * members, META)
        columns = table(members * HIDDEN // module.BLOCK_COLUMNS, 5)
        (lora_rows.add_rows if decode else lora_panels.add_panels)(
            empty(rows, HIDDEN),
            empty(rows, out),
            empty(1 << 28),
            table(tiles, 3),
            adapters,
            columns,
            empty(*scratch, dtype=torch.float32),
        )

    weights = min(8, rows) * (HIDDEN * ranks + rank * out)
    return Launch(
        f"lora {'rows' if decode else 'panels'}: {rows} rows, 8 adapters of rank {rank}, qkv",
        decode,
        2 * weights + 2 * rows * (HIDDEN + 2 * out),
        2 * rows * (HIDDEN * ranks + rank * out),
        call,
    )


def packed(outputs: int, inputs: int) -> PackedNf4:
    """A weight with double quantization."""
    blocks = inputs // 64
    return PackedNf4(
        empty(blocks, outputs, 32, dtype=torch.uint8),
        empty(blocks, outputs, dtype=torch.uint8),
        table(outputs),
        empty(outputs, dtype=torch.float32),
        empty(blocks * outputs // 256, dtype=torch.float32),
        empty(256, dtype=torch.float32),
        empty(16, dtype=torch.float32),
    )


def _nf4_rows(rows: int) -> Launch:
    """gate and up."""
    weight = packed(2 * INNER, HIDDEN)

    def call() -> None:
        partials = empty(nf4_rows.splits(weight), rows, 2 * INNER, dtype=torch.float32)
        nf4_rows.multiply(empty(rows, HIDDEN), weight, None, partials, empty(rows, 2 * INNER))

    return Launch(
        f"nf4 rows: {rows} rows, {HIDDEN} -> {2 * INNER}",
        True,
        weight.nbytes + 2 * rows * (HIDDEN + 2 * INNER),
        2 * rows * HIDDEN * 2 * INNER,
        call,
    )


def _nf4_panels() -> Launch:
    weight = packed(2 * INNER, HIDDEN)

    def call() -> None:
        nf4_panels.expand(weight, 0, INNER, empty(INNER, HIDDEN))

    return Launch(
        f"nf4 panels: {INNER} x {HIDDEN}",
        False,
        weight.nbytes // 2 + 2 * INNER * HIDDEN,
        INNER * HIDDEN,
        call,
    )


def packed_fp8(outputs: int, inputs: int) -> PackedFp8:
    """A weight with a scale for each output."""
    return PackedFp8(
        empty(inputs // 64, outputs, 64, dtype=torch.uint8), empty(outputs, dtype=torch.float32)
    )


def _fp8_rows(rows: int) -> Launch:
    """gate and up."""
    weight = packed_fp8(2 * INNER, HIDDEN)

    def call() -> None:
        partials = empty(fp8_rows.splits(weight), rows, 2 * INNER, dtype=torch.float32)
        fp8_rows.multiply(empty(rows, HIDDEN), weight, None, partials, empty(rows, 2 * INNER))

    return Launch(
        f"fp8 rows: {rows} rows, {HIDDEN} -> {2 * INNER}",
        True,
        weight.nbytes + 2 * rows * (HIDDEN + 2 * INNER),
        2 * rows * HIDDEN * 2 * INNER,
        call,
    )


def _fp8_panels() -> Launch:
    weight = packed_fp8(2 * INNER, HIDDEN)

    def call() -> None:
        fp8_panels.expand(weight, 0, INNER, empty(INNER, HIDDEN))

    return Launch(
        f"fp8 panels: {INNER} x {HIDDEN}",
        False,
        weight.nbytes // 2 + 2 * INNER * HIDDEN,
        INNER * HIDDEN,
        call,
    )


def _cache(tokens: int, kv_heads: int) -> torch.Tensor:
    return empty(tokens // 32 + 1, kv_heads, 32, 128)


def _decode(
    sequences: int, context: int, heads: int, kv_heads: int, window: int | None
) -> Launch:
    """Heads of 128."""

    def call() -> None:
        cache, pieces = _cache(sequences * context, kv_heads), decode.splits(context)
        query = empty(sequences, heads, 128)
        decode.attend(
            query,
            cache,
            cache,
            table(sequences, context // 32),
            table(sequences),
            None,
            empty(sequences, heads, pieces, 128, dtype=torch.float32),
            empty(sequences, heads, pieces, 2, dtype=torch.float32),
            empty(sequences, heads, 128),
            scale=128**-0.5,
            window=window,
            cap=0.0,
        )

    seen = sequences * min(context, window or context)
    return Launch(
        f"attention decode: {sequences} of {context} tokens, {heads} heads over {kv_heads}"
        + (f", window {window}" if window else ""),
        True,
        2 * 2 * seen * kv_heads * 128,
        4 * seen * heads * 128,
        call,
    )


def _prefill(rows: int, position: int, heads: int, kv_heads: int) -> Launch:
    """One chunk; heads of 128."""

    def call() -> None:
        cache, query = _cache(position + rows, kv_heads), empty(rows, heads, 128)
        prefill.attend(
            query,
            cache,
            cache,
            table(1, (position + rows) // 32),
            table(rows // prefill.ROWS, 4),
            None,
            empty(rows, heads, 128),
            scale=128**-0.5,
            window=None,
            cap=0.0,
        )

    return Launch(
        f"attention prefill: {rows} rows after {position}, {heads} heads over {kv_heads}",
        False,
        2 * (2 * (position + rows) * kv_heads + 2 * rows * heads) * 128,
        4 * rows * (position + rows // 2) * heads * 128,
        call,
    )


def _norm(rows: int) -> Launch:
    def call() -> None:
        hidden, weight = (empty(*s, dtype=torch.float32) for s in ((rows, HIDDEN), (HIDDEN,)))
        norm.normalize(hidden, empty(rows, HIDDEN), weight, empty(rows, HIDDEN), 1e-5)

    numbers = rows * HIDDEN
    return Launch(f"norm: {rows} rows of {HIDDEN}", True, 12 * numbers, 5 * numbers, call)


def _gate(rows: int) -> Launch:
    def call() -> None:
        gate.gate(empty(rows, 2 * INNER), empty(rows, INNER))

    numbers = rows * INNER
    return Launch(f"gate: {rows} rows of {INNER}", True, 6 * numbers, 5 * numbers, call)


def _rotary(rows: int, heads: int, kv_heads: int) -> Launch:
    """Heads of 128, with norms."""

    def call() -> None:
        cache = _cache(1 << 20, kv_heads)
        rotary.place(
            empty(rows, heads + 2 * kv_heads, 128),
            table(rows),
            empty(rows, dtype=torch.int64),
            empty(4096, 2, 64, dtype=torch.float32),
            empty(2, 128, dtype=torch.float32),
            empty(rows, heads, 128),
            cache,
            cache,
            1e-6,
        )

    numbers = rows * (heads + 2 * kv_heads) * 128
    name = f"rotary: {rows} rows, {heads} heads over {kv_heads}"
    return Launch(name, True, 4 * numbers, 8 * numbers, call)


def _draw(rows: int, vocab: int) -> Launch:
    def call() -> None:
        draw.draw(
            empty(rows, vocab, dtype=torch.float32),
            empty(rows, 2, dtype=torch.float32),
            table(rows),
            empty(rows, 2, dtype=torch.float64),
            empty(rows, dtype=torch.int64),
        )

    name = f"draw: {rows} rows of {vocab}"
    return Launch(name, True, 4 * rows * vocab, 70 * 8 * rows * vocab, call)


def _logprobs(rows: int, vocab: int) -> Launch:
    def call() -> None:
        logits, own = (empty(*s, dtype=torch.float32) for s in ((rows, vocab), (rows,)))
        tops, top_own = (
            table(rows, logprobs.TOPS),
            empty(rows, logprobs.TOPS, dtype=torch.float32),
        )
        tokens = empty(rows, dtype=torch.int64)
        logprobs.logprobs(logits, tokens, table(rows), own, tops, top_own)

    name = f"logprobs: {rows} rows of {vocab}"
    return Launch(name, True, 4 * rows * vocab, 22 * 4 * rows * vocab, call)


def _all() -> Iterator[Launch]:
    yield _lora(lora_rows, 8, 16)
    yield _lora(lora_panels, 1024, 16)
    yield _nf4_rows(8)
    yield _nf4_panels()
    yield _fp8_rows(8)
    yield _fp8_panels()
    yield _decode(8, 4096, 32, 8, None)
    yield _prefill(2048, 2048, 32, 8)
    yield _norm(64)
    yield _rotary(64, 32, 8)
    yield _gate(64)
    yield _draw(64, 128256)
    yield _logprobs(64, 128256)


LAUNCHES: Final[tuple[Launch, ...]] = tuple(_all())
