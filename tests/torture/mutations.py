"""Damage bytes and JSON values from a seed; rows 1 and 2 feed them to the parsers."""

from __future__ import annotations

import copy
import random
from typing import Any

TOKENS = (
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\u0000",
    b"\\ud800",
    b"\xff",
    b"\x00",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"9" * 20,
    b"9" * 5000,
    b"null",
    b"true",
    b"{{{{",
    b"[" * 3000,
    b'{"a":' * 300,
    b'"r":',
    b'"lora_alpha":',
    b'"rank_pattern":',
    b'"data_offsets":',
    b'"shape":',
    b'"dtype":',
    b'"BF16"',
    b'"__metadata__":{}',
)
"""Pieces that mean something to a JSON parser, or to the reader of its result."""

STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    4096,
    4097,
    1 << 31,
    1 << 62,
    1 << 64,
    10**400,
    0.5,
    -0.0,
    1e30,
    1e308,
    5e-324,
    "",
    "q_proj",
    "(a+)+$",
    "../../etc/x",
    "\x00",
    "é" * 50,
    "x" * 5000,
    [],
    {},
    [[]],
    {"": {}},
    ["q_proj"],
    [1, -1],
    [0, 1 << 60],
    {"q_proj": 3},
    "LORA",
    "IA3",
    "CAUSAL_LM",
    "none",
    "all",
    "I8",
    "F64",
    "F16",
    "BF16",
    "F32",
)
"""Unexpected values for a field."""


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Make one to eight flips, cuts, insertions or repeats, mostly near the front."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        reach = len(changed) if rng.random() < 0.3 else min(len(changed), 900)
        at = rng.randrange(reach + 1)
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] = rng.randrange(256)
            case 1 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at : at + rng.choice((1, 2, 50))]
            case 3:
                changed[at:at] = rng.choice(TOKENS)
            case 4:
                changed[at:at] = changed[at : at + rng.choice((1, 20, 300))]
            case _ if rng.random() < 0.3:
                del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return a copy with one to three places replaced, removed, renamed or repeated."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = _mutate_once(changed, rng)
    return changed


def _mutate_once(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[f"{key}x"] = value.pop(key)
            case 2:
                other = rng.choice(list(value))
                value[key], value[other] = value[other], value[key]
            case _:
                value[key] = _mutate_once(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                del value[at]
            case 1:
                value.insert(at, copy.deepcopy(rng.choice(STRANGE)))
            case _:
                value[at] = _mutate_once(value[at], rng)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.6:
        return value + rng.choice((-8, -2, -1, 1, 2, 8, 1 << 40))
    return copy.deepcopy(rng.choice(STRANGE))
