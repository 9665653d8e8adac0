"""Tests access private names at most `MOST` times, each with a reason.

An access is ``something._name``, unless ``something`` is ``self``, ``cls`` or ``super()``; the
import of a ``_name``; or an access by string (``monkeypatch.setattr(module, "_name", ...)``,
``patch("module._name")``, ``getattr(x, "_name")``). Its line, or the line before, says why:
``# private: why``. Bugs are planted by editing the source instead (`tests.planted`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import REPOSITORY

MOST = 20
PUBLIC = frozenset({"_replace", "_asdict", "_fields", "_fields_", "_exit"})
"""The standard library's names with an underscore that anyone may use."""
BY_NAME = frozenset({"setattr", "getattr", "delattr", "hasattr", "patch", "object", "multiple"})


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def found_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each access."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(ast.Name("self" | "cls")) | ast.Attribute(
                ast.Call(ast.Name("super"))
            ):
                pass
            case ast.Attribute(attr=name) if is_private(name):
                yield node.end_lineno or node.lineno, name
            case ast.ImportFrom(names=names):
                yield from ((node.lineno, a.name) for a in names if is_private(a.name))
            case ast.Call(ast.Name(called) | ast.Attribute(attr=called)) if called in BY_NAME:
                for argument in node.args:
                    match argument:
                        case ast.Constant(str(text)):
                            yield from (
                                (argument.lineno, name)
                                for name in text.split(".")
                                if is_private(name) and name.isidentifier()
                            )


def accesses() -> Iterator[tuple[Path, int, str, bool]]:
    """File, line, name, and whether its reason is given."""
    for file in sorted((REPOSITORY / "tests").rglob("*.py")):
        source = file.read_text("utf-8")
        lines = ["", *source.splitlines()]
        for line, name in found_in(source):
            reason = any("# private: " in lines[at] for at in (line - 1, line))
            yield file.relative_to(REPOSITORY), line, name, reason


def test_tests_reach_into_what_is_private_a_few_times_only() -> None:
    found = list(accesses())
    for file, line, name, _ in found:
        print(f"{file}:{line}: {name}")
    assert len(found) <= MOST
    without = [f"{file}:{line}: {name}" for file, line, name, reason in found if not reason]
    assert not without, "say why, `# private: why`, or use what a user or an operator sees"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("engine.loop._pace.observe(1)", ["_pace"]),
        ("a._b._c", ["_c", "_b"]),
        ("from module import public, _private", ["_private"]),
        ("monkeypatch.setattr(module, '_LIMIT', 3)", ["_LIMIT"]),
        ("patch.object(Thing, '_run')", ["_run"]),
        ("patch('package.module._run')", ["_run"]),
        ("getattr(thing, '_run')", ["_run"]),
        ("self._mine, cls._mine, super()._mine(), point._replace(x=1), thing.__dict__", []),
        ("self.thing._theirs", ["_theirs"]),
    ],
)
def test_what_counts(source: str, names: list[str]) -> None:
    assert [name for _, name in found_in(source)] == names
