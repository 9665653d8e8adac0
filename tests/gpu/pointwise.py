"""Norms, rotary positions with the write to the cache, and the gate."""

from __future__ import annotations

from random import Random
from typing import Final

import torch
from veneer_server.backends.cuda.pointwise import gate, norm, reference, rotary

from tests.gpu.guarded import Guard, numbers
from tests.gpu.interpreter import order
from tests.gpu.subject import Bug, Subject, close

FLOATS: Final = (torch.float32, torch.bfloat16)


def _same(told: str, again: torch.Tensor, before: torch.Tensor) -> None:
    equal = (again == before) | (again.isnan() & before.isnan())
    assert equal.all(), f"{told}: a row's bits depend on the batch"


def _chosen(random: Random, rows: int) -> list[int]:
    return random.choices(range(rows), k=random.randint(1, 4))


def _rounding(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return expected.abs() * (2**-8 if dtype == torch.bfloat16 else 2**-18) + 1e-6


def _check_norm(random: Random) -> str:
    rows, features = random.randint(1, 5), random.choice((1, 64, 576, random.randint(1, 1500)))
    hidden = numbers(random, rows, features, dtype=torch.float32) * random.uniform(0.01, 50)
    added = random.choice((None, numbers(random, rows, features, dtype=random.choice(FLOATS))))
    weight = numbers(random, features, dtype=torch.float32)
    dtype, epsilon = random.choice(FLOATS), random.choice((1e-5, 1e-2))
    if random.random() < 0.3:
        hidden[random.randrange(rows)] = torch.nan
    told = f"{rows} x {features}, {dtype}"

    def run(which: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        guard = Guard(random)
        stream = guard.out("hidden", hidden[which])
        out = guard.out(
            "out", torch.zeros(len(which), features, dtype=dtype), gap=random.choice((0, 3))
        )
        more = (
            None
            if added is None
            else guard.given("added", added[which], gap=random.choice((0, 7)))
        )
        with order(random):
            norm.normalize(stream, more, guard.given("weight", weight), out, epsilon)
        guard.check()
        return stream.contiguous(), out.contiguous()

    stream, out = run(list(range(rows)))
    total = hidden if added is None else hidden + added.float()
    fine = ~total.isnan().any(dim=1)
    assert torch.equal(stream[fine], total[fine]), f"{told}: the residual stream"
    expected = reference.normalize(total, weight, epsilon)
    close(told, out[fine], expected[fine], _rounding(expected, dtype)[fine])
    which = _chosen(random, rows)
    _same(told, run(which)[1], out[which])
    return told


def _check_gate(random: Random) -> str:
    rows, features = random.randint(1, 4), random.choice((1, 64, random.randint(1, 2500)))
    kind, dtype = random.choice(FLOATS), random.choice(FLOATS)
    pairs = (numbers(random, rows, 2 * features, dtype=torch.float32) * 4).to(kind)
    pairs[0, 0] = random.choice((100.0, -100.0))
    if random.random() < 0.3:
        pairs[random.randrange(rows)] = torch.nan
    told = f"{rows} x {features}, {kind} -> {dtype}"

    def run(which: list[int]) -> torch.Tensor:
        guard = Guard(random)
        out = guard.out(
            "out", torch.zeros(len(which), features, dtype=dtype), gap=random.choice((0, 3))
        )
        with order(random):
            gate.gate(guard.given("pairs", pairs[which], gap=random.choice((0, 7))), out)
        guard.check()
        return out.contiguous()

    out, expected = run(list(range(rows))), reference.gate(pairs)
    fine = ~pairs.isnan().any(dim=1)
    close(told, out[fine], expected[fine], _rounding(expected, dtype)[fine])
    which = _chosen(random, rows)
    _same(told, run(which), out[which])
    return told


def _check_rotary(random: Random) -> str:
    rows, kv_heads = random.randint(1, 4), random.randint(1, 3)
    heads, dim = kv_heads * random.randint(1, 3), 2 * random.choice((4, 16, 24, 32, 40))
    size, blocks = random.choice((8, 16)), 4
    qkv = numbers(random, rows, heads + 2 * kv_heads, dim, dtype=random.choice(FLOATS))
    positions = torch.tensor([random.randrange(200) for _ in range(rows)], dtype=torch.int32)
    angles = torch.arange(200).unsqueeze(1) * 10000.0 ** -(torch.arange(dim // 2) / dim * 2)
    turns = torch.stack((angles.cos(), angles.sin()), dim=1)
    norms = random.choice((None, numbers(random, 2, dim, dtype=torch.float32)))
    slots = torch.tensor(random.sample(range(blocks * size), rows))
    slots[random.randrange(rows)] = -1
    told = f"{rows} rows, {heads} + 2 * {kv_heads} heads of {dim}, norms {norms is not None}"
    used = (slots >= 0).nonzero().squeeze(1)

    def run(which: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        guard = Guard(random)
        query = guard.out("query", torch.zeros(len(which), heads, dim).bfloat16())
        shape = (blocks, kv_heads, size, dim)
        keys = guard.out("keys", torch.full(shape, 7.0).bfloat16())
        values = guard.out("values", torch.full(shape, 7.0).bfloat16())
        with order(random):
            rotary.place(
                guard.given("qkv", qkv[which]),
                guard.given("positions", positions[which]),
                guard.given("slots", slots[which], filler=-1),
                guard.given("turns", turns),
                None if norms is None else guard.given("norms", norms),
                query,
                keys,
                values,
                1e-6,
            )
        guard.check()
        return query.contiguous(), keys.contiguous(), values.contiguous()

    query, keys, values = run(list(range(rows)))
    turned = qkv[:, : heads + kv_heads].double()
    if norms is not None:
        weights = torch.cat((norms[:1].expand(heads, dim), norms[1:].expand(kv_heads, dim)))
        turned = reference.normalize(turned, weights, 1e-6)
    turned = reference.turn(turned, turns[positions.long()])
    largest = turned.abs().amax(dim=-1, keepdim=True)
    # [blocks, block_size, kv_heads, dim]
    of_keys, of_values = keys.transpose(1, 2), values.transpose(1, 2)
    block, offset = slots[used] // size, slots[used] % size
    close(
        told,
        query[used],
        turned[used, :heads],
        2**-8 * turned[used, :heads].abs() + 1e-5 * largest[used, :heads],
    )
    expected = turned[used, heads:]
    close(
        told,
        of_keys[block, offset],
        expected,
        2**-8 * expected.abs() + 1e-5 * largest[used, heads:],
    )
    right = qkv[used, heads + kv_heads :].bfloat16()
    assert torch.equal(of_values[block, offset], right), f"{told}: values"
    others = torch.ones(blocks, size, dtype=torch.bool)
    others[block, offset] = False
    assert (of_keys[others] == 7).all(), f"{told}: wrote keys of other slots"
    assert (of_values[others] == 7).all(), f"{told}: wrote values of other slots"
    assert not query[slots < 0].any(), f"{told}: an unused row was written"
    which = random.sample(range(rows), random.randint(1, rows))
    again, of_again, _ = run(which)
    _same(told, again, query[which])
    kept = slots[which][slots[which] >= 0]
    _same(
        told,
        of_again.transpose(1, 2)[kept // size, kept % size],
        of_keys[kept // size, kept % size],
    )
    return told


SUBJECTS: Final = (
    Subject(
        "norm",
        _check_norm,
        (
            Bug("mean of the block", norm, "axis=0) / features", "axis=0) / BLOCK"),
            Bug(
                "stride of what is added",
                norm,
                "added + row * added_stride",
                "added + row * features",
            ),
            Bug(
                "the sum is not kept",
                norm,
                "tl.store(hidden + row * features + column, numbers, mask=known)",
                "pass",
            ),
            Bug("no mask", norm, "known = column < features", "known = column < features + 1"),
        ),
    ),
    Subject(
        "rotary",
        _check_rotary,
        (
            Bug(
                "sign of the sine",
                rotary,
                "left * cosine - right * sine",
                "left * cosine + right * sine",
            ),
            Bug(
                "the query's norm for keys",
                rotary,
                "(head >= HEADS).to(tl.int32)",
                "(head < 0).to(tl.int32)",
            ),
            Bug(
                "stride of slots",
                rotary,
                "kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE",
                "kv_head) * BLOCK_SIZE + (slot + 1) % BLOCK_SIZE",
            ),
            Bug("no mask", rotary, "known = d < HALF", "known = d < HALF + 1"),
            Bug(
                "positions off by one",
                rotary,
                "tl.load(positions + row).to(tl.int64)",
                "(tl.load(positions + row).to(tl.int64) + 1) % 200",
            ),
            Bug("unused rows", rotary, "if slot < 0:", "if slot < -1:"),
        ),
    ),
    Subject(
        "gate",
        _check_gate,
        (
            Bug(
                "halves swapped",
                gate,
                "tl.load(source, mask",
                "tl.load(source + 2 * features - features, mask",
            ),
            Bug("stride of the output", gate, "row * out_stride", "row * features"),
            Bug("no mask", gate, "known = column < features", "known = column < features + 1"),
            Bug("not the gate's sign", gate, "tl.exp(-left)", "tl.exp(left)"),
        ),
    ),
)
