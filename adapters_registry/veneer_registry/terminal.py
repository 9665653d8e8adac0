"""Safe output of untrusted text to a terminal: control characters are shown, not obeyed.

Names, labels, manifests, errors and answers come from a server's users, and a terminal obeys
control characters in them: an escape sequence moves the cursor, changes the title or writes the
clipboard (OSC 52), U+009B is ESC and [ in one character, and a carriage return or a
bidirectional control makes a line look like another one. So our programs write through a
`Guard` (`command_line.Program` installs it), and through a `Screen` where a line has colours.

Escapes are written as in JSON, so that JSON output stays JSON with the same content.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_CONTROLS: Final = "\x00-\x08\x0b-\x1f\x7f-\x9f"
"""C0 without newline and tab, DEL, C1."""
_OVERRIDES: Final = "\u202a-\u202e\u2066-\u2069"
"""Bidirectional overrides and isolates, which change the order in which text is displayed."""
_HALVES: Final = "\ud800-\udfff"
"""Lone surrogates, which are not text. A stream with ``surrogateescape``, as in the C locale,
writes some of them as raw bytes, U+009B among them."""
_MARKS: Final = "\u061c\u200e\u200f\u2028\u2029"
"""Directional marks, and separators that some terminals take for a newline."""
_INVISIBLE: Final = "\u00ad\u180e\u200b-\u200d\u2060-\u2064\ufeff\U000e0000-\U000e007f"

_OBEYED: Final = f"{_CONTROLS}{_OVERRIDES}{_HALVES}"
_IN_ANSWERS: Final = re.compile(f"[{_OBEYED}]")
_IN_TEXT: Final = re.compile(f"[{_OBEYED}{_MARKS}]")
_IN_A_LINE: Final = re.compile(f"[\t\n{_OBEYED}{_MARKS}{_INVISIBLE}]")

_SHORT: Final = {"\t": "\\t", "\n": "\\n", "\r": "\\r", "\b": "\\b", "\f": "\\f"}


def visible(text: str) -> str:
    """Escape the characters that control a terminal, except newline and tab."""
    return _IN_TEXT.sub(_escape, text) if _IN_TEXT.search(text) else text


def one_line(text: str) -> str:
    """Like `visible`, for a name or label: also escapes newlines, tabs and invisible
    characters."""
    return _IN_A_LINE.sub(_escape, text) if _IN_A_LINE.search(text) else text


def _escape(found: re.Match[str]) -> str:
    text = found[0]
    if text in _SHORT:
        return _SHORT[text]
    units = text.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


class Guard(io.TextIOBase):
    """A text stream that writes all text as `visible` does.

    Attributes:
        raw: the underlying stream, for our own escape sequences.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        self.raw.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.raw.flush()

    def close(self) -> None:
        self.raw.close()

    def isatty(self) -> bool:
        return bool(self.raw.isatty())

    def fileno(self) -> int:
        return int(self.raw.fileno())

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> Any:  # type: ignore[override]
        return self.raw.encoding

    @property
    def errors(self) -> Any:  # type: ignore[override]
        return self.raw.errors

    @property
    def closed(self) -> bool:
        return bool(self.raw.closed)

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":  # a plain Console's own sequences are not trusted
            raise AttributeError(name)
        return getattr(self.raw, name)

    def __del__(self) -> None:
        """Leave the underlying stream open."""


@contextmanager
def guarded() -> Iterator[None]:
    """Guard standard output and error while the block runs. If an exception leaves the block,
    they stay guarded, so that its traceback is too."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, Guard) else Guard(stream)
        for stream in before
    )
    try:
        yield
    except SystemExit:
        sys.stdout, sys.stderr = before
        raise
    sys.stdout, sys.stderr = before


def write_answer(stream: Any, text: str) -> None:
    """Write a model's text and flush. A pipe or file gets it unchanged; for a terminal,
    controls are escaped. Marks and joiners are kept: some scripts and emoji need them."""
    raw = stream.raw if isinstance(stream, Guard) else stream
    raw.write(_IN_ANSWERS.sub(_escape, text) if raw.isatty() else text)
    raw.flush()
