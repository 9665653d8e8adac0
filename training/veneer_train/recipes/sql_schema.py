"""Schemas of the ``sql`` recipe: domains, their tables, and rows for them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import yaml

_ROWS: Final = (8, 14)


@dataclass(frozen=True, slots=True)
class SqlColumn:
    """Attributes:
    kind: text, integer, real or date.
    words: what people call it.
    values: possible values of a text column.
    low, high: range of a number.
    """

    name: str
    kind: str
    words: str
    values: tuple[str, ...] = ()
    low: int = 1
    high: int = 100

    @property
    def sql_type(self) -> str:
        return {"text": "TEXT", "integer": "INTEGER", "real": "REAL", "date": "TEXT"}[self.kind]


@dataclass(frozen=True, slots=True)
class SqlTable:
    name: str
    words: str
    columns: tuple[SqlColumn, ...]
    parent: str = ""

    def create(self) -> str:
        columns = ["id INTEGER PRIMARY KEY"]
        columns += [f"{c.name} {c.sql_type}" for c in self.columns]
        if self.parent:
            columns.append(f"{self.parent}_id INTEGER")
        return f"CREATE TABLE {self.name} ({', '.join(columns)});"


@dataclass(frozen=True, slots=True)
class Domain:
    parent: SqlTable
    child: SqlTable
    link: str


def singular(table: SqlTable) -> str:
    """books -> book: the words of tables are plurals that end in s."""
    return table.words.removesuffix("s")


def read_domains() -> list[Domain]:
    text = (
        resources.files("veneer_train.recipes").joinpath("sql_domains.yaml").read_text("utf-8")
    )
    found = []
    for entry in yaml.safe_load(text):
        parent = _table(entry["parent"], "")
        child = _table(entry["child"], singular(parent).replace(" ", "_"))
        found.append(Domain(parent, child, entry["link"]))
    return found


def _table(entry: dict[str, Any], parent: str) -> SqlTable:
    columns = []
    for name, facts in entry["columns"].items():
        kind, _, rest = str(facts).partition(" ")
        words, _, values = rest.partition(": ")
        numeric = kind in ("integer", "real")
        low, high = (int(v) for v in values.split(" to ")) if numeric else (0, 0)
        texts = tuple(values.split(", ")) if kind == "text" and values else ()
        columns.append(SqlColumn(name, kind, words, texts, low, high))
    return SqlTable(entry["table"], entry["words"], tuple(columns), parent)


def _value(column: SqlColumn, rng: random.Random) -> object:
    match column.kind:
        case "text":
            if column.values:
                return rng.choice(column.values)
            return rng.choice("ABCDEFGHKLMPRST") + "".join(rng.choices("aeionrst", k=5))
        case "integer":
            return rng.randint(column.low, column.high)
        case "real":
            return round(rng.uniform(column.low, column.high), 1)
        case _:
            return f"{rng.randint(2015, 2024)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def insert_rows(domain: Domain, rng: random.Random) -> list[str]:
    """INSERT statements."""
    parents = rng.randint(3, 6)
    statements = []
    for table, count in ((domain.parent, parents), (domain.child, rng.randint(*_ROWS))):
        for number in range(1, count + 1):
            values = [number, *(_value(c, rng) for c in table.columns)]
            if table.parent:
                values.append(rng.randint(1, parents))
            told = ", ".join(f"'{v}'" if isinstance(v, str) else str(v) for v in values)
            statements.append(f"INSERT INTO {table.name} VALUES ({told});")  # nosec B608
    return statements
