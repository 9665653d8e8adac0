"""Limits on the code's structure: ``python -m tests.structure``, part of ``make check``.

Prints five figures with the files behind them, and exits 1 if one is above its limit. Limits
are the best values reached so far; if a figure is below, it says that the limit can be lowered.
Of the files that git tracks:

- Lines: no source file (`SOURCES`) outside tests and generated code is longer than `LONGEST`.
  `LONG` lists the exceptions, each with a reason and its own limit.
- Folders: no folder inside the server has more than `MOST_FILES` files, not counting
  subfolders. `FULL` lists the exceptions in the same way.
- Sampling option: source files outside tests and generated code that name `min_p`, which are
  those that a similar new option would touch: the contract, the record, gRPC and HTTP, all
  backends and the clients. At most `SAMPLING_FILES`.
- Adapter: modules from the gRPC call to the kernel that name an adapter or its digest
  (`ADAPTER_NAMES`, as a variable, parameter, attribute or keyword), for a resident adapter.
  Those are the modules of `PATH_ROOMS` without `BESIDE`: administration, loading, and
  the digests of other things. At most `ADAPTER_FILES`.
- Words: ``pytest.raises(..., match=...)`` in tests. Our errors are identified by class,
  `reason` and metadata (`tests.refused`), so that their words can be improved. Only others'
  messages, plain errors, and sentences under test are matched. At most `MATCHES`.

The adapter figure does not cover all modules that know adapters, whose number is printed at the
end: administration, loading and metrics know them too.
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

LONGEST: Final = 400
MOST_FILES: Final = 12
SAMPLING_FILES: Final = 8
ADAPTER_FILES: Final = 28
MATCHES: Final = 49

LONG: Final[Mapping[str, tuple[int, str]]] = {
    "proto/veneer_proto/v1/adapters.proto": (525, "one service with its messages"),
}
FULL: Final[Mapping[str, tuple[int, str]]] = {}

PATH_ROOMS: Final = (
    *("rpc/", "serving/", "engine_client/", "wire/", "engine/", "step/"),
    *("adapters/", "backends/"),
)
ADAPTER_NAMES: Final = frozenset(
    {"adapter", "digest", "weights_digest", "AdapterRef", "AdapterSource"}
)
BESIDE: Final[Mapping[str, str]] = {
    "rpc/adapter_service.py": "administration",
    "rpc/adapter_view.py": "administration",
    "rpc/followers/loading_by_registry.py": "administration",
    "rpc/followers/passing_on.py": "administration",
    "rpc/watch.py": "administration",
    "serving/adapters/budgets.py": "administration",
    "serving/adapters/changes.py": "administration",
    "serving/adapters/events.py": "administration",
    "serving/adapters/replacing.py": "administration",
    "serving/adapters/self_test.py": "administration",
    "serving/adapters/subjects.py": "administration",
    "serving/adapters/upload_places.py": "administration",
    "serving/adapters/uploads.py": "administration",
    "serving/housekeeping.py": "administration",
    "serving/transfer/downloads.py": "administration",
    "serving/transfer/watched.py": "administration",
    "serving/tenants/elsewhere.py": "administration",
    "serving/tenants/tenants.py": "the engine's events",
    "engine_client/tenant_engine.py": "administration",
    "engine_client/no_engine.py": "a server without an engine",
    "rpc/followers/replication_service.py": "loading, on another machine",
    "serving/tenants/registry.py": "the interface of two registries",
    "serving/samples.py": "the digest of a seed",
    "engine/transfers.py": "loading",
    "adapters/loader_process.py": "loading",
    "adapters/loaders.py": "loading",
    "adapters/reading.py": "loading",
    "adapters/references.py": "the self-test's own path",
    "backends/native/compiler.py": "the digest of a library",
    "backends/native/forms.py": "the digest of a library",
    "backends/native/kept.py": "the digest of a library",
}
"""Modules of `PATH_ROOMS` that a call for a resident adapter does not pass through."""


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


def too_many(
    what: str, found: Mapping[str, int], most: int, allowed: Mapping[str, tuple[int, str]]
) -> Iterator[str]:
    """Prints the allowed exceptions above ``most``; yields violations."""
    print(f"{what}: {max(found.values())} at most, limit {most}")
    for path, (limit, why) in allowed.items():
        count = found.get(path, 0)
        lower = "" if count == limit else f" (limit {limit}: lower it)"
        print(f"  {count:4} {path}: {why}{lower}")
    for path, count in sorted(found.items()):
        limit = allowed.get(path, (most, ""))[0]
        if count > limit:
            yield f"{path}: {count} {what}, more than {limit}"


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
    passing = [
        module for module in knowing if module.startswith(PATH_ROOMS) and module not in BESIDE
    ]
    wrong = [
        *too_many("lines of a file", lines, LONGEST, LONG),
        *too_many("files of a folder", folders, MOST_FILES, FULL),
        *at_most("a sampling option", option, SAMPLING_FILES),
        *at_most("an adapter, from the call to the kernel", passing, ADAPTER_FILES),
    ]
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
