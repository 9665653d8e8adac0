"""Constraints with the real base's tokenizer: allowed next tokens, and completion."""

from __future__ import annotations

import json
import queue
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from veneer_registry.errors import InvalidField
from veneer_server.constraints.grammars import GrammarFailed, Grammars
from veneer_server.step.plan import ConstraintState
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import Constraint, ConstraintLimits

from tests.unit.server.never_slow import never_slow

VOCAB, EOS = 49152, 2
PADDED = VOCAB + 40
"""Models often have a few rows of logits more than their tokenizer has tokens."""

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(base_folder)


@pytest.fixture(scope="module")
def grammars(base_folder: Path) -> Iterator[Grammars]:
    with pytest.MonkeyPatch.context() as patch:
        never_slow(patch)
        made = begin(base_folder)
        assert made.usable()
        yield made
        made.close()


def begin(folder: Path, **limits: Any) -> Grammars:
    return Grammars.of_base(
        folder,
        vocab_size=PADDED,
        eos_token_ids=[EOS],
        limits=ConstraintLimits(**limits),
        unhold=lambda sequence: None,
    )


def allowed(grammars: Grammars, sequence: int) -> NDArray[np.bool_]:
    """What may come next, however long it takes to know."""
    known = grammars.allowed(sequence, time.monotonic() + 60)
    assert isinstance(known, np.ndarray)
    return known


def advance(grammars: Grammars, sequence: int, token: int) -> bool:
    """Take a token; whether nothing more may follow, however long it takes to know."""
    how = grammars.advance({sequence: token}, time.monotonic() + 60)[sequence]
    return how is ConstraintState.COMPLETE


def compile_now(grammars: Grammars, sequence: int, constraint: Constraint) -> None:
    done: queue.SimpleQueue[InvalidField | None] = queue.SimpleQueue()
    grammars.compile(sequence, constraint, done.put)
    if (error := done.get(timeout=60)) is not None:
        raise error


def say(grammars: Grammars, constraint: Constraint, tokens: list[int]) -> tuple[int, bool]:
    """How many of the tokens may be said in turn, and whether it is complete then."""
    compile_now(grammars, 1, constraint)
    try:
        for at, token in enumerate(tokens):
            if not allowed(grammars, 1)[token]:
                return at, False
            if advance(grammars, 1, token):
                return at + 1, True
        return len(tokens), False
    finally:
        grammars.forget(1)


def walk(
    grammars: Grammars, tokenizer: TextTokenizer, constraint: Constraint, rng: random.Random
) -> str:
    """A text of random allowed tokens, to its end."""
    compile_now(grammars, 1, constraint)
    said: list[int] = []
    try:
        while len(said) < 300:
            may_follow = np.flatnonzero(allowed(grammars, 1))
            assert may_follow.max() < VOCAB
            token = int(rng.choice(may_follow))
            if token != EOS:
                said.append(token)
            if advance(grammars, 1, token):
                return tokenizer.decode(said)
    finally:
        grammars.forget(1)
    raise AssertionError("a bounded schema must end")


def test_random_walks_end_in_what_the_schema_asks_for(
    grammars: Grammars, tokenizer: TextTokenizer
) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    constraint = Constraint("json_schema", json.dumps(PERSON))
    for _ in range(25):
        found: dict[str, Any] = json.loads(walk(grammars, tokenizer, constraint, rng))
        assert {"name", "age"} <= set(found) <= {"name", "age", "tags"}
        assert isinstance(found["name"], str)
        assert len(found["name"]) <= 8
        assert 0 <= found["age"] <= 150
        assert len(found.get("tags", [])) <= 2
    for _ in range(25):
        text = walk(grammars, tokenizer, Constraint("regex", "[a-c]{2,5}-[0-9]{3}"), rng)
        assert re.fullmatch("[a-c]{2,5}-[0-9]{3}", text)
    assert len(grammars) == 0


def test_choices_are_literal_texts_whatever_they_hold(
    grammars: Grammars, tokenizer: TextTokenizer
) -> None:
    texts = ["yes", "yes sir", 'a"b\\c', "two\nlines", "日本 🚀", "/x|y/", "a.*b", "(", "é"]
    constraint = Constraint("choice", json.dumps(texts))
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert say(grammars, constraint, ids) == (len(ids), text != "yes"), text
        assert say(grammars, constraint, [*ids, EOS]) == (len(ids) + (text == "yes"), True)
    assert say(grammars, constraint, tokenizer.encode("axxb", add_special_tokens=False))[1] is (
        False
    )


def test_what_can_go_on_ends_by_the_end_token_and_what_cannot_ends_by_itself(
    grammars: Grammars, tokenizer: TextTokenizer
) -> None:
    digits = tokenizer.encode("12", add_special_tokens=False)
    assert say(grammars, Constraint("regex", "[0-9]+"), digits) == (len(digits), False)
    assert say(grammars, Constraint("regex", "[0-9]+"), [*digits, EOS])[1] is True
    assert say(grammars, Constraint("regex", "[0-9]{2}"), digits) == (len(digits), True)
    assert say(grammars, Constraint("regex", "[0-9]{2}"), [EOS]) == (0, False)
    brace = tokenizer.encode('{"a": 1}', add_special_tokens=False)
    assert say(grammars, Constraint("json_schema", '{"type":"object"}'), brace)[1] is True


def test_json_has_at_most_one_space_between_its_parts(
    grammars: Grammars, tokenizer: TextTokenizer
) -> None:
    constraint = Constraint("json_schema", '{"type":"array","items":{"type":"integer"}}')
    for text, fits in (
        ("[1, 2]", True),
        ("[1,2]", True),
        ("[ 1 ,2 ]", True),
        ("[1,  2]", False),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert say(grammars, constraint, ids)[1] is fits, text


def test_sequences_have_states_of_their_own(
    grammars: Grammars, tokenizer: TextTokenizer
) -> None:
    letter, digit = (tokenizer.encode(t, add_special_tokens=False)[0] for t in ("a", "1"))
    for sequence in (1, 2):
        compile_now(grammars, sequence, Constraint("regex", "[a-z][0-9]"))
    advance(grammars, 1, letter)
    first, second = allowed(grammars, 1), allowed(grammars, 2)
    assert (bool(first[letter]), bool(first[digit])) == (False, True)
    assert (bool(second[letter]), bool(second[digit])) == (True, False)
    grammars.forget(1)
    grammars.forget(1)
    assert len(grammars) == 1
    grammars.forget(2)


BAD = {
    "not JSON": (Constraint("json_schema", "{"), "EOF"),
    "not a schema": (Constraint("json_schema", "[1]"), "object"),
    "unknown type": (Constraint("json_schema", '{"type":"frob"}'), "frob"),
    "unsupported": (Constraint("json_schema", '{"not":{"type":"string"}}'), "not"),
    "reference": (Constraint("json_schema", '{"$ref":"#/nowhere"}'), "nowhere"),
    "remote reference": (Constraint("json_schema", '{"$ref":"http://x.test/y"}'), "x.test"),
    "group": (Constraint("regex", "(a"), "unclosed group"),
    "look-around": (Constraint("regex", "(?!x)y"), "look-ahead"),
    "back-reference": (Constraint("regex", r"(a)\1"), "backreferences"),
    "deep": (Constraint("json_schema", '{"items":' * 300 + "{}" + "}" * 300), "recursion"),
    "no text": (Constraint("regex", r"[^\x00-\U0010ffff]"), "no text"),
    "too large for the vocabulary": (
        Constraint("regex", "|".join(f".*{chr(97 + i % 26)}.{{{i}}}" for i in range(400))),
        "limits",
    ),
    "empty intersection": (
        Constraint(
            "json_schema",
            json.dumps(
                {
                    "allOf": [
                        {"type": "string", "pattern": f".*[ab].{{20}}c{i}"} for i in range(4)
                    ]
                }
            ),
        ),
        "empty",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_what_cannot_be_served_is_refused_with_the_reason(
    case: str, grammars: Grammars
) -> None:
    constraint, names = BAD[case]
    for _ in range(2):  # tried, then known
        with pytest.raises(InvalidField) as caught:
            compile_now(grammars, 1, constraint)
        assert caught.value.metadata["field"] == f"constraint.{constraint.kind}"
        assert names in caught.value.message
        assert "\n" not in caught.value.message
    grammars.forget(1)
    assert len(grammars) == 0


def test_a_state_too_large_fails_its_sequence(
    grammars: Grammars, tokenizer: TextTokenizer
) -> None:
    compile_now(grammars, 1, Constraint("regex", "((((a?){30}){30}){30}){30}"))
    [a] = tokenizer.encode("aa", add_special_tokens=False)
    with pytest.raises(GrammarFailed) as caught:
        _say_for_ever(grammars, a)
    assert caught.value.failure.limit == "fuel"
    grammars.forget(1)


def _say_for_ever(grammars: Grammars, token: int) -> None:
    for _ in range(2000):
        allowed(grammars, 1)
        advance(grammars, 1, token)


def test_a_folder_without_a_tokenizer_allows_no_constraints(tmp_path: Path) -> None:
    assert not begin(tmp_path).usable()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert not begin(tmp_path).usable()
