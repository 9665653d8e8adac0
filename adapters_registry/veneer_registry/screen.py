"""A `rich` console for untrusted text. It is not in `terminal`, since a server's front imports
that without rich."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from veneer_registry.terminal import Guard, one_line, visible


def cell(text: object) -> str:
    """Return a name, label or other short untrusted text as markup: one line, no styles."""
    return escape(one_line(str(text)))


class Screen(Console):
    """A console that sends its own escape sequences to the terminal, but escapes those in the
    text that it shows."""

    @property
    def file(self) -> IO[str]:
        """The output stream, without its `Guard`: all its text has been escaped by `render`."""
        found: Any = self._file or (sys.stderr if self.stderr else sys.stdout)
        found = getattr(found, "rich_proxied_file", found)
        return found.raw if isinstance(found, Guard) else super().file

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console`. Escapes the text before it is measured."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See `Console`."""
        for segment in super().render(renderable, options):
            if segment.control is None and (shown := visible(segment.text)) != segment.text:
                yield Segment(shown, segment.style)
            else:
                yield segment
