"""Writes the synchronous client from the asyncio one; `make client-sync` runs it.

    python clients/generate_sync.py           write the files
    python clients/generate_sync.py --check   change nothing, fail if a file differs

Removes `async` and `await`, drops `Async` from names, and adapts docstrings by `WORDS`.
Code that waits for gRPC, an event or a thread is not generated: see `aio_transport`. Lines
between the comments "begin: async only" and "end: async only" are left out.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from itertools import accumulate
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).parent / "veneer_client"

MODULES: Final = {
    "aio": "client",
    "aio_adapters": "client_adapters",
    "aio_connection": "connection",
    "aio_handle": "handle",
    "aio_streams": "streams",
}
"""Hand-written module: generated module."""

NAMES: Final = MODULES | {"aio_transport": "transport", "StopAsyncIteration": "StopIteration"}

WORDS: Final = {
    "asyncio client": "synchronous client",
    "an ``async with``": "a ``with``",
    "async with": "with",
    "``async for`` over": "iterate over",
    "Create it inside the event loop that uses it. Cancelling a task cancels its call.": (
        "Threads may share it."
    ),
    "End the call; does": "End the call, from any thread; does",
    "total, in any thread": "total, in gRPC's thread",
}
"""Replacements in docstrings and comments, in this order. One that never occurs is an error."""

ASYNC_ONLY: Final = re.compile(r"(?ms)^ *# begin: async only\n.*?^ *# end: async only\n")


def sync_name(name: str) -> str:
    """The synchronous client's name for ``name``, which is often the same."""
    name = re.sub(r"^(_?)Async(?=[A-Z])", r"\1", name)
    name = re.sub(r"^__a(enter|exit|iter|next)__$", r"__\1__", name)
    return NAMES.get(name, name)


def sync_words(text: str, unused: set[str]) -> str:
    """A docstring or comment, rewritten for the synchronous client."""
    for words, instead in WORDS.items():
        if words in text:
            unused.discard(words)
            text = text.replace(words, instead)
    return re.sub(r"\w+", lambda name: sync_name(name[0]), text)


def sync_source(source: str, unused: set[str]) -> str:
    """A module of the asyncio client, made synchronous but not formatted."""
    source = ASYNC_ONLY.sub("", source)
    lines = [0, *accumulate(map(len, source.splitlines(keepends=True)))]
    parts, at = list[str](), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        start = lines[token.start[0] - 1] + token.start[1]
        end = lines[token.end[0] - 1] + token.end[1]
        parts.append(source[at:start])
        at = end
        if token.string in ("async", "await"):
            at += 1  # skips the space after it too
        elif token.type == tokenize.NAME:
            parts.append(sync_name(token.string))
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            parts.append(sync_words(token.string, unused))
        else:
            parts.append(source[start:end])
    return "".join(parts)


def ruff(source: str, path: Path, *arguments: str) -> str:
    """``source`` after a run of ruff with the project's settings."""
    command = [sys.executable, "-m", "ruff", *arguments]
    command += ["--quiet", "--stdin-filename", str(path), "-"]
    return subprocess.run(
        command, input=source, capture_output=True, text=True, check=True
    ).stdout


def generated() -> dict[Path, str]:
    """The expected content of each generated file."""
    files, unused = dict[Path, str](), set(WORDS)
    for module, name in MODULES.items():
        path = PACKAGE / f"{name}.py"
        source = f"# Generated from {module}.py by `make client-sync`: edit that file.\n"
        source += sync_source((PACKAGE / f"{module}.py").read_text("utf-8"), unused)
        # Sorts imports, and simplifies loops that only `async for` needed.
        fixes = ("--fix-only", "--unsafe-fixes", "--select", "I,C4,UP")
        source = ruff(source, path, "check", *fixes)
        files[path] = ruff(source, path, "format")
    if unused:
        raise SystemExit(f"WORDS no longer occur in the asyncio client: {sorted(unused)}")
    return files


def main() -> None:
    """Write the files, or check them."""
    check = sys.argv[1:] == ["--check"]
    for path, text in generated().items():
        if path.exists() and path.read_text("utf-8") == text:
            continue
        if check:
            raise SystemExit(f"{path} differs from what `make client-sync` writes: run it")
        path.write_text(text, "utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
