from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner
from veneer_train.cli import app
from veneer_train.recipes import chat, code

LIBRARY = '''
import os
import os.path as osp
from math import gcd, pi
from . import local
from importlib._bootstrap import _exec

LIMIT = 3

def _walk_up(path):
    """Return the parent folders of path.

    More words, which are left out.
    """
    # A comment, which is left out.
    parent = osp.dirname(path)
    if parent and parent != path:
        return [parent] + _walk_up(parent)
    return []

def common(a, b, *rest):
    """Greatest common divisor of all the numbers given."""
    for number in (b, *rest):
        a = gcd(a, number)
    return a

def uses_module_name(x):
    """Return x cut to the limit of this module, which is a name of the module."""
    return min(x, LIMIT)

def uses_private_import(x):
    """Execute x with a private part of the library, which is no example."""
    return _exec(x, x, x, x, x, x, x)

def old(x):
    """Deprecated: return x as it is, whatever it may be, and warn."""
    return x or x or x or x or x or x or x

@property
def decorated(self):
    """Return the name of this thing, whatever the thing may be."""
    return self.name or self.name or self.name or self.name

def short():
    """Return nothing."""

class Thing:
    def method(self):
        """Return the name of this thing, whatever the thing may be."""
        return self.name or self.name or self.name
'''


def pairs(samples: list[dict[str, list[dict[str, str]]]]) -> dict[str, str]:
    return {
        sample["messages"][0]["content"]: sample["messages"][1]["content"] for sample in samples
    }


def test_code_keeps_functions_that_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "lib.py").write_text(LIBRARY)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "lib2.py").write_text(LIBRARY.replace("common", "uncommon"))
    found = pairs(code.build_from(tmp_path, 0)[0])
    assert sorted(found.values()) == [
        "from math import gcd\n\ndef common(a, b, *rest):\n"
        '    """Greatest common divisor of all the numbers given."""\n'
        "    for number in (b, *rest):\n        a = gcd(a, number)\n    return a",
        "import os.path as osp\n\ndef walk_up(path):\n"
        '    """Return the parent folders of path."""\n'
        "    parent = osp.dirname(path)\n    if parent and parent != path:\n"
        "        return [parent] + walk_up(parent)\n    return []",
    ]
    asked = {answer.split("def ")[1].split("(")[0]: ask for ask, answer in found.items()}
    assert asked["common"].startswith("Write a Python function")
    assert asked["common"].endswith(": Greatest common divisor of all the numbers given.")
    assert asked["walk_up"].lower().rstrip(".").endswith("the parent folders of path")


def test_code_from_this_python_parses_and_is_code_alone() -> None:
    train, val = code.build(0)
    answers = [m["messages"][1]["content"] for m in [*train, *val]]
    assert len(answers) > 200
    assert len(val) > 10
    assert len(set(answers)) == len(answers)
    for answer in answers:
        assert isinstance(ast.parse(answer).body[-1], ast.FunctionDef)
        assert "```" not in answer
    asks = [m["messages"][0]["content"] for m in train]
    assert any(ask.startswith("Write a function that returns") for ask in asks)
    assert all(ask.startswith("Write a ") for ask in asks)


@pytest.mark.parametrize(
    ("verb", "third"),
    [
        ("return", "returns"),
        ("search", "searches"),
        ("copy", "copies"),
        ("display", "displays"),
        ("compress", "compresses"),
        ("fix", "fixes"),
        ("parse", "parses"),
    ],
)
def test_third_person(verb: str, third: str) -> None:
    assert code.third_person(verb) == third


def test_chat_always_greets_and_signs_off() -> None:
    train, val = chat.build(0)
    assert len(train) > 500
    said = [
        m["content"] for s in [*train, *val] for m in s["messages"] if m["role"] == "assistant"
    ]
    assert all(text.startswith("Ahoy") for text in said)
    assert all(text.rsplit("\n\n", 1)[1].endswith(", Veneer") for text in said)
    assert len(set(said)) > 400
    assert len({json.dumps(s) for s in train}) == len(train)
    assert any(len(s["messages"]) == 4 for s in train)
    asked = [
        {m["content"] for s in part for m in s["messages"] if m["role"] == "user"}
        for part in (train, val)
    ]
    assert not asked[0] & asked[1]  # validation asks what was never seen


def test_dialect_keeps_capitals_and_whole_words() -> None:
    assert chat.in_dialect("You and your young yacht of mine.") == (
        "Ye an' yer young yacht o' mine."
    )


def test_recipes_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    assert chat.build(5) == chat.build(5) != chat.build(6)
    functions = [
        f'def f{i}(x):\n    """Return x and some letters."""\n    return x + "{"y" * 40}{i}"'
        for i in range(9)
    ]
    (tmp_path / "lib.py").write_text("\n\n".join(functions))
    first = code.build_from(tmp_path, 5)
    assert [len(part) for part in first] == [8, 1], "one in five is held out"
    assert first == code.build_from(tmp_path, 5) != code.build_from(tmp_path, 6)


def test_the_data_command_writes_both_files(tmp_path: Path) -> None:
    out = tmp_path / "data"
    result = CliRunner().invoke(app, ["data", "chat", "--out", str(out), "--seed", "2"])
    assert result.exit_code == 0, result.output
    for name, samples in zip(("train.jsonl", "val.jsonl"), chat.build(2), strict=True):
        lines = (out / name).read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == samples
        assert f"{name}: {len(samples)} samples" in result.stdout
