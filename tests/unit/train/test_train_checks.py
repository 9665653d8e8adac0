"""What counts as a right answer, and what a hostile answer cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from veneer_labs.recipes import chat, code, sql
from veneer_registry.errors import InvalidField
from veneer_train.checks import Score, passes, validate
from veneer_train.config import DataConfig
from veneer_train.data import load_file
from veneer_train.sandbox import run_python

from tests.refused import refused

SQL = {
    "sql": {
        "setup": "CREATE TABLE t (a INTEGER, b TEXT);\n"
        "INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'x');"
    }
}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("SELECT a FROM t WHERE b = 'x'", True),
        ("SELECT a FROM t WHERE b = 'x' ORDER BY a DESC;", True),  # the same rows
        ("```sql\nSELECT a FROM t WHERE b = 'x';\n```\nThat is it.", True),
        ("SELECT a, b FROM t WHERE b = 'x';", False),
        ("SELECT a FROM t;", False),
        ("SELEC a", False),
        ("", False),
        ("DELETE FROM t; SELECT 1", False),
        ("ATTACH DATABASE 'veneer-check' AS other", False),
    ],
)
def test_sql_is_judged_by_what_it_returns(answer: str, right: bool) -> None:
    assert passes(SQL, answer, "SELECT a FROM t WHERE b = 'x';") is right


def test_order_counts_where_it_was_asked_for() -> None:
    expected = "SELECT a FROM t ORDER BY a DESC;"
    assert passes(SQL, "SELECT a FROM t ORDER BY a DESC", expected)
    assert not passes(SQL, "SELECT a FROM t ORDER BY a", expected)


def test_sql_that_does_not_end_is_stopped() -> None:
    endless = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
    )
    assert not passes(SQL, endless, "SELECT 1;")


def test_sql_may_not_write() -> None:
    assert not passes(SQL, "UPDATE t SET a = 0 RETURNING a", "SELECT 0 FROM t;")


def test_an_order_within_is_no_order() -> None:
    expected = "SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 2);"
    assert passes(SQL, "SELECT a FROM t WHERE a < 3 ORDER BY a DESC", expected)


def test_whole_numbers_are_whole() -> None:
    setup = {"sql": {"setup": "CREATE TABLE n (x INTEGER);"}}
    assert not passes(setup, "SELECT 1234567", "SELECT 1234568")
    assert passes(setup, "SELECT 0.1 + 0.2", "SELECT 0.3")


def test_a_signature_is_the_same_however_it_is_spaced() -> None:
    check = {"python": {"signature": "add(a: int,b=0)"}}
    assert passes(check, "def add(a: int, b=0):\n    return a + b", "")


PYTHON = {"python": {"signature": "add(a, b)", "tests": "assert add(2, 3) == 5"}}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("def add(a, b):\n    return a + b", True),
        ("import math\n\ndef add(a, b):\n    return math.fsum((a, b))", True),
        ("def add(a, b):\n    return a - b", False),
        ("def plus(a, b):\n    return a + b\nadd = plus", False),  # not as asked
        ("Here it is:\n\ndef add(a, b):\n    return a + b", False),  # not code alone
        ("import sys\n\ndef add(a, b):\n    return 0\n\nsys.exit(0)", False),
        ("import os\n\ndef add(a, b):\n    return 0\n\nos._exit(0)", False),
    ],
)
def test_python_is_judged_by_running_it(answer: str, right: bool) -> None:
    assert passes(PYTHON, answer, "") is right


@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', 1))",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "open('here', 'w')",
        "open('/etc/passwd').read()",
        "import os\nos.remove('x')",
        "x = bytearray(1 << 32)",
        "while True: pass",
    ],
)
def test_the_sandbox_keeps_accidents_in(source: str) -> None:
    assert run_python("x = 1")
    assert not run_python(source)


def test_an_answer_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_SECRET", "1")
    assert run_python("import os\nassert 'VENEER_SECRET' not in os.environ")


def test_an_interval_holds_the_share() -> None:
    """Wilson's for 8 of 10: 0.490 to 0.943."""
    score = Score(8, 10)
    assert (score.low, score.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Score(0, 10).low == pytest.approx(0)
    assert Score(10, 10).high == pytest.approx(1)


@pytest.mark.parametrize(
    "check",
    [
        {"regex": "("},
        {"python": {"tests": 5}},
        {"python": {"signature": "add(a"}},
        {"sql": {"setup": "CREATE TABEL t"}},
        {},
        {"exact": False},
        {"exact": True, "regex": "x"},
        {"sql": {}},
        {"other": 1},
        [],
        "x",
    ],
)
def test_a_check_that_is_none_is_refused(check: object) -> None:
    with refused(InvalidField, field="check"):
        validate(check, "")


def test_a_bad_check_names_its_line(tokenizer: Any, jsonl: Callable[..., Path]) -> None:
    good = {"prompt": "a", "completion": "b"}
    path = jsonl(good, {**good, "check": {"sqll": {}}})
    with refused(InvalidField, file="data.jsonl", line=2, cause="check"):
        load_file(path, DataConfig(train=str(path)), tokenizer, "")


def test_every_recipe_s_own_answers_pass() -> None:
    """And an answer of another sample does not (but for tables that happen to agree)."""
    for recipe in (chat, code, sql):
        _, val = recipe.build(0)
        told = [(s["check"], s["messages"][-1]["content"]) for s in val if "check" in s][:25]
        assert len(told) >= 15, recipe.__name__
        assert all(passes(check, answer, answer) for check, answer in told), recipe.__name__


def test_sql_answers_of_other_samples_fail() -> None:
    train, val = sql.build(0)
    answers = [s["messages"][-1]["content"] for s in val]
    wrong = [
        passes(sample["check"], answers[n - 1], answers[n]) for n, sample in enumerate(val)
    ]
    assert sum(wrong) < 0.1 * len(wrong)
    schemas = [
        {s["messages"][0]["content"].split("\n\n")[0] for s in part} for part in (train, val)
    ]
    assert not schemas[0] & schemas[1]  # what is measured was never seen


def test_the_sql_recipe_is_the_same_for_the_same_seed() -> None:
    assert json.dumps(sql.build(3)) == json.dumps(sql.build(3))
    assert sql.build(3) != sql.build(4)
