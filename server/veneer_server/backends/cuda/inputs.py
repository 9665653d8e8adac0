"""A step's arrays in static device memory, at the addresses that captured graphs use.

The host writes a step's arrays to one of two sets of pinned memory, so that it can fill one
while the device may still read the other. Only the part that the step uses is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product, zip_longest
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.backends.cuda.attention import decode, prefill
from veneer_server.backends.cuda.buckets import LaunchBucket, Sizes, pieces_for, rows_for
from veneer_server.backends.cuda.device import Device
from veneer_server.backends.cuda.linears import PANEL, padded
from veneer_server.backends.cuda.lora import panels as lora_panels
from veneer_server.backends.cuda.lora import rows as lora_rows
from veneer_server.step.arrays import StepArrays

SETS: Final = 2


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """The sizes of a step's launches: they depend on nothing else but data in device memory.

    Attributes:
        bucket: the step's padded sizes.
        graph: whether the launches depend on the bucket alone, since every sequence adds one
            row and needs its logits.
        decodes: number of sequences for attention's decode kernel: the first ones of
            `Filled.tables`. In a step with a graph, all rows of the bucket; in exact mode 0.
        tiles: number of tiles for attention's prefill kernel.
        few, many: number of tiles for the LoRA kernels for few and for many rows.
        width: columns of the block tables.
        logits: rows of logits, padded.
    """

    bucket: LaunchBucket
    graph: bool
    decodes: int
    tiles: int
    few: int
    many: int
    width: int
    logits: int


@dataclass(frozen=True, slots=True)
class Filled:
    """A step's arrays on the device, at the same addresses for all steps.

    Attributes:
        tokens: [rows] int64.
        positions: [rows] int32.
        slots: [rows] int64, -1 for unused rows.
        contexts: [decodes] int32, 0 for unused entries.
        tables: [sequences, width] int32, decoding sequences first.
        decoding: [decodes] int64, the rows of the decoding sequences.
        tiles: [tiles, 4] int32, see `attention.prefill`.
        few, many: [tiles, 3] int32, see `lora.tables`.
        logit_rows: [logits] int64.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    contexts: torch.Tensor
    tables: torch.Tensor
    decoding: torch.Tensor
    tiles: torch.Tensor
    few: torch.Tensor
    many: torch.Tensor
    logit_rows: torch.Tensor


class StaticInputs:
    """The static arrays that all steps use.

    Args:
        sizes: the limits of a step.
        exact: whether each row's sums have one order, whatever shares the step.

    Attributes:
        rows, sequences: most rows and sequences of a step, padded.
        current: the set of pinned memory that `turn` chose last.
    """

    def __init__(self, device: Device, sizes: Sizes, block_size: int, *, exact: bool) -> None:
        self._device = device
        self._sizes = sizes
        self._exact = exact
        self._block_size = block_size
        rows = padded(max(sizes.rows, rows_for(sizes.sequences)))
        sequences = padded(rows_for(sizes.sequences))
        self._width = width = decode.splits(sizes.context) * decode.SPLIT // block_size
        numbers: dict[str, tuple[int, torch.dtype]] = {
            "tokens": (rows, torch.int64),
            "positions": (rows, torch.int32),
            "slots": (rows, torch.int64),
            "contexts": (sequences, torch.int32),
            "tables": (sequences * width, torch.int32),
            "decoding": (sequences, torch.int64),
            "tiles": (4 * rows, torch.int32),
            "few": (3 * rows, torch.int32),
            "many": (3 * rows, torch.int32),
            "logit_rows": (rows, torch.int64),
        }
        self.rows, self.sequences = rows, sequences
        self._there = {n: device.empty(size, dtype=kind) for n, (size, kind) in numbers.items()}
        self._here = [
            {n: device.pinned(size, dtype=kind) for n, (size, kind) in numbers.items()}
            for _ in range(SETS)
        ]
        self.current = 0

    def turn(self) -> int:
        """Switch to the other set of pinned memory and return its index. The device must be
        done with that set before the next `fill`, which writes to it."""
        self.current = (self.current + 1) % SETS
        return self.current

    def shape(self, step: StepArrays, segments: list[tuple[int, int, int]]) -> LaunchShape:
        """Return the shape of a step's launches. ``segments`` is as for `fill`."""
        counts = np.diff(step.row_starts)
        rows, longest = len(step.tokens), int(step.contexts.max())
        up = self._up
        if bool((counts == 1).all()) and len(step.logit_rows) == rows:
            return self._decoding(rows, decode.splits(longest), adapters=bool(segments))
        alone = (counts == 1) & (not self._exact)
        decodes = int(alone.sum())
        pieces = decode.splits(int(step.contexts[alone].max())) if decodes else 0
        few, many = self._cut(step, segments)
        return LaunchShape(
            LaunchBucket(up(rows_for(rows)), pieces, bool(segments)),
            False,
            decodes,
            int((-(-counts[~alone] // prefill.ROWS)).sum()),
            len(few),
            len(many),
            step.block_tables.shape[1],
            up(rows_for(len(step.logit_rows))),
        )

    def decoding(self) -> Iterator[LaunchShape]:
        """Yield the shapes of all steps that only decode: one for each graph."""
        most = decode.splits(self._sizes.context)
        sizes = {self._up(rows_for(n + 1)) for n in range(self._sizes.sequences)}
        lengths = {min(pieces_for(n + 1), most) for n in range(most)}
        for rows, pieces, adapters in product(sorted(sizes), sorted(lengths), (False, True)):
            yield self._decoding(rows, pieces, adapters=adapters)

    def mixed(self) -> Iterator[LaunchShape]:
        """Yield shapes of steps with prompts. Between them they make Triton compile every
        variant of the kernels."""
        sizes = sorted({self._up(rows_for(n + 1)) for n in range(self._sizes.rows)})
        few = _kinds(size for size in sizes if size <= PANEL)
        many = _kinds(size for size in sizes if size > PANEL)
        lengths = _kinds(n + 1 for n in range(decode.splits(self._sizes.context)))
        widths = _kinds(n + 1 for n in range(self._width))
        tables = list(product(lengths, widths))
        # No kernel gets both the rows and one of the other sizes, so not every pair is needed.
        for rows, table in zip_longest(few + many, tables):
            pieces, width = table or tables[-1]
            bucket = LaunchBucket(rows or few[0], pieces, True)
            alone = 0 if self._exact else 1
            yield LaunchShape(bucket, False, alone, 1, 1, alone, width, self._up(1))

    def _up(self, rows: int) -> int:
        """Return the rows of the launches for a bucket of ``rows``: padded in exact mode."""
        return min(padded(rows) if self._exact else rows, self.rows)

    def _decoding(self, rows: int, pieces: int, *, adapters: bool) -> LaunchShape:
        size = self._up(rows_for(rows))
        pieces = min(pieces_for(pieces), decode.splits(self._sizes.context))
        width = pieces * decode.SPLIT // self._block_size
        tiles, decodes = (size, 0) if self._exact else (0, size)
        bucket = LaunchBucket(size, pieces, adapters)
        return LaunchShape(
            bucket, True, decodes, tiles, size if adapters else 0, 0, width, size
        )

    def fill(
        self,
        step: StepArrays,
        slots: NDArray[np.int64],
        tables: NDArray[np.int64],
        segments: list[tuple[int, int, int]],
        shape: LaunchShape,
    ) -> Filled:
        """Write a step's arrays to the set chosen by `turn`, and enqueue their copies.

        Args:
            slots, tables: as in `StepArrays`, but with the kernels' block numbers.
            segments: tuples of first row, one past the last row, slot of the adapter.
        """
        counts = np.diff(step.row_starts)
        rows, sequences = shape.bucket.rows, len(step.contexts)
        alone = np.zeros(sequences, dtype=np.bool_)
        if not self._exact:
            alone = counts == 1
        order = np.concatenate((np.flatnonzero(alone), np.flatnonzero(~alone)))
        place = np.empty(sequences, dtype=np.int64)
        place[order] = np.arange(sequences)
        held = rows if shape.graph else sequences
        width = min(shape.width, tables.shape[1])
        used = np.zeros((held, shape.width), dtype=np.int32)
        used[:sequences, :width] = tables[order, :width]
        decoding = order[: int(alone.sum())]
        tiles = [
            (place[s], row, min(prefill.ROWS, end - row), step.positions[row])
            for s in np.flatnonzero(~alone)
            for end in (step.row_starts[s + 1],)
            for row in range(step.row_starts[s], end, prefill.ROWS)
        ]
        few, many = self._cut(step, segments)
        return Filled(
            tokens=self._put("tokens", step.tokens, rows),
            positions=self._put("positions", step.positions, rows),
            slots=self._put("slots", slots, rows, -1),
            contexts=self._put("contexts", step.contexts[decoding], shape.decodes),
            tables=self._put("tables", used.reshape(-1), used.size).view(used.shape),
            decoding=self._put("decoding", step.row_starts[decoding], shape.decodes),
            tiles=self._table("tiles", tiles, shape.tiles, 4),
            few=self._table("few", few, shape.few, 3),
            many=self._table("many", many, shape.many, 3),
            logit_rows=self._put("logit_rows", step.logit_rows, shape.logits),
        )

    def _cut(
        self, step: StepArrays, segments: list[tuple[int, int, int]]
    ) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """Cut segments into tiles for LoRA's kernel for few rows and for the one for many. A
        row's kernel depends on whether its sequence decodes or adds a part of its prompt; in
        exact mode all rows take the kernel for few rows."""
        few: list[tuple[int, int, int]] = []
        many: list[tuple[int, int, int]] = []
        # [rows] how many rows the row's sequence has
        counts = np.diff(step.row_starts)
        alone = np.repeat(counts == 1, counts)
        for begin, end, slot in segments:
            here = alone[begin:end]
            cuts = np.flatnonzero(here[1:] != here[:-1]) + begin + 1
            bounds = [begin, *cuts.tolist(), end]
            for first, last in pairwise(bounds):
                one = self._exact or bool(alone[first])
                tiles, size = (few, lora_rows.ROWS) if one else (many, lora_panels.ROWS)
                tiles += [(r, min(size, last - r), slot) for r in range(first, last, size)]
        return few, many

    def _table(
        self, name: str, tiles: Sequence[tuple[int, ...]], count: int, fields: int
    ) -> torch.Tensor:
        """Put tiles into a device array [count, fields], followed by unused tiles."""
        flat = np.array(tiles, dtype=np.int32).reshape(-1)
        return self._put(name, flat, count * fields).view(count, fields)

    def _put(
        self, name: str, numbers: NDArray[Any], size: int, filler: int = 0
    ) -> torch.Tensor:
        """Copy ``numbers``, padded with the filler to ``size``, to the start of a device array,
        and return that part of it."""
        here, there = self._here[self.current][name][:size], self._there[name][:size]
        if size:
            target = here.numpy()
            target[: len(numbers)] = numbers
            target[len(numbers) :] = filler
            self._device.call(there.copy_, here, non_blocking=True)
        return there


def _kinds(numbers: Iterable[int]) -> list[int]:
    """Return one number of each kind for which Triton compiles a kernel separately: an argument
    that is 1, one that is a multiple of 16, and any other."""
    found: dict[tuple[bool, bool], int] = {}
    for number in numbers:
        found.setdefault((number == 1, number % 16 == 0), number)
    return list(found.values())
