"""``python -m tests.docs.terminal FILE.svg``: README's picture, from a real session.

Runs each command in a pty against a real server, and draws its output with colours.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from tests.docs.pages import REPOSITORY, Block
from tests.docs.session import Session

COMMANDS: Final = (
    "veneer-server > server.log 2>&1 &",
    "veneer health --wait 60s",
    "veneer example sql --push",
    'Q="CREATE TABLE movies (id INTEGER, title TEXT, rating REAL); '
    'What is the highest rating?"',
    'veneer generate --temperature 0 "$Q"',
    'veneer generate --temperature 0 -a sql "$Q"',
    "veneer push examples/adapters/code --name code",
    'veneer generate --temperature 0 -a code "Reverse a string."',
    "veneer adapter evict sql",
    'veneer generate --temperature 0 -a sql@6664 "$Q"',
    "veneer ls",
)
WIDTH: Final = 96
_MOVES: Final = re.compile(r"(\n|\r|\x1b\[\d+A|\x1b\[2K|\x1b\[\?25[hl])")
_CURSOR: Final = ("\x1b[?25h", "\x1b[?25l")
"""Escape sequences of Rich's progress bars: up, erase line, hide and show the cursor."""
_PTY: Final = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]))"
THEME: Final = TerminalTheme(
    (22, 27, 34),
    (230, 237, 243),
    [
        (72, 79, 88),
        (255, 123, 114),
        (126, 231, 135),
        (227, 179, 65),
        (121, 192, 255),
        (210, 168, 255),
        (86, 212, 221),
        (201, 209, 217),
    ],
)
FORMAT: Final = """\
<svg xmlns="http://www.w3.org/2000/svg" class="rich-terminal" \
viewBox="0 0 {width} {height}" role="img" aria-label="A session in a terminal">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, \
"DejaVu Sans Mono", monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" \
height="{terminal_height}"/></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" \
clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""
"""Rich's format without its web font, so that pages with the picture load nothing for it."""


def record(cache_dir: Path) -> list[tuple[str, str]]:
    """Each command and its output, with the terminal's escape sequences."""
    printed = []
    with tempfile.TemporaryDirectory() as folder, Session(Path(folder), cache_dir) as session:
        for command in COMMANDS:
            line = command
            if command.startswith("veneer "):  # not the server, nor an assignment
                spawned = shlex.join([sys.executable, "-c", _PTY])
                line = f"TERM=xterm-256color COLUMNS={WIDTH} {spawned} {command}"
            ran = session.run(Block(1, "sh", line + "\n"), 120)
            if ran.failures:
                sys.exit("\n".join([*ran.failures, ran.printed]))
            printed.append((command, on_screen(ran.printed)))
    return printed


def on_screen(printed: str) -> str:
    """The final output on screen, without progress bars."""
    lines, row = [""], 0
    for part in _MOVES.split(printed.replace("\r\n", "\n")):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.startswith("\x1b[") and part.endswith("A"):
            row -= int(part[2:-1])
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part not in ("\r", *_CURSOR):
            lines[row] += part
    return "\n".join(lines).strip("\n")


def draw(printed: list[tuple[str, str]]) -> str:
    """The session as SVG."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        for command, output in printed:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text.from_ansi(output), end="\n" if output else "")
        return console.export_svg(
            title="veneer", theme=THEME, code_format=FORMAT, unique_id="veneer"
        )


def main() -> None:
    cache = Path(os.environ.get("VENEER_CACHE_DIR", REPOSITORY / ".cache" / "veneer"))
    Path(sys.argv[1]).write_text(draw(record(cache)), "utf-8")


if __name__ == "__main__":
    main()
