"""LoRA: any mix of ranks, ragged and empty segments, rows without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random
from types import ModuleType
from typing import Final

import torch
from veneer_server.backends.cuda.lora import panels, reference, rows
from veneer_server.backends.cuda.lora.tables import AdapterSlots, column_table, tile_table

from tests.gpu.guarded import Guard, numbers
from tests.gpu.interpreter import order
from tests.gpu.subject import Bug, Subject, close

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Batch:
    """x, y [rows, ...] and segments (first row, one past the last, slot)."""

    x: torch.Tensor
    y: torch.Tensor
    segments: list[tuple[int, int, int]]


def _rank(random: Random) -> int:
    if random.random() < 0.06:
        return random.randint(65, 256)
    return random.choice((1, 2, 3, 8, 16, 17, random.randint(1, 64)))


def _adapters(
    random: Random, fan_in: int, fan_outs: list[int], slots: int
) -> tuple[AdapterSlots, torch.Tensor]:
    """Adapters in an arena; between them NaN."""
    places = AdapterSlots(slots, fan_in, fan_outs, CPU)
    parts, length = [], 0

    def take(count: int) -> int:
        nonlocal length
        gap = random.randint(1, 40)
        parts.extend([torch.full((gap,), torch.nan), numbers(random, count)])
        length += gap + count
        return length - count

    for slot in range(slots):
        adapted = [m for m in range(len(fan_outs)) if random.random() < 0.8]
        ranks = {m: _rank(random) for m in adapted}
        a = take(fan_in * sum(ranks.values()))
        places.put(
            slot,
            a,
            [(m, r, take(r * fan_outs[m]), random.uniform(0.1, 3)) for m, r in ranks.items()],
        )
    return places, torch.cat([p.bfloat16() for p in parts])


def _batch(random: Random, fan_in: int, fan_out: int, slots: int, dtype: torch.dtype) -> _Batch:
    segments, row = [], 0
    for _ in range(random.randint(1, 3)):
        row += random.choice((0, 0, 1, 3))  # rows without an adapter
        count = random.choice((0, 1, 1, 2, 4, 5, random.randint(1, 20)))
        segments.append((row, row + count, random.randrange(slots)))
        row += count
    row += random.choice((1, 2))
    x = numbers(random, row, fan_in)
    y = numbers(random, row, fan_out, dtype=dtype)
    return _Batch(x, y, segments)


def _mixed(random: Random, batch: _Batch) -> tuple[_Batch, list[int]]:
    """Some of the rows in another order and in other segments; and where they came from."""
    segments, chosen = [], []
    for begin, end, slot in random.sample(batch.segments, len(batch.segments)):
        kept = [row for row in range(begin, end) if random.random() < 0.7]
        random.shuffle(kept)
        segments.append((len(chosen), len(chosen) + len(kept), slot))
        chosen += kept
    chosen = chosen or [len(batch.x) - 1]
    return _Batch(batch.x[chosen], batch.y[chosen], segments), chosen


def _run(
    module: ModuleType,
    random: Random,
    batch: _Batch,
    adapters: AdapterSlots,
    arena: torch.Tensor,
) -> torch.Tensor:
    guard = Guard(random)
    width = int(adapters.places[:, 1].max()) + random.randint(0, 3)
    needed = sum(-(-(end - begin) // module.ROWS) for begin, end, _ in batch.segments)
    tiles = tile_table(batch.segments, module.ROWS, needed + random.randint(0, 2), CPU)
    columns = column_table(adapters.fan_outs, module.BLOCK_COLUMNS, CPU)
    scratch = (len(batch.x), max(width, 1))
    if module is rows:
        scratch = (rows.splits(adapters.fan_in), *scratch)
    # A table's reader that goes astray finds the last slot.
    guarded = AdapterSlots(len(adapters.places), adapters.fan_in, adapters.fan_outs, CPU)
    guarded.places = guard.given("places", adapters.places, filler=1)
    guarded.scalings = guard.given("scalings", adapters.scalings)
    y = guard.out("y", batch.y, gap=random.choice((0, 3)))
    add = rows.add_rows if module is rows else panels.add_panels
    with order(random):
        add(
            guard.given("x", batch.x, gap=random.choice((0, 5))),
            y,
            guard.given("arena", arena),
            guard.given("tiles", tiles),
            guarded,
            guard.given("columns", columns),
            guard.scratch("scratch", *scratch),
        )
    guard.check()
    return y.contiguous()


def _check(module: ModuleType, random: Random) -> str:
    most = 1300 if random.random() < 0.3 else 150
    fan_in = random.choice((random.randint(1, most), 64 * random.randint(1, most // 64)))
    fan_outs = [random.randint(1, 150) for _ in range(random.randint(1, 3))]
    slots = random.randint(1, 4)
    dtype = random.choice((torch.float32, torch.bfloat16))
    adapters, arena = _adapters(random, fan_in, fan_outs, slots)
    batch = _batch(random, fan_in, sum(fan_outs), slots, dtype)
    told = (
        f"{len(batch.x)} rows, {fan_in} -> {fan_outs}, ranks {adapters.places[:, 1].tolist()}"
    )
    # One row's overflow stays in its row.
    spoiled = random.choice((None, random.randrange(len(batch.x))))
    if spoiled is not None:
        batch.x[spoiled] = torch.nan
    got = _run(module, random, batch, adapters, arena)
    expected, magnitude = reference.add(
        batch.x, batch.y, arena, batch.segments, adapters, rounded=module is panels
    )
    kept = [row for row in range(len(batch.x)) if row != spoiled]
    tolerance = magnitude * (2**-9 if module is panels else 2**-18)
    if dtype == torch.bfloat16:
        tolerance = tolerance + expected.abs() * 2**-8
    close(told, got[kept], expected[kept], tolerance[kept])
    bare = torch.ones(len(batch.x), dtype=torch.bool)
    for begin, end, _ in batch.segments:
        bare[begin:end] = False
    assert torch.equal(got[bare], batch.y[bare]), f"{told}: rows without an adapter changed"
    other, chosen = _mixed(random, batch)
    again = _run(module, random, other, adapters, arena)
    of = got[chosen]
    same = (again == of) | (again.isnan() & of.isnan())
    assert all(bool(same[begin:end].all()) for begin, end, _ in other.segments), (
        f"{told}: a row's bits depend on the batch"
    )
    return told


SUBJECTS: Final = (
    Subject(
        "lora rows",
        partial(_check, rows),
        (
            Bug(
                "segment one row longer",
                rows,
                "mask = (row[:, None] < count) & (column",
                "mask = (row[:, None] <= count) & (column",
            ),
            Bug(
                "segment one row shorter",
                rows,
                "mask = (row[:, None] < count) & (column",
                "mask = (row[:, None] < count - 1) & (column",
            ),
            Bug(
                "stride of A",
                rows,
                "k[:, None].to(tl.int64) * ranks +",
                "k[:, None].to(tl.int64) * (ranks + 1) +",
            ),
            Bug(
                "no mask at fan_in",
                rows,
                "mask=(row[:, None] < count) & (k[None, :] < fan_in)",
                "mask=(row[:, None] < count) & (k[None, :] < fan_in + 1)",
            ),
            Bug(
                "last split left out",
                rows,
                "for split in range(splits)",
                "for split in range(tl.maximum(splits - 1, 1))",
            ),
            Bug("columns of another member", rows, "* width + before + rank", "* width + rank"),
        ),
    ),
    Subject(
        "lora panels",
        partial(_check, panels),
        (
            Bug(
                "segment one row longer",
                panels,
                "mask = (row[:, None] < count) & (column",
                "mask = (row[:, None] <= count) & (column",
            ),
            Bug(
                "stride of B",
                panels,
                "rank[:, None].to(tl.int64) * fan_out",
                "rank[:, None].to(tl.int64) * (fan_out + 1)",
            ),
            Bug(
                "no mask of ranks",
                panels,
                "mask=(row[:, None] < count) & (rank[None, :] < ranks),\n            other",
                "mask=(row[:, None] < count),\n            other",
            ),
            Bug(
                "scaling of the first member",
                panels,
                "scalings + slot * MEMBERS + member",
                "scalings + slot * MEMBERS",
            ),
        ),
    ),
)
