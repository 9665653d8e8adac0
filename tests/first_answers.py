"""What a new user asks first, and what a good answer contains.

Written before any default was chosen (2026-11-27). The bundled base has 135 million
parameters, so a child could answer the questions. ``python -m tests.bench.first_answers``
gives the pass rate of many runs without a seed.
"""

from __future__ import annotations

import ast
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["QUESTIONS", "Question"]

Check = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Question:
    """A question; ``good`` judges the whole answer."""

    prompt: str
    good: Check
    adapter: str = ""


def says(pattern: str) -> Check:
    """The pattern matches somewhere, ignoring case, and the answer is a few paragraphs at
    most."""
    found = re.compile(pattern, re.IGNORECASE)
    return lambda text: found.search(text) is not None and len(text) < 1500


def python(pattern: str) -> Check:
    """Only Python, with a function, and the pattern matches in it."""

    def check(text: str) -> bool:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return False
        functions = any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree))
        return functions and re.search(pattern, text, re.IGNORECASE) is not None

    return check


SCHEMA = (
    "CREATE TABLE shops (id INTEGER PRIMARY KEY, name TEXT, city TEXT);\n"
    "CREATE TABLE sales (id INTEGER PRIMARY KEY, item TEXT, amount REAL, shop_id INTEGER);"
)
ROWS = """
INSERT INTO shops VALUES (1, 'North', 'Oslo'), (2, 'South', 'Rome'), (3, 'East', 'Rome');
INSERT INTO sales VALUES (1, 'lamp', 10.5, 1), (2, 'desk', 99, 2), (3, 'lamp', 12, 2);
"""


def returns(*rows: tuple[object, ...]) -> Check:
    """One SQLite statement that returns these rows, in any order."""

    def check(text: str) -> bool:
        with sqlite3.connect(":memory:") as database:
            database.executescript(SCHEMA + ROWS)
            try:
                return sorted(database.execute(text).fetchall(), key=repr) == sorted(
                    rows, key=repr
                )
            except (sqlite3.Error, sqlite3.Warning):
                return False

    return check


def sql(question: str, check: Check) -> Question:
    return Question(f"{SCHEMA}\n\n{question}", check, "sql")


QUESTIONS = (
    Question("What is the capital of France?", says(r"\bParis\b")),
    Question("What is the capital of Japan?", says(r"\bTokyo\b")),
    Question("What color is the sky on a clear day?", says(r"\bblue\b")),
    Question("How many days are in a week?", says(r"\b(7|seven)\b")),
    Question("What do bees make?", says(r"\bhoney\b")),
    Question("What is the largest planet in our solar system?", says(r"\bJupiter\b")),
    Question("Name three fruits.", says(r"\b(apple|banana|orange|grape|strawberr|mango)")),
    Question("What is the opposite of hot?", says(r"\b(cold|cool)\b")),
    Question("How do I cheer up a friend?", says(r"\bahoy\b"), "chat"),
    Question("What is a Python dictionary?", says(r"\bahoy\b"), "chat"),
    Question("How do I learn to cook?", says(r"\bahoy\b"), "chat"),
    Question("What should I read on a rainy day?", says(r"\bahoy\b"), "chat"),
    Question("Write a function that reverses a string.", python(r"\breturn\b"), "code"),
    Question("Write a function that adds two numbers.", python(r"\breturn\b"), "code"),
    Question("Return the larger of two numbers.", python(r"\breturn\b"), "code"),
    Question("Split a string into words.", python(r"split"), "code"),
    sql("How many sales are there?", returns((3,))),
    sql("What is the largest amount of the sales?", returns((99.0,))),
    sql("Show the name of each shop in Rome.", returns(("South",), ("East",))),
    sql("What is the total amount of sales per item?", returns(("lamp", 22.5), ("desk", 99.0))),
)
