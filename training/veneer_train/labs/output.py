"""Output of a lab: a Markdown page, a CSV, a plot, and facts for reproducing it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer_registry.errors import InvalidField

from veneer_train.manifest import hardware, versions
from veneer_train.plain_json import plain_json

Row = Mapping[str, Any]
"""A row of the table: column -> value; all rows have the same columns."""


@dataclass(frozen=True, slots=True)
class Lab:
    """A finished lab.

    Attributes:
        name: the lab's name in the command.
        title, question: what it examines.
        rows: the table.
        plot: a matplotlib figure.
        says: conclusions from the figures, one sentence each.
        limits: what this setup cannot show.
        command: the command that made it.
        setting: plain facts (base, steps, sizes).
    """

    name: str
    title: str
    question: str
    rows: Sequence[Row]
    plot: Any
    says: Sequence[str]
    limits: Sequence[str]
    command: str
    seed: int
    setting: Mapping[str, Any] = field(default_factory=dict)


def empty_folder(out: Path) -> Path:
    """Create the folder that a lab writes to.

    Raises:
        InvalidField: it is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise InvalidField(
            f"{out} is not empty: remove it, or choose another folder",
            metadata={"field": "out"},
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def write(lab: Lab, out: Path) -> Path:
    """Write ``README.md``, ``results.csv``, ``plot.png`` and ``facts.json``; returns README."""
    columns = list(lab.rows[0])
    with (out / "results.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(lab.rows)
    lab.plot.savefig(out / "plot.png", dpi=110)
    facts = {
        "lab": lab.name,
        "command": lab.command,
        "seed": lab.seed,
        "setting": dict(lab.setting),
        "versions": versions(),
        "hardware": hardware(),
    }
    (out / "facts.json").write_text(plain_json(facts), "utf-8")
    head = f"| {' | '.join(map(_told, columns))} |"
    rule = f"| {' | '.join('---' for _ in columns)} |"
    body = [f"| {' | '.join(_told(row[c]) for c in columns)} |" for row in lab.rows]
    made = ", ".join(f"{k} {v}" for k, v in {**lab.setting, "seed": lab.seed}.items())
    used = ", ".join(f"{k} {v}" for k, v in versions().items())
    lines = [
        f"# {lab.title}",
        "",
        lab.question,
        "",
        f"```\n{lab.command}\n```",
        "",
        head,
        rule,
        *body,
        "",
        "![plot](plot.png)",
        "",
        *(f"- {sentence}" for sentence in lab.says),
        "",
        "Limitations:",
        "",
        *(f"- {sentence}" for sentence in lab.limits),
        "",
        f"Setting: {made}.",
        f"Versions: {used}.",
        "",
    ]
    page = out / "README.md"
    page.write_text("\n".join(lines), "utf-8")
    return page


def _told(value: Any) -> str:
    """A value as a cell of a Markdown table."""
    return f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", r"\|")
