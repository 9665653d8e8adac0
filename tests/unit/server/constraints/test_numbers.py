"""Numbers in JSON end by themselves, whatever the model would like to write."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from veneer_registry.errors import InvalidField
from veneer_server.constraints.grammars import Grammars
from veneer_server.constraints.matcher.numbers import EXPONENT, Digits
from veneer_server.step.plan import ConstraintState
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import Constraint, ConstraintLimits

VOCAB, EOS = 49152, 2
UNHELD: queue.SimpleQueue[int] = queue.SimpleQueue()
TOKENS = [*"0123456789", ".", "e", "-", "+", '"', "\\", "}", ",", "12", ".5", "a"]


def digits(most: int, text: str) -> Digits:
    made = Digits(most, lambda token: TOKENS[token].encode())
    made.take([TOKENS.index(character) for character in text])
    return made


def left(made: Digits, allowed: str) -> str:
    """Which single characters are left of these."""
    bits = np.zeros(24, dtype=np.uint8)
    bits[[TOKENS.index(character) for character in allowed]] = 1
    found = made.bounded(np.packbits(bits, bitorder="little").tobytes())
    kept = np.unpackbits(np.frombuffer(found, dtype=np.uint8), bitorder="little")
    return "".join(token for token, bit in zip(TOKENS, kept, strict=False) if bit)


@pytest.mark.parametrize(
    ("text", "allowed", "expected"),
    [
        ("12", "0.}", "0.}"),
        ("123", "0.}", ".}"),
        ("-123", "0.}", ".}"),
        ("123.45", "0}", "0}"),
        ("123.456", "0e}", "e}"),
        ("1e-23", "0}", "0}"),
        ("1e-234", "0}", "}"),
        ("123,45", "0}", "0}"),
        ('"123', '0"a', '0"a'),
        ('"\\"123', '0"a', '0"a'),
        ('"a"123', "0}", "}"),
        ("123", "01", "01"),  # the schema allows nothing else
    ],
)
def test_a_long_number_gets_no_more_digits(text: str, allowed: str, expected: str) -> None:
    assert EXPONENT == 3
    assert left(digits(3, text), allowed) == expected


def longest(grammars: Grammars, tokenizer: TextTokenizer, schema: dict[str, Any]) -> str:
    """What a model writes that likes digits best, then whatever makes a number longer."""
    done: queue.SimpleQueue[InvalidField | None] = queue.SimpleQueue()
    grammars.compile(1, Constraint("json_schema", json.dumps(schema)), done.put)
    assert done.get(timeout=60) is None
    wishes = [
        tokenizer.encode(text, add_special_tokens=False)[0] for text in ("7", ".", "e", "-")
    ]
    written: list[int] = []
    try:
        while len(written) < 100:
            known = grammars.allowed(1, time.monotonic() + 60)
            if known is ConstraintState.LATE:  # the machine is busy
                UNHELD.get(timeout=60)
                continue
            if not isinstance(known, np.ndarray):
                assert known is ConstraintState.COMPLETE
                break
            wished = [token for token in wishes if known[token]]
            token = wished[0] if wished else int(known.nonzero()[0][0])
            if token == EOS:
                break
            written.append(token)
            grammars.advance({1: token}, time.monotonic() + 60)
    finally:
        grammars.forget(1)
    return tokenizer.decode(written)


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(base_folder)


@pytest.fixture(scope="module", params=[0, 6])
def bounded(
    request: pytest.FixtureRequest, base_folder: Path
) -> Iterator[tuple[int, Grammars]]:
    limits = ConstraintLimits(number_digits=request.param)
    made = Grammars.of_base(
        base_folder,
        vocab_size=VOCAB,
        eos_token_ids=[EOS],
        limits=limits,
        unhold=UNHELD.put,
    )
    assert made.usable()
    yield request.param, made
    made.close()


def test_numbers_end_unless_the_operator_lifts_the_bound(
    bounded: tuple[int, Grammars], tokenizer: TextTokenizer
) -> None:
    most, grammars = bounded
    for schema in ({"type": "number"}, {"type": "integer"}):
        written = longest(grammars, tokenizer, schema)
        if not most:
            assert len(written) == 100, "it would go on"
            continue
        whole = schema["type"] == "integer"
        assert written == ("777777" if whole else "777777.777777e777")
        json.loads(written)
    score = {
        "type": "object",
        "properties": {"score": {"type": "number"}},
        "required": ["score"],
        "additionalProperties": False,
    }
    written = longest(grammars, tokenizer, score)
    if most:
        assert set(json.loads(written)) == {"score"}
    # What the schema demands is written in any case.
    long = {"const": 3.14159265358979}
    assert longest(grammars, tokenizer, long) == "3.14159265358979"
