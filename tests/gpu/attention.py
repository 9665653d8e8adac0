"""Paged attention: ragged contexts, grouped queries, windows, caps, sinks, scattered blocks."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Final

import torch
from veneer_server.backends.cuda.attention import decode, prefill, reference

from tests.gpu.guarded import Guard, numbers
from tests.gpu.interpreter import order
from tests.gpu.subject import Bug, Subject, close


@dataclass(frozen=True, slots=True)
class _Model:
    heads: int
    kv_heads: int
    dim: int
    block_size: int
    sinks: torch.Tensor | None
    options: dict[str, Any]

    def __str__(self) -> str:
        return (
            f"{self.heads} heads over {self.kv_heads} of {self.dim}, "
            f"blocks of {self.block_size}, "
            f"{'sinks, ' if self.sinks is not None else ''}{self.options}"
        )


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Rows from ``position`` on: query [rows, heads, dim]; keys, values [tokens, kv_heads,
    dim], where what no row sees is NaN."""

    position: int
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def _model(random: Random) -> _Model:
    kv_heads = random.randint(1, 2)
    heads = kv_heads * random.choice((1, 2, 3, 4))
    dim = random.choice((8, 16, 32, 48, 64, 80))
    return _Model(
        heads,
        kv_heads,
        dim,
        random.choice((8, 16, 32)),
        random.choice((None, numbers(random, heads, dtype=torch.float32))),
        {
            "scale": dim**-0.5 * random.choice((1.0, 0.7)),
            "window": random.choice((None, 1, 17, random.randint(1, 300))),
            "cap": random.choice((0.0, 0.0, 2.0, 30.0)),
        },
    )


def _sequence(random: Random, model: _Model, rows: int, position: int) -> _Sequence:
    tokens, window = position + rows, model.options["window"]
    keys, values = (numbers(random, tokens, model.kv_heads, model.dim) for _ in range(2))
    if window is not None and position + 1 > window:
        keys[: position + 1 - window] = torch.nan
        values[: position + 1 - window] = torch.nan
    # Scores that differ by more than rounding.
    query = numbers(random, rows, model.heads, model.dim, dtype=torch.float32) * 2
    return _Sequence(position, query.bfloat16(), keys, values)


def _placed(
    random: Random, model: _Model, sequences: list[_Sequence]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """keys and values of the cache, NaN wherever no token is, and tables."""
    size = model.block_size
    counts = [-(-len(s.keys) // size) for s in sequences]
    spare = random.randint(1, 4)
    places = list(range(1, sum(counts) + spare))
    random.shuffle(places)
    shape = (sum(counts) + spare, model.kv_heads, size, model.dim)
    caches = [torch.full(shape, torch.nan).bfloat16() for _ in range(2)]
    tables = torch.zeros(len(sequences), max(counts) + random.randint(0, 2), dtype=torch.int32)
    for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        blocks = [places.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(blocks)
        for token in range(len(sequence.keys)):
            at = (blocks[token // size], slice(None), token % size)
            caches[0][at], caches[1][at] = sequence.keys[token], sequence.values[token]
    return caches[0], caches[1], tables


def _decoded(random: Random, model: _Model, sequences: list[_Sequence | None]) -> torch.Tensor:
    """[sequences, heads, dim]; None is an unused place."""
    some = [s for s in sequences if s is not None]
    keys, values, of_some = _placed(random, model, some)
    tables = torch.zeros(len(sequences), of_some.shape[1], dtype=torch.int32)
    used = torch.tensor([s is not None for s in sequences])
    tables[used] = of_some
    contexts = torch.zeros(len(sequences), dtype=torch.int32)
    contexts[used] = torch.tensor([len(s.keys) for s in some], dtype=torch.int32)
    query = torch.full((len(sequences), model.heads, model.dim), torch.nan).bfloat16()
    query[used] = torch.cat([s.query for s in some])
    pieces = decode.splits(int(contexts.max())) + random.randint(0, 2)
    guard = Guard(random)
    out = guard.out("out", torch.zeros_like(query))
    with order(random):
        decode.attend(
            guard.given("query", query),
            guard.given("keys", keys),
            guard.given("values", values),
            guard.given("tables", tables),
            guard.given("contexts", contexts),
            None if model.sinks is None else guard.given("sinks", model.sinks),
            guard.scratch("sums", len(sequences), model.heads, pieces, model.dim),
            guard.scratch("weights", len(sequences), model.heads, pieces, 2),
            out,
            **model.options,
        )
    guard.check()
    return out.contiguous()


def _prefilled(random: Random, model: _Model, sequences: list[_Sequence]) -> list[torch.Tensor]:
    """For each sequence [rows, heads, dim]."""
    keys, values, tables = _placed(random, model, sequences)
    chunks, row = [], 0
    for number, sequence in enumerate(sequences):
        row += random.choice((0, 0, 1))
        chunks.append((number, row, row + len(sequence.query), sequence.position))
        row += len(sequence.query)
    query = torch.full((row + 1, model.heads, model.dim), torch.nan).bfloat16()
    for (_, begin, end, _), sequence in zip(chunks, sequences, strict=True):
        query[begin:end] = sequence.query
    needed = sum(-(-(end - begin) // prefill.ROWS) for _, begin, end, _ in chunks)
    tiles = prefill.tile_table(chunks, needed + random.randint(0, 2), torch.device("cpu"))
    guard = Guard(random)
    out = guard.out("out", torch.zeros_like(query))
    with order(random):
        prefill.attend(
            guard.given("query", query),
            guard.given("keys", keys),
            guard.given("values", values),
            guard.given("tables", tables),
            guard.given("tiles", tiles),
            None if model.sinks is None else guard.given("sinks", model.sinks),
            out,
            **model.options,
        )
    guard.check()
    return [out[begin:end].contiguous() for _, begin, end, _ in chunks]


def _compare(told: str, got: torch.Tensor, model: _Model, sequence: _Sequence) -> None:
    size = model.block_size
    tokens = len(sequence.keys)
    padding = -tokens % size
    keys, values = (
        torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, padding))
        .view(-1, size, model.kv_heads, model.dim)
        .transpose(1, 2)
        for cache in (sequence.keys, sequence.values)
    )
    blocks = torch.arange(len(keys))
    expected, magnitude = reference.attend(
        sequence.query, keys, values, blocks, sequence.position, model.sinks, **model.options
    )
    # Weights and results are rounded to bfloat16, scores are sums of float32.
    close(told, got, expected, 2**-7 * magnitude + 1e-5)


def _check_decode(random: Random) -> str:
    model = _model(random)
    longest = random.choice((5, 64, 65, 256, 257, random.randint(1, 700)))
    sequences: list[_Sequence | None] = [
        _sequence(random, model, 1, random.choice((0, longest - 1, random.randrange(longest))))
        for _ in range(random.randint(1, 3))
    ]
    sequences.insert(random.randrange(2), None)
    told = f"contexts {[0 if s is None else len(s.keys) for s in sequences]}, {model}"
    got = _decoded(random, model, sequences)
    for row, sequence in enumerate(sequences):
        if sequence is None:
            assert not got[row].any(), f"{told}: an unused place was written"
        else:
            _compare(told, got[row : row + 1], model, sequence)
    chosen = [i for i, s in enumerate(sequences) if s is not None and random.random() < 0.7]
    chosen = random.sample(chosen, len(chosen)) or [
        sequences.index(next(filter(None, sequences)))
    ]
    again = _decoded(random, model, [sequences[i] for i in chosen])
    assert torch.equal(again, got[chosen]), f"{told}: a row's bits depend on the batch"
    return told


def _check_prefill(random: Random) -> str:
    model = _model(random)
    sequences = [
        _sequence(
            random,
            model,
            random.choice((1, 2, 64, 65, random.randint(1, 70))),
            random.choice((0, 0, 31, random.randint(0, 150))),
        )
        for _ in range(random.randint(1, 2))
    ]
    told = f"rows {[(s.position, len(s.query)) for s in sequences]}, {model}"
    got = _prefilled(random, model, sequences)
    for result, sequence in zip(got, sequences, strict=True):
        _compare(told, result, model, sequence)
    # A later part of the first sequence, as a chunk of its own, behind another sequence.
    sequence, result = sequences[0], got[0]
    skipped = random.randrange(len(sequence.query))
    part = _Sequence(
        sequence.position + skipped, sequence.query[skipped:], sequence.keys, sequence.values
    )
    again = _prefilled(random, model, [*sequences[1:], part])
    assert torch.equal(again[-1], result[skipped:]), f"{told}: bits depend on the chunks"
    return told


SUBJECTS: Final = (
    Subject(
        "attention decode",
        _check_decode,
        (
            Bug(
                "window one token longer",
                decode,
                "first = tl.maximum(context - window, 0)\n",
                "first = tl.maximum(context - window - 1, 0)\n",
            ),
            Bug("last token not seen", decode, "(token < end)", "(token < end - 1)"),
            Bug(
                "no mask of tokens",
                decode,
                'scores = tl.where(seen[None, :], scores, float("-inf"))',
                "scores = scores + 0",
            ),
            Bug(
                "another head's keys",
                decode,
                "head = kv_head * group + member",
                "head = member * KV_HEADS + kv_head",
            ),
            Bug(
                "stride of blocks",
                decode,
                "(block * KV_HEADS + kv_head) * BLOCK_SIZE",
                "(block + kv_head) * BLOCK_SIZE",
            ),
            Bug("sums not rescaled", decode, "total * shrink[:, None]", "total"),
            Bug(
                "last piece left out",
                decode,
                "end = tl.cdiv(context, SPLIT)",
                "end = tl.maximum(context // SPLIT, begin + 1)",
            ),
        ),
    ),
    Subject(
        "attention prefill",
        _check_prefill,
        (
            Bug(
                "a row sees the next",
                prefill,
                "token[None, :] <= last[:, None]",
                "token[None, :] <= last[:, None] + 1",
            ),
            Bug(
                "window one token shorter",
                prefill,
                "last[:, None] - window)",
                "last[:, None] - window + 1)",
            ),
            Bug(
                "stride of tables",
                prefill,
                "tables + sequence * width",
                "tables + sequence * (width - 1)",
            ),
            Bug(
                "nothing seen yet",
                prefill,
                'level = tl.where(higher == float("-inf"), 0.0, higher)',
                "level = higher",
            ),
            Bug("the first head's sink", prefill, "tl.load(sinks + head)", "tl.load(sinks)"),
        ),
    ),
)
