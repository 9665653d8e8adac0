"""Bash completion for words that bash splits: ``HOST:PORT``, ``NAME@REVISION``.

Bash ends a word at each of these characters and replaces only what follows the last one. A
completion program must join such words, and omit the part that bash keeps from its answer.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, MutableMapping
from typing import Final

_BREAKS: Final = "@:="


@contextlib.contextmanager
def whole_words(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Join the words that bash split, if it is asking for a completion; else do nothing."""
    if "complete_bash" not in environ.values():
        yield
        return
    given = environ.get("COMP_WORDS", "")
    between = "\n" if "\n" in given else " "  # Typer's script sets IFS to newline
    words = given.split(between)
    at = int(environ.get("COMP_CWORD", "0"))
    words += [""] * (at + 1 - len(words))
    whole: list[str] = []
    for number, word in enumerate(words[: at + 1]):
        # A break character joins the words on both sides.
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
