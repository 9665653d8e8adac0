"""Figures of git's source files: lines, names of classes, files that name an option."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCES: Final = (".py", ".h", ".cpp", ".proto", ".html", ".css", ".js", ".svg", ".jinja")
GENERATED: Final = re.compile(
    r"(?i)\A.{0,60}\bgenerated\b (from|by)|DO NOT EDIT|_pb2(_grpc)?\.pyi?$"
)
"""Matches generated files by their first two lines or path."""
RECORDED: Final = ("docs/benchmarks/", "docs/terminal.svg")
"""Pages and pictures that a program writes."""
OPTION: Final = re.compile(r"\bmin_p\b")
"""A sampling option; a similar new one would touch the files that name it."""


@dataclass(frozen=True)
class Figures:
    """Figures of handwritten source files outside tests; paths are relative to the repository.

    Attributes:
        lines: file -> number of lines.
        classes: class name -> the files that define it, once for each definition.
        option: the files that name `OPTION`.
    """

    lines: Mapping[str, int]
    classes: Mapping[str, list[str]]
    option: list[str]

    @property
    def python(self) -> dict[str, int]:
        """Number of lines of each Python file."""
        return {path: count for path, count in self.lines.items() if path.endswith(".py")}

    @property
    def folders(self) -> Counter[str]:
        """Number of files in each folder, not counting subfolders."""
        return Counter(path.rpartition("/")[0] for path in self.lines)

    def twice(self, under: str = "") -> dict[str, list[str]]:
        """Return names of two or more classes, in files whose path begins with ``under``."""
        found = {
            name: [path for path in paths if path.startswith(under)]
            for name, paths in sorted(self.classes.items())
        }
        return {name: paths for name, paths in found.items() if len(paths) > 1}


def figures(repository: Path) -> Figures:
    """Read all files of the checkout."""
    lines: dict[str, int] = {}
    classes: dict[str, list[str]] = {}
    option = []
    for path, text in _sources(repository):
        lines[path] = text.count("\n")
        if OPTION.search(text):
            option.append(path)
        if path.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef):
                    classes.setdefault(node.name, []).append(path)
    return Figures(lines, classes, option)


def _sources(repository: Path) -> Iterator[tuple[str, str]]:
    """Yield the path and text of each handwritten source file outside tests."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True
    )
    for path in sorted(filter(None, listed.stdout.split("\0"))):
        if not path.endswith(SOURCES) or path.startswith(("tests/", *RECORDED)):
            continue
        file = repository / path
        if not file.is_file() or GENERATED.search(path):
            continue
        text = file.read_text("utf-8")
        if not GENERATED.search("\n".join(text.splitlines()[:2])):
            yield path, text
