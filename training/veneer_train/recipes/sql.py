"""The ``sql`` recipe: a schema and a question become one SQLite statement.

Schemas come from domains (`sql_domains.yaml`: tables, columns, and what people call them).
Question and statement are made from the same random choices, so that the statement is right by
construction. Whole domains are held out, so that validation measures reading an unseen schema.
Each sample has rows to run its statement on: an answer is right if it returns what the
sample's own statement returns (`veneer_train.checks`).
"""

# The SQL is built from names in this package only, and is run on a database in memory.

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final

from veneer_train.recipes.sql_schema import (
    Domain,
    SqlColumn,
    SqlTable,
    insert_rows,
    read_domains,
    singular,
)

_TRAIN: Final = 2400
_VAL: Final = 160

_Maker = Callable[["_Draw"], tuple[str, str]]


class _Draw:
    """Random choices for one sample."""

    def __init__(self, domain: Domain, rng: random.Random) -> None:
        self.rng = rng
        self.domain = domain
        self.table = rng.choice((domain.parent, domain.child))

    def column(self, *kinds: str, of: SqlTable | None = None) -> SqlColumn:
        table = of or self.table
        return self.rng.choice([c for c in table.columns if c.kind in kinds])

    def two(self, *kinds: str) -> tuple[SqlColumn, SqlColumn]:
        found = [c for c in self.table.columns if c.kind in kinds]
        first, second = self.rng.sample(found, 2)
        return first, second

    def say(self, *forms: str) -> str:
        return self.rng.choice(forms)

    def number(self, column: SqlColumn) -> int:
        return self.rng.randint(
            column.low + (column.high - column.low) // 4,
            column.high - (column.high - column.low) // 4,
        )

    def condition(self, table: SqlTable | None = None) -> tuple[str, str]:
        """A condition in words and in SQL."""
        column = self.column("text", "integer", "real", "date", of=table)
        match column.kind:
            case "text" if column.values:
                value = self.rng.choice(column.values)
                return f"whose {column.words} is {value}", f"{column.name} = '{value}'"
            case "date":
                year = self.rng.randint(2016, 2023)
                after = self.rng.random() < 0.5
                operator, day = (">=", f"{year}-01-01") if after else ("<", f"{year}-01-01")
                words = (
                    f"with a {column.words} in {year} or later"
                    if after
                    else f"with a {column.words} before {year}"
                )
                return words, f"{column.name} {operator} '{day}'"
            case "integer" | "real":
                bound = self.number(column)
                words, operator = self.rng.choice(
                    (
                        ("more than", ">"),
                        ("over", ">"),
                        ("less than", "<"),
                        ("under", "<"),
                        ("at least", ">="),
                        ("at most", "<="),
                    )
                )
                return (
                    f"with a {column.words} of {words} {bound}",
                    f"{column.name} {operator} {bound}",
                )
        # A text column without fixed values: filter by its first letter.
        letter = self.rng.choice("ABCDEFGHKLMPRST")
        return (
            f"whose {column.words} starts with {letter}",
            f"{column.name} LIKE '{letter}%'",
        )


def _listing(draw: _Draw) -> tuple[str, str]:
    column, table = draw.column("text", "integer", "real", "date"), draw.table
    words, where = draw.condition()
    ask = draw.say(
        f"Show the {column.words} of {table.words} {words}.",
        f"What is the {column.words} of all {table.words} {words}?",
        f"List the {column.words} of the {table.words} {words}.",
    )
    return ask, f"SELECT {column.name} FROM {table.name} WHERE {where};"  # nosec B608


def _two_columns(draw: _Draw) -> tuple[str, str]:
    first, second = draw.two("text", "integer", "real", "date")
    table = draw.table
    ask = draw.say(
        f"List the {first.words} and {second.words} of all {table.words}.",
        f"Show {first.words} and {second.words} for every one of the {table.words}.",
    )
    return ask, f"SELECT {first.name}, {second.name} FROM {table.name};"  # nosec B608


def _count(draw: _Draw) -> tuple[str, str]:
    table = draw.table
    words, where = draw.condition()
    ask = draw.say(
        f"How many {table.words} are there {words}?",
        f"Count the {table.words} {words}.",
        f"What is the number of {table.words} {words}?",
    )
    return ask, f"SELECT COUNT(*) FROM {table.name} WHERE {where};"  # nosec B608


def _two_conditions(draw: _Draw) -> tuple[str, str]:
    table = draw.table
    one, first = draw.condition()
    two, second = draw.condition()
    while second.split(" ")[0] == first.split(" ")[0]:
        two, second = draw.condition()
    joined, operator = draw.rng.choice((("and", "AND"), ("or", "OR")))
    ask = draw.say(
        f"How many {table.words} are there {one} {joined} {two}?",
        f"Count the {table.words} {one} {joined} {two}.",
    )
    return ask, f"SELECT COUNT(*) FROM {table.name} WHERE {first} {operator} {second};"  # nosec B608


_AGGREGATES: Final = (
    ("average", "AVG"),
    ("mean", "AVG"),
    ("highest", "MAX"),
    ("largest", "MAX"),
    ("lowest", "MIN"),
    ("smallest", "MIN"),
    ("total", "SUM"),
)


def _aggregate(draw: _Draw) -> tuple[str, str]:
    column, table = draw.column("integer", "real"), draw.table
    words, function = draw.rng.choice(_AGGREGATES)
    statement = f"SELECT {function}({column.name}) FROM {table.name}"  # nosec B608
    if draw.rng.random() < 0.4:
        told, where = draw.condition()
        return (
            f"What is the {words} {column.words} of the {table.words} {told}?",
            f"{statement} WHERE {where};",
        )
    ask = draw.say(
        f"What is the {words} {column.words} of the {table.words}?",
        f"Find the {words} {column.words} among all {table.words}.",
        f"Give me the {words} {column.words} of all {table.words}.",
    )
    return ask, statement + ";"


def _top(draw: _Draw) -> tuple[str, str]:
    table = draw.table
    shown, by = draw.column("text"), draw.column("integer", "real", "date")
    count = draw.rng.choice((1, 2, 3, 5))
    most = draw.rng.random() < 0.6
    if by.kind == "date":
        words = ("latest" if most else "earliest") + f" {by.words}"
    else:
        words = ("highest" if most else "lowest") + f" {by.words}"
    order = "DESC" if most else "ASC"
    if count == 1:
        ask = draw.say(
            f"What is the {shown.words} of the {singular(table)} with the {words}?",
            f"Which {shown.words} has the {singular(table)} with the {words}?",
        )
    else:
        ask = draw.say(
            f"Show the {shown.words} of the {count} {table.words} with the {words}.",
            f"List the {shown.words} of the top {count} {table.words} by {words}.",
        )
    return (
        ask,
        f"SELECT {shown.name} FROM {table.name} ORDER BY {by.name} {order} LIMIT {count};",  # nosec B608
    )


def _group(draw: _Draw) -> tuple[str, str]:
    table = draw.table
    by = draw.column("text")
    if draw.rng.random() < 0.5:
        ask = draw.say(
            f"How many {table.words} are there for each {by.words}?",
            f"Count the {table.words} per {by.words}.",
        )
        return ask, f"SELECT {by.name}, COUNT(*) FROM {table.name} GROUP BY {by.name};"  # nosec B608
    column = draw.column("integer", "real")
    words, function = draw.rng.choice(_AGGREGATES)
    ask = draw.say(
        f"What is the {words} {column.words} of the {table.words} for each {by.words}?",
        f"Show the {words} {column.words} of {table.words} per {by.words}.",
    )
    statement = f"SELECT {by.name}, {function}({column.name}) FROM {table.name}"  # nosec B608
    return ask, f"{statement} GROUP BY {by.name};"


def _distinct(draw: _Draw) -> tuple[str, str]:
    column, table = draw.column("text"), draw.table
    ask = draw.say(
        f"Which different values of {column.words} do the {table.words} have?",
        f"List each {column.words} of the {table.words} once.",
        f"How many different values of {column.words} do the {table.words} have?",
    )
    if ask.startswith("How many"):
        return ask, f"SELECT COUNT(DISTINCT {column.name}) FROM {table.name};"  # nosec B608
    return ask, f"SELECT DISTINCT {column.name} FROM {table.name};"  # nosec B608


def _join(draw: _Draw) -> tuple[str, str]:
    parent, child = draw.domain.parent, draw.domain.child
    shown = draw.column("text", of=child)
    about = draw.column("text", of=parent)
    on = f"{child.name}.{child.parent}_id = {parent.name}.id"
    joined = f"FROM {child.name} JOIN {parent.name} ON {on}"
    if draw.rng.random() < 0.5 and about.values:
        value = draw.rng.choice(about.values)
        ask = draw.say(
            f"Show the {shown.words} of {child.words} {draw.domain.link} {parent.words} whose "
            f"{about.words} is {value}.",
            f"List the {shown.words} of all {child.words} {draw.domain.link} {parent.words} "
            f"whose {about.words} is {value}.",
        )
        where = f"WHERE {parent.name}.{about.name} = '{value}'"
        return ask, f"SELECT {child.name}.{shown.name} {joined} {where};"
    ask = draw.say(
        f"Show the {shown.words} of each of the {child.words} with the {about.words} of its "
        f"{singular(parent)}.",
        f"List the {shown.words} of each of the {child.words} together with the "
        f"{about.words} of its {singular(parent)}.",
    )
    return ask, f"SELECT {child.name}.{shown.name}, {parent.name}.{about.name} {joined};"


_MAKERS: Final[tuple[tuple[_Maker, int], ...]] = (
    (_listing, 3),
    (_two_columns, 1),
    (_count, 3),
    (_two_conditions, 2),
    (_aggregate, 3),
    (_top, 3),
    (_group, 3),
    (_distinct, 1),
    (_join, 3),
)


def _sample(domain: Domain, rng: random.Random) -> dict[str, Any]:
    makers, weights = zip(*_MAKERS, strict=True)
    maker: _Maker = rng.choices(makers, weights)[0]
    ask, statement = maker(_Draw(domain, rng))
    schema = f"{domain.parent.create()}\n{domain.child.create()}"
    return {
        "messages": [
            {"role": "user", "content": f"{schema}\n\n{ask}"},
            {"role": "assistant", "content": statement},
        ],
        "check": {"sql": {"setup": "\n".join([schema, *insert_rows(domain, rng)])}},
    }


def _returns_something(sample: dict[str, Any]) -> bool:
    """Whether the statement returns rows: on an empty result, wrong answers would pass."""
    with sqlite3.connect(":memory:") as database:
        database.executescript(sample["check"]["sql"]["setup"])
        rows = database.execute(sample["messages"][1]["content"]).fetchall()
    return bool(rows) and rows not in ([(None,)], [(0,)])


def _samples(domains: Sequence[Domain], count: int, rng: random.Random) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        sample = _sample(rng.choice(domains), rng)
        if _returns_something(sample):
            found.setdefault(sample["messages"][0]["content"], sample)
    return list(found.values())


def build(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation samples, the same for the same ``seed``."""
    rng = random.Random(seed)  # nosec B311
    learned, val = _held_out(rng)
    return _samples(learned, _TRAIN, rng), val


def held_out(seed: int) -> list[dict[str, Any]]:
    """The validation samples alone, which takes a tenth of the time."""
    return _held_out(random.Random(seed))[1]  # nosec B311


def _held_out(rng: random.Random) -> tuple[list[Domain], list[dict[str, Any]]]:
    """The domains to train on, and samples of the others."""
    domains = read_domains()
    rng.shuffle(domains)
    count = max(1, len(domains) // 6)
    return domains[count:], _samples(domains[:count], _VAL, rng)
