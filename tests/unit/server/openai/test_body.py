"""The content of a JSON body is counted before parsing, including strings."""

from __future__ import annotations

import json
import random

import pytest
from veneer_server.openai.http import body as module
from veneer_server.openai.http.body import (
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_NODES,
    check_size,
    parse_body,
)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"{}," * MAX_NODES + b"{}]",
        b"[" * (MAX_NODES + 1),
        b"[" + b'"",' * MAX_NODES + b'""]',
        b'{"a":' * (MAX_NODES // 2 + 1),
        b"[" + b"1," * (MAX_ITEMS + 1) + b"1]",
    ],
)
def test_too_much_is_refused_before_it_is_parsed(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.json, "loads", None)
    # Internal checks: ValueErrors without metadata, here and below.
    with pytest.raises(ValueError, match="more than"):
        parse_body(body)


@pytest.mark.parametrize(
    "value",
    [
        "{[:,}]" * 100_000,
        '"' * 200_000,
        "\\" * 200_001,
        '\\"' * 100_000,
        list(range(MAX_ITEMS)),
        [""] * 1000,
        [{"role": "user", "content": '{"a": [1, 2]}' * 2000}] * 10,
    ],
)
def test_what_strings_hold_does_not_count(value: object) -> None:
    body = json.dumps({"prompt": value}).encode()
    check_size(body)
    assert parse_body(body) == {"prompt": value}


def test_the_count_is_that_of_the_parsed_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random documents: refused exactly where there are more nodes than allowed."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    def value(depth: int) -> object:
        kind = rng.randrange(5 if depth else 3)
        if kind < 3:
            return [rng.randrange(9), None, "".join(rng.choices('a\\"{[:,é', k=5))][kind]
        if kind == 3:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {str(n): value(depth - 1) for n in range(rng.randrange(4))}

    def nodes(one: object) -> int:
        if isinstance(one, dict):
            return 1 + sum(2 + nodes(inner) for inner in one.values())
        if isinstance(one, list):
            return 1 + sum(map(nodes, one))
        return int(isinstance(one, str))

    for _ in range(300):
        given = value(4)
        monkeypatch.setattr(module, "PIECE", rng.randrange(1, 40))
        text = json.dumps(given, ensure_ascii=rng.random() < 0.5).encode()
        monkeypatch.setattr(module, "MAX_NODES", nodes(given) + 1)
        check_size(text)
        monkeypatch.setattr(module, "MAX_NODES", nodes(given) - 1)
        with pytest.raises(ValueError, match="more than"):
            check_size(text)


def test_depth() -> None:
    assert parse_body(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 60_000):
        with pytest.raises((ValueError, RecursionError)):
            parse_body(b"[" * depth + b"]" * depth)


@pytest.mark.parametrize(
    "body",
    [b'"\xed\xa0\x80"', b'"\xff"', b'"\\ud800"', b'{"\\udc00":1}', b"NaN", b"\xef\xbb\xbf{}"],
)
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the words are the library's
        parse_body(body)


@pytest.mark.parametrize("before", range(10))
def test_half_of_a_pair_where_two_pieces_meet(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 8)
    with pytest.raises(ValueError, match="surrogate"):
        parse_body(b'"%b\\ud800"' % (b"x" * before))


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_body(b'"\\ud83e\\udd86"') == "🦆"
