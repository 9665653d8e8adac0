"""Completion in bash of words that bash takes apart: ``HOST:PORT``, ``NAME@REVISION``.

Bash ends a word at each of these characters and replaces only what comes after the last one.
A completion's program must join such words, and leave their beginning out of its answer.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, MutableMapping
from typing import Final

__all__ = ["whole_words"]

_BREAKS: Final = "@:="


@contextlib.contextmanager
def whole_words(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """While bash asks for a completion: its words are whole; else does nothing."""
    if "complete_bash" not in environ.values():
        yield
        return
    given = environ.get("COMP_WORDS", "")
    between = "\n" if "\n" in given else " "  # Typer's script sets IFS to a line's end
    words = given.split(between)
    at = int(environ.get("COMP_CWORD", "0"))
    words += [""] * (at + 1 - len(words))
    whole: list[str] = []
    for number, word in enumerate(words[: at + 1]):
        # A break belongs to the words on both sides.
        if number > 1 and (_is_break(word) or _is_break(words[number - 1])):
            whole[-1] += word
        else:
            whole.append(word)
    environ["COMP_WORDS"] = between.join(whole)
    environ["COMP_CWORD"] = str(len(whole) - 1)
    joined = len(words[at]) < len(whole[-1])
    known = whole[-1][: max(map(whole[-1].rfind, _BREAKS)) + 1] if joined else ""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            yield
    finally:
        for line in out.getvalue().splitlines():
            print(line.removeprefix(known), file=sys.stdout)


def _is_break(word: str) -> bool:
    return bool(word) and set(word) <= set(_BREAKS)
