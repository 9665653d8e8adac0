"""Runs each kernel on small random inputs, and its reference on the CPU.

The shapes are smaller than in ``tests/gpu``, and writes beyond a buffer are not looked for. The
aim is to find a compiler or a GPU with wrong results, not a bug in a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from veneer_server.backends.cuda.attention import decode, prefill
from veneer_server.backends.cuda.attention import reference as attention
from veneer_server.backends.cuda.fp8 import packing as fp8_packing
from veneer_server.backends.cuda.fp8 import panels as fp8_panels
from veneer_server.backends.cuda.fp8 import reference as fp8_reference
from veneer_server.backends.cuda.fp8 import rows as fp8_rows
from veneer_server.backends.cuda.lora import panels as lora_panels
from veneer_server.backends.cuda.lora import reference as lora_reference
from veneer_server.backends.cuda.lora import rows as lora_rows
from veneer_server.backends.cuda.lora.tables import AdapterSlots, column_table, tile_table
from veneer_server.backends.cuda.nf4 import panels as nf4_panels
from veneer_server.backends.cuda.nf4 import quantizing as nf4_quantizing
from veneer_server.backends.cuda.nf4 import reference as nf4_reference
from veneer_server.backends.cuda.nf4 import rows as nf4_rows
from veneer_server.backends.cuda.pointwise import gate, norm, reference, rotary
from veneer_server.backends.cuda.sampling import draw, logprobs

CPU: Final = torch.device("cpu")
ROUNDED: Final = 2**-8
"""Bound of the relative error of rounding to bfloat16."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A kernel's result and the expected one, both on the CPU; ``tolerance`` is per element."""

    got: torch.Tensor
    expected: torch.Tensor
    tolerance: torch.Tensor | float

    @property
    def wrong(self) -> int:
        """Number of elements that differ by more than the tolerance. A NaN counts."""
        difference = (self.got.double() - self.expected.double()).abs()
        return int((~(difference <= self.tolerance)).sum())


class CaseInputs:
    """Makes random inputs, the same on every machine, and copies them to the device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Return normally distributed numbers on the CPU."""
        return torch.randn(shape, generator=self._generator).to(dtype)

    def put(self, values: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the device."""
        return values.to(self.device, copy=True)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Allocate memory on the device, filled with NaN, or -7 for integers."""
        filler = torch.nan if dtype.is_floating_point else -7
        return torch.full(shape, filler, dtype=dtype, device=self.device)


def _put_all(inputs: CaseInputs, weight: Any) -> Any:
    """Copy a packed weight to the device."""
    return replace(weight, **{n: inputs.put(getattr(weight, n)) for n in weight.__slots__})


def _norm(inputs: CaseInputs) -> Iterator[Compared]:
    hidden = inputs.numbers(3, 577, dtype=torch.float32)
    added, weight = inputs.numbers(3, 577), inputs.numbers(577, dtype=torch.float32)
    stream, out = inputs.put(hidden), inputs.empty(3, 577)
    norm.normalize(stream, inputs.put(added), inputs.put(weight), out, 1e-5)
    total = hidden + added.float()
    yield Compared(stream.cpu(), total, 0.0)
    expected = reference.normalize(total, weight, 1e-5)
    yield Compared(out.cpu(), expected, expected.abs() * ROUNDED + 1e-6)


def _gate(inputs: CaseInputs) -> Iterator[Compared]:
    pairs, out = inputs.numbers(3, 2 * 321), inputs.empty(3, 321)
    gate.gate(inputs.put(pairs), out)
    expected = reference.gate(pairs)
    yield Compared(out.cpu(), expected, expected.abs() * ROUNDED + 1e-6)


def _rotary(inputs: CaseInputs) -> Iterator[Compared]:
    heads, kv_heads, dim = 4, 2, 32
    qkv = inputs.numbers(3, heads + 2 * kv_heads, dim)
    positions = torch.tensor([0, 17, 63], dtype=torch.int32)
    angles = torch.arange(64).unsqueeze(1) * 10000.0 ** -(torch.arange(dim // 2) / dim * 2)
    turns = torch.stack((angles.cos(), angles.sin()), dim=1)
    slots = torch.tensor([5, -1, 16])
    query = inputs.empty(3, heads, dim)
    keys, values = (inputs.put(torch.zeros(2, kv_heads, 16, dim).bfloat16()) for _ in range(2))
    rotary.place(
        inputs.put(qkv),
        inputs.put(positions),
        inputs.put(slots),
        inputs.put(turns),
        None,
        query,
        keys,
        values,
        1e-6,
    )
    turned = reference.turn(qkv[:, : heads + kv_heads].float(), turns[positions.long()])
    tolerance = ROUNDED * 8
    used = [0, 2]
    yield Compared(query.cpu()[used], turned[used, :heads], tolerance)
    for row, block, place in ((0, 0, 5), (2, 1, 0)):
        yield Compared(keys.cpu()[block, :, place], turned[row, heads:], tolerance)
        yield Compared(values.cpu()[block, :, place], qkv[row, heads + kv_heads :], 0.0)
    yield Compared((keys.cpu() != 0).any(dim=3).sum(), torch.tensor(2 * kv_heads), 0.0)


def _nf4(inputs: CaseInputs) -> Iterator[Compared]:
    # More blocks than one split has, and outputs that no tile divides.
    packed = nf4_quantizing.quantize(inputs.numbers(45, 64 * 17, dtype=torch.float32))
    weight, x = _put_all(inputs, packed), inputs.numbers(3, packed.in_features)
    y = inputs.empty(3, 45, dtype=torch.float32)
    partials = inputs.empty(nf4_rows.splits(weight), 3, 45, dtype=torch.float32)
    nf4_rows.multiply(inputs.put(x), weight, None, partials, y)
    expected, magnitude = nf4_reference.multiply(x, packed)
    yield Compared(y.cpu(), expected, magnitude * 2**-16)
    panel = inputs.empty(30, packed.in_features)
    nf4_panels.expand(weight, 7, 37, panel)
    yield Compared(panel.cpu(), nf4_reference.expand(packed)[7:37].bfloat16(), 0.0)


def _fp8(inputs: CaseInputs) -> Iterator[Compared]:
    packed = fp8_packing.pack([inputs.numbers(45, 64 * 17, dtype=torch.float32)])
    weight, x = _put_all(inputs, packed), inputs.numbers(3, packed.in_features)
    y = inputs.empty(3, 45, dtype=torch.float32)
    partials = inputs.empty(fp8_rows.splits(weight), 3, 45, dtype=torch.float32)
    fp8_rows.multiply(inputs.put(x), weight, None, partials, y)
    expected, magnitude = fp8_reference.multiply(x, packed)
    yield Compared(y.cpu(), expected, magnitude * 2**-16)
    panel = inputs.empty(30, packed.in_features)
    fp8_panels.expand(weight, 7, 37, panel)
    yield Compared(panel.cpu(), fp8_reference.expand(packed)[7:37], 0.0)


def _lora(inputs: CaseInputs) -> Iterator[Compared]:
    fan_in, fan_outs = 200, [70, 33]
    segments = [(0, 1, 0), (2, 9, 1)]  # row 1 has no adapter
    whole, arena = AdapterSlots(2, fan_in, fan_outs, CPU), inputs.numbers(9000)
    for slot, (first, second, begin) in enumerate(((4, 0, 3), (5, 16, 1001))):
        a = begin + fan_in * (first + second)
        members = [(0, first, a, 0.5)]
        if second:
            members.append((1, second, a + first * fan_outs[0], 2.0))
        whole.put(slot, begin, members)
    x, y = inputs.numbers(9, fan_in), inputs.numbers(9, sum(fan_outs))
    places = AdapterSlots(2, fan_in, fan_outs, inputs.device)
    places.places, places.scalings = inputs.put(whole.places), inputs.put(whole.scalings)
    for module, add, scratch in (
        (lora_rows, lora_rows.add_rows, (lora_rows.splits(fan_in), 9, 21)),
        (lora_panels, lora_panels.add_panels, (9, 21)),
    ):
        result, tiles = inputs.put(y), tile_table(segments, module.ROWS, 9, inputs.device)
        columns = column_table(fan_outs, module.BLOCK_COLUMNS, inputs.device)
        add(
            inputs.put(x),
            result,
            inputs.put(arena),
            tiles,
            places,
            columns,
            inputs.empty(*scratch, dtype=torch.float32),
        )
        rounded = module is lora_panels
        expected, most = lora_reference.add(x, y, arena, segments, whole, rounded=rounded)
        tolerance = expected.abs() * ROUNDED + most * (2**-8 if rounded else 2**-16)
        yield Compared(result.cpu(), expected, tolerance)


def _attention(inputs: CaseInputs) -> Iterator[Compared]:
    heads, kv_heads, dim, size, tokens = 4, 2, 32, 16, 300
    plain_keys = inputs.numbers(24, kv_heads, size, dim)
    plain_values = inputs.numbers(24, kv_heads, size, dim)
    table = torch.arange(20, 0, -1, dtype=torch.int32)  # in reverse
    how: dict[str, Any] = {"scale": dim**-0.5, "window": 130, "cap": 0.0}
    keys, values = inputs.put(plain_keys), inputs.put(plain_values)
    query, pieces = inputs.numbers(2, heads, dim), decode.splits(tokens)
    out = inputs.empty(2, heads, dim)
    contexts = torch.tensor([tokens, 5], dtype=torch.int32)
    decode.attend(
        inputs.put(query),
        keys,
        values,
        inputs.put(table.repeat(2, 1)),
        inputs.put(contexts),
        None,
        inputs.empty(2, heads, pieces, dim, dtype=torch.float32),
        inputs.empty(2, heads, pieces, 2, dtype=torch.float32),
        out,
        **how,
    )
    for row, context in enumerate(contexts.tolist()):
        expected, most = attention.attend(
            query[row : row + 1], plain_keys, plain_values, table, context - 1, None, **how
        )
        yield Compared(out.cpu()[row : row + 1], expected, most * 2**-7)
    rows, position = 21, 270
    query, out = inputs.numbers(rows, heads, dim), inputs.empty(rows, heads, dim)
    tiles = prefill.tile_table(
        [(0, 0, rows, position)], -(-rows // prefill.ROWS), inputs.device
    )
    prefill.attend(
        inputs.put(query),
        keys,
        values,
        inputs.put(table.unsqueeze(0)),
        tiles,
        None,
        out,
        **how,
    )
    expected, most = attention.attend(
        query, plain_keys, plain_values, table, position, None, **how
    )
    yield Compared(out.cpu(), expected, most * 2**-6)


def _sampling(inputs: CaseInputs) -> Iterator[Compared]:
    logits = inputs.numbers(2, 4099, dtype=torch.float32)
    best, tokens = logits.argmax(dim=1), inputs.empty(2, dtype=torch.int64)
    # One row is greedy; the other has top_k = 1.
    draw.draw(
        inputs.put(logits),
        inputs.put(torch.tensor([[0.0, 0.0], [1.0, 0.0]])),
        inputs.put(torch.tensor([0, 1], dtype=torch.int32)),
        inputs.put(torch.tensor([[1.0, 0.3], [1.0, 0.9]], dtype=torch.float64)),
        tokens,
    )
    yield Compared(tokens.cpu(), best, 0.0)
    own = inputs.empty(2, dtype=torch.float32)
    tops = inputs.empty(2, logprobs.TOPS, dtype=torch.int32)
    top_own = inputs.empty(2, logprobs.TOPS, dtype=torch.float32)
    counts = inputs.put(torch.tensor([3, 3], dtype=torch.int32))
    logprobs.logprobs(inputs.put(logits), inputs.put(best), counts, own, tops, top_own)
    right, ids = logits.double().log_softmax(dim=1).topk(3)
    yield Compared(own.cpu(), right[:, 0], 1e-4)
    yield Compared(tops.cpu()[:, :3], ids, 0.0)
    yield Compared(top_own.cpu()[:, :3], right, 1e-4)


CASES: Final[dict[str, Callable[[CaseInputs], Iterator[Compared]]]] = {
    "norm": _norm,
    "gate": _gate,
    "rotary": _rotary,
    "nf4": _nf4,
    "fp8": _fp8,
    "lora": _lora,
    "attention": _attention,
    "sampling": _sampling,
}
"""The cases by name."""
