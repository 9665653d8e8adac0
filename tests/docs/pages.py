"""The commands of a Markdown page, and what the page says of each.

A fenced block of `sh` or `python` is run. A block of `text` right after it is its output.
A comment just before a block says how to treat it:

- ``<!-- not run: REASON -->``: it is never run,
- ``<!-- slow: REASON -->``: only `make docs-check` runs it,
- ``<!-- varies: TEXT -->``: this part of the output differs from run to run.

Any other block is an error, which `read_page` reports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPOSITORY: Final = Path(__file__).resolve().parents[2]
RUN: Final = ("sh", "python")
_MARK: Final = re.compile(r"<!--\s*(not run|slow|varies):\s*(.*?)\s*-->", re.DOTALL)

When = Literal["always", "slow", "never"]
_WHEN: Final[dict[str, When]] = {"not run": "never", "slow": "slow"}


@dataclass
class Block:
    """A fenced block that may be run.

    Attributes:
        line: Line of the first command in the page, from 1.
        when: In which runs it is run.
        reason: Why not in all runs.
        output: The expected output; None if the page gives none.
        varies: Parts of ``output`` that differ from run to run.
    """

    line: int
    language: str
    text: str
    when: When = "always"
    reason: str = ""
    output: str | None = None
    varies: tuple[str, ...] = ()


@dataclass
class Page:
    blocks: list[Block] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)


def pages() -> list[Path]:
    """Every page whose commands are run: those written by people, not by programs (labs, model
    cards)."""
    examples = REPOSITORY / "examples"
    return [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *sorted((REPOSITORY / "docs").glob("*.md")),
        *sorted((REPOSITORY / "docs" / "benchmarks").glob("*.md")),
        examples / "README.md",
        examples / "train_and_swap" / "README.md",
    ]


def read_page(text: str) -> Page:
    """Blocks in order, and the page's errors as sentences."""
    page = Page()
    marks: list[tuple[str, str]] = []
    last: Block | None = None  # whose output a `text` block here would be
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "html_block":
            marks += _MARK.findall(token.content)
        elif token.type == "code_block":
            page.mistakes.append(f"line {_line(token)}: an indented block: fence it")
            marks, last = [], None
        elif token.type == "fence":
            last = _fence(page, token, marks, last)
            marks = []
        elif token.level == 0 or token.type == "inline":
            marks, last = [], None
    return page


def _line(token: Token) -> int:
    return (token.map or [0])[0] + 1


def _fence(
    page: Page, token: Token, marks: list[tuple[str, str]], last: Block | None
) -> Block | None:
    """Add a fenced block; returns the block whose output may follow."""
    line, language = _line(token) + 1, token.info.strip()
    varies = tuple(text for kind, text in marks if kind == "varies")
    reasons = [(kind, text) for kind, text in marks if kind != "varies"]
    for missing in (text for text in varies if text not in token.content):
        page.mistakes.append(f"line {line}: varies, but is not there: {missing}")
    if language == "text" and last is not None and not reasons:
        last.output, last.varies = token.content, varies
        return None
    if language not in RUN and not any(kind == "not run" for kind, _ in reasons):
        page.mistakes.append(
            f"line {line}: a block of {language or 'no language'} is neither run nor output: "
            "name a language that is run (sh, python) or say <!-- not run: why -->"
        )
        return None
    block = Block(line, language, token.content)
    for kind, text in reasons:
        block.when, block.reason = _WHEN[kind], text
    if reasons and not block.reason:
        page.mistakes.append(f"line {line}: no reason why it is not run")
    page.blocks.append(block)
    return block
