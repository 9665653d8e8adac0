"""Constraints with the real base's tokenizer: what may follow, when it is complete."""

from __future__ import annotations

import json
import queue
import random
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from veneer_registry.errors import InvalidField
from veneer_server.engine.grammar import GrammarFailed, Grammars, check_constraint
from veneer_server.engine.messages import Constraint
from veneer_server.text.tokenizer import TextTokenizer

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
def grammars(base_folder: Path) -> Grammars:
    made = Grammars.of_base(base_folder, vocab_size=PADDED, eos_token_ids=[EOS])
    assert made is not None
    return made


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
            if not grammars.allowed(1)[token]:
                return at, False
            if grammars.advance(1, token):
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
            allowed = np.flatnonzero(grammars.allowed(1))
            assert allowed.max() < VOCAB
            token = int(rng.choice(allowed))
            if token != EOS:
                said.append(token)
            if grammars.advance(1, token):
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
    grammars.advance(1, letter)
    first, second = grammars.allowed(1), grammars.allowed(2)
    assert (bool(first[letter]), bool(first[digit])) == (False, True)
    assert (bool(second[letter]), bool(second[digit])) == (True, False)
    grammars.forget(1)
    grammars.forget(1)
    assert len(grammars) == 1
    grammars.forget(2)


def test_compiling_happens_in_a_worker(grammars: Grammars) -> None:
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    grammars.compile(
        7, Constraint("regex", "x"), lambda error: names.put(threading.current_thread().name)
    )
    assert names.get(timeout=60).startswith("grammar")
    grammars.forget(7)


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
    with pytest.raises(InvalidField) as caught:
        check_constraint(constraint)
    assert caught.value.metadata == {"field": f"constraint.{constraint.kind}"}
    assert names in caught.value.message
    assert "\n" not in caught.value.message
    with pytest.raises(InvalidField):
        compile_now(grammars, 1, constraint)
    assert len(grammars) == 0


def test_what_only_the_vocabulary_makes_too_large_is_refused_by_the_engine(
    grammars: Grammars,
) -> None:
    wide = "|".join(f".*{chr(97 + i % 26)}.{{{i}}}" for i in range(400))
    check_constraint(Constraint("regex", wide))
    with pytest.raises(InvalidField, match="limits"):
        compile_now(grammars, 1, Constraint("regex", wide))
    assert len(grammars) == 0


def test_a_language_without_words_and_a_state_too_large_fail_their_sequence(
    grammars: Grammars, tokenizer: TextTokenizer
) -> None:
    compile_now(grammars, 1, Constraint("regex", r"[^\x00-\U0010ffff]"))
    with pytest.raises(GrammarFailed):
        grammars.allowed(1)
    compile_now(grammars, 1, Constraint("regex", "((((a?){30}){30}){30}){30}"))
    [a] = tokenizer.encode("aa", add_special_tokens=False)
    with pytest.raises(GrammarFailed, match="too many"):
        _say_for_ever(grammars, a)
    grammars.forget(1)


def _say_for_ever(grammars: Grammars, token: int) -> None:
    for _ in range(2000):
        grammars.allowed(1)
        grammars.advance(1, token)


def test_a_folder_without_a_tokenizer_allows_no_constraints(tmp_path: Path) -> None:
    assert Grammars.of_base(tmp_path, vocab_size=10, eos_token_ids=[1]) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert Grammars.of_base(tmp_path, vocab_size=10, eos_token_ids=[1]) is None
