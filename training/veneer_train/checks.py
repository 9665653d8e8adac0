"""Checks whether an answer solves its sample's task, which users notice more than loss.

A sample may have a ``check`` beside its messages, one of:

- ``{"exact": true}``: the answer equals the sample's own, apart from surrounding whitespace;
- ``{"regex": PATTERN}``: the whole answer matches;
- ``{"sql": {"setup": STATEMENTS}}``: run in SQLite after the set-up, it returns the same rows
  as the sample's own statement (in the same order, if that statement has ORDER BY);
- ``{"python": {"signature": TEXT, "tests": STATEMENTS}}``: its code passes the tests. Each is
  an assertion about a value that can be written down (None, a truth value, a number, a string,
  or a list, tuple, set or dict of these): ``assert add(2, 3) == 5``,
  ``assert is_even(2)``, ``assert not is_even(3)``. `code_of` extracts the code to run from the
  answer; with ``signature`` it must define that function.
- the same *without tests* is a check of form: the whole answer is Python, runs to its end, and
  defines a function (of that signature, if given).

SQL runs in memory, in a separate process with limits on time and memory (`sql_rows`), and may
not write or attach. Python runs in `sandbox`, which returns values; they are compared here.
A sample's own statement is also run in this process, once, when its check is read.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from veneer_registry.child_python import child_python
from veneer_registry.errors import InvalidField

from veneer_train import sandbox, sandboxed, sql_rows

_KINDS: Final = ("exact", "regex", "sql", "python")
_SQL_TIMEOUT_S: Final = 20.0
"""Wall-clock limit, for a process that hangs; one that computes is ended by its CPU limit,
however busy this machine is."""
SQL_PROGRAM: Final = Path(sql_rows.__file__)


@dataclass(frozen=True, slots=True)
class Score:
    """How many of a set of answers are right.

    Attributes:
        low, high: 95 % interval of the share (Wilson's).
    """

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else float("nan")

    @property
    def low(self) -> float:
        return self._bound(-1)

    @property
    def high(self) -> float:
        return self._bound(+1)

    def _bound(self, sign: int) -> float:
        n, z = self.asked, 1.959964
        if not n:
            return float("nan")
        p = self.right / n
        middle = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return min(1.0, max(0.0, (middle + sign * half) / (1 + z * z / n)))


def validate(check: object, expected: str) -> Mapping[str, Any]:
    """Validate a sample's check by applying it to the sample's own answer.

    Raises:
        InvalidField: the check is malformed, or does not work.
    """
    if not isinstance(check, Mapping) or len(check) != 1 or next(iter(check)) not in _KINDS:
        raise _bad(f"'check' must have one of {', '.join(_KINDS)}; got {check!r:.80}")
    kind, facts = next(iter(check.items()))
    match kind:
        case "exact":
            good = facts is True
        case "regex":
            good = isinstance(facts, str)
        case "sql":
            good = isinstance(facts, Mapping) and isinstance(facts.get("setup"), str)
        case _:
            good = (
                isinstance(facts, Mapping)
                and set(facts) <= {"signature", "tests"}
                and all(isinstance(value, str) for value in facts.values())
            )
    if not good:
        raise _bad(f"'check' of kind {kind} cannot be {facts!r:.80}; see veneer_train.checks")
    try:
        match kind:
            case "regex":
                re.compile(facts)
            case "sql":
                if sql_rows.rows(facts["setup"], expected) is None:
                    raise _bad(f"'check': the line's own statement fails: {expected!r:.120}")
            case "python":
                _assertions(facts.get("tests", ""))
                _plain_signature(facts.get("signature", ""))
    except (re.error, sqlite3.Error, SyntaxError, ValueError) as error:
        raise _bad(f"'check' of kind {kind} cannot be used: {error}") from error
    return check


def _bad(message: str) -> InvalidField:
    return InvalidField(message, metadata={"field": "check"})


def passes(check: Mapping[str, Any], answer: str, expected: str) -> bool:
    """Whether an answer is right; ``expected`` is the sample's own.

    Raises:
        Unimplemented: the answer is code, and this machine has no sandbox for it.
    """
    kind, facts = next(iter(check.items()))
    match kind:
        case "exact":
            return answer.strip() == expected.strip()
        case "regex":
            return re.fullmatch(facts, answer.strip(), re.DOTALL) is not None
        case "sql":
            return _same_rows(facts["setup"], statement_of(answer), expected)
        case _ if facts.get("tests", "").strip():
            return _passes_tests(facts, code_of(answer))
        case _:
            return _runs(facts, answer.strip())


def require_sandbox(checks: Iterable[Mapping[str, Any]]) -> None:
    """Raise Unimplemented if a check needs to run code, and this machine cannot isolate it."""
    if any("python" in check for check in checks):
        sandbox.require()


def score(
    checks: Sequence[Mapping[str, Any]], answers: Sequence[str], expected: Sequence[str]
) -> dict[str, Score]:
    """Scores by kind of check."""
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for check, answer, wanted in zip(checks, answers, expected, strict=True):
        kind = next(iter(check))
        asked[kind] += 1
        right[kind] += passes(check, answer, wanted)
    return {kind: Score(right[kind], asked[kind]) for kind in sorted(asked)}


# ------------------------------------------------------------------------------- SQL

_FENCE: Final = re.compile(r"```(?:\w+)?\n(.*?)(```|\Z)", re.DOTALL)


def statement_of(answer: str) -> str:
    """The first fenced block, since chat models often add one; else the whole answer."""
    fenced = _FENCE.search(answer)
    return (fenced[1] if fenced else answer).strip()


def _same_rows(setup: str, statement: str, expected: str) -> bool:
    asked = {"setup": setup, "statement": statement, "expected": expected}
    try:
        done = subprocess.run(
            child_python("-I", "-S", str(SQL_PROGRAM)),
            input=json.dumps(asked).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            env={},
            timeout=_SQL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode in (0, 1):
        told = done.stderr.decode(errors="replace")
        raise RuntimeError(f"SQL could not be judged: {SQL_PROGRAM} failed: {told}")
    return done.returncode == sql_rows.SAME


# ---------------------------------------------------------------------------- Python


def code_of(answer: str) -> str:
    """The first fenced block, else the whole answer. A block that was cut off by the end of the
    answer loses the lines that are no longer Python."""
    code = statement_of(answer)
    fenced = _FENCE.search(answer)
    lines = code.splitlines()
    while fenced and not fenced[2] and lines and not _parses("\n".join(lines)):
        lines.pop()
    return "\n".join(lines) if lines else code


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _passes_tests(facts: Mapping[str, Any], code: str) -> bool:
    asked = _assertions(facts["tests"])
    if not _defines(code, facts.get("signature", "")):
        return False
    ran = sandbox.run_python(code, [expression for expression, _ in asked])
    return ran.ended and all(
        value is not None and _is(value, expected)
        for value, (_, expected) in zip(ran.values, asked, strict=True)
    )


def _runs(facts: Mapping[str, Any], answer: str) -> bool:
    return _defines(answer, facts.get("signature", "")) and sandbox.run_python(answer).ended


def _defines(code: str, signature: str) -> bool:
    """Whether the code is Python that defines a function, with this signature if given."""
    wanted = _plain_signature(signature)
    try:
        tree = ast.parse(code)
        found = [
            f"{node.name}({ast.unparse(node.args)})"
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
        ]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return wanted in found if wanted else bool(found)


def _assertions(tests: str) -> list[tuple[str, object]]:
    """The expressions of the tests, each with the value that it should have.

    Raises:
        SyntaxError: not Python.
        ValueError: a statement is not an assertion about a value that can be written down.
    """
    return [_assertion(statement) for statement in ast.parse(tests).body]


def _assertion(statement: ast.stmt) -> tuple[str, object]:
    if not isinstance(statement, ast.Assert):
        raise ValueError(f"{ast.unparse(statement)!r:.80} is not an assertion")
    match statement.test:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            try:
                expected = ast.literal_eval(right)
                sandboxed.literal(expected)  # else no answer could be right
            except (ValueError, TypeError):
                raise ValueError(
                    f"{ast.unparse(statement)!r:.80}: to the right of == must be None, True, "
                    "False, an int, a finite float, a str, or a list, tuple, set or dict of "
                    "these, such as 5, 'x' or [1, 2]"
                ) from None
            return ast.unparse(left), expected
        case ast.UnaryOp(op=ast.Not(), operand=left):
            return f"bool({ast.unparse(left)})", False
        case ast.Compare():
            raise ValueError(f"{ast.unparse(statement)!r:.80}: compare by == with a literal")
        case test:
            return f"bool({ast.unparse(test)})", True


def _is(value: str, expected: object) -> bool:
    """Whether the literal that the sandbox returned equals the expected value."""
    try:
        return bool(_six_digits(ast.literal_eval(value)) == _six_digits(expected))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return False


def _six_digits(value: Any) -> Any:
    """The value with its floats rounded as in SQL results."""
    match value:
        case list() | tuple():
            return type(value)(map(_six_digits, value))
        case dict():
            return {key: _six_digits(item) for key, item in value.items()}
        case _:
            return sql_rows.rounded(value)


def _plain_signature(text: str) -> str:
    """``add(a,b)`` as `ast` writes it: ``add(a, b)``. Raises SyntaxError if malformed."""
    if not text:
        return ""
    (function,) = ast.parse(f"def {text}: pass").body
    assert isinstance(function, ast.FunctionDef), "was parsed as one"
    return f"{function.name}({ast.unparse(function.args)})"
