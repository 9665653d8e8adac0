"""Figures of the code's structure: ``python -m tests.structure``, part of ``make check``.

Of the files that git tracks. Printed, for a reader to judge:

- the longest source files (`SOURCES`) outside tests and generated code, and the folders of the
  server with the most files
- the modules of the server that name an adapter or its digest (`ADAPTER_NAMES`, as a variable,
  parameter, attribute or keyword)

With a limit, the best value reached so far; the exit status is 1 above it:

- Sampling option: source files outside tests and generated code that name `min_p`, which are
  those that a similar new option would touch: the contract, the record, gRPC and HTTP, all
  backends and the clients. At most `SAMPLING_FILES`.
- Words: ``pytest.raises(..., match=...)`` in tests. Our errors are identified by class,
  `reason` and metadata (`tests.refused`), so that their words can be improved. Only others'
  messages, plain errors, and sentences under test are matched. At most `MATCHES`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

__all__: list[str] = []

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SERVER: Final = "server/veneer_server/"

SOURCES: Final = (".py", ".h", ".cpp", ".proto", ".html", ".css", ".js", ".svg", ".jinja")
GENERATED: Final = re.compile(
    r"(?i)\A.{0,60}\bgenerated\b (from|by)|DO NOT EDIT|_pb2(_grpc)?\.pyi?$"
)
"""Matches generated files by their first line or path."""
RECORDED: Final = ("docs/benchmarks/", "docs/terminal.svg")
"""Pages and pictures written by a program."""

SHOWN: Final = 10
"""How many files and folders are printed."""
SAMPLING_FILES: Final = 8
MATCHES: Final = 49

ADAPTER_NAMES: Final = frozenset(
    {"adapter", "digest", "weights_digest", "AdapterRef", "AdapterSource"}
)


def tracked() -> list[str]:
    """Paths that git tracks."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return sorted(filter(None, listed.stdout.split("\0")))


def sources() -> Iterator[tuple[str, str]]:
    """Path and text of each handwritten source file outside tests."""
    for path in tracked():
        if not path.endswith(SOURCES) or path.startswith(("tests/", *RECORDED)):
            continue
        file = REPOSITORY / path
        if not file.is_file() or GENERATED.search(path):
            continue
        text = file.read_text("utf-8")
        if not GENERATED.search("\n".join(text.splitlines()[:2])):
            yield path, text


def names_of(text: str) -> set[str]:
    """Variables, parameters, attributes and keywords of a module."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                found.add(name)
            case ast.keyword(arg=str(name)):
                found.add(name)
    return found


def matches() -> Mapping[str, int]:
    """How often each test file matches an error's message."""
    found = {}
    for path in tracked():
        file = REPOSITORY / path
        if not path.startswith("tests/") or file.suffix != ".py" or not file.is_file():
            continue
        tree = ast.parse(file.read_text("utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found[path] = sum(
            isinstance(call.func, ast.Attribute)
            and call.func.attr == "raises"
            and any(keyword.arg == "match" for keyword in call.keywords)
            for call in calls
        )
    return {path: count for path, count in found.items() if count}


def most(what: str, found: Mapping[str, int]) -> None:
    """Prints the largest."""
    print(f"most {what}:")
    for path, count in Counter(found).most_common(SHOWN):
        print(f"  {count:4} {path}")


def at_most(what: str, found: list[str], most: int) -> Iterator[str]:
    """Prints the files; yields violations."""
    lower = ": lower it" if len(found) < most else ""
    print(f"{what}: {len(found)} files, limit {most}{lower}")
    for path in found:
        print(f"  {path}")
    if len(found) > most:
        yield f"{what}: {len(found)} files, more than {most}"


def main() -> int:
    """Entry point."""
    texts = dict(sources())
    lines = {path: text.count("\n") for path, text in texts.items()}
    folders = Counter(path.rpartition("/")[0] for path in texts if path.startswith(SERVER))
    option = [path for path, text in texts.items() if re.search(r"\bmin_p\b", text)]
    knowing = [
        path.removeprefix(SERVER)
        for path, text in texts.items()
        if path.startswith(SERVER) and path.endswith(".py") and names_of(text) & ADAPTER_NAMES
    ]
    most("lines of a file", lines)
    most("files of a folder of the server", folders)
    wrong = [*at_most("a sampling option", option, SAMPLING_FILES)]
    matched = matches()
    total = sum(matched.values())
    lower = ": lower it" if total < MATCHES else ""
    print(f"errors matched by their words: {total}, limit {MATCHES}{lower}")
    for path, count in matched.items():
        print(f"  {count:4} {path}")
    if total > MATCHES:
        wrong.append(
            f"errors matched by their words: {total}, more than {MATCHES}: use `tests.refused`"
        )
    print(f"modules of the server that know adapters or have a digest: {len(knowing)}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
