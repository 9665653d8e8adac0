"""Runs a page from its first block to its last and reports what is wrong in it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.docs.pages import REPOSITORY, Block, read_page
from tests.docs.session import Session
from tests.docs.shapes import difference

QUICK_S: Final = 90
SLOW_S: Final = 3 * 3600
"""Time limits of a block: one that the suite runs, and one that only `make docs-check` runs."""

Tell = Callable[[str], None]


def check_page(
    path: Path, cache_dir: Path, *, slow: bool = False, tell: Tell = lambda _: None
) -> list[str]:
    """Errors of the page, each with its line.

    Args:
        slow: Also run the blocks that are marked as slow.
        tell: Called with a line for each block as it ends.
    """
    page = read_page(path.read_text("utf-8"))
    name = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path
    untrue = [f"{name}: {mistake}" for mistake in page.mistakes]
    run = [b for b in page.blocks if b.when == "always" or (slow and b.when == "slow")]
    if not run:
        return untrue
    with tempfile.TemporaryDirectory() as folder, Session(Path(folder), cache_dir) as session:
        for block in run:
            ran = session.run(block, SLOW_S if block.when == "slow" else QUICK_S)
            wrong = [f"{name}: block at line {block.line}: {line}" for line in ran.failures]
            if wrong:
                wrong.append(f"it printed:\n{ran.printed[-2000:]}")
            elif block.output is not None:
                differs = difference(block.output, ran.printed, block.varies)
                if differs:
                    wrong.append(
                        f"{name}: output of the block at line {block.line}:\n{differs}\n"
                        f"all of it:\n{ran.printed[-4000:]}"
                    )
            tell(_line(str(name), block, ran.seconds, bool(wrong)))
            untrue += wrong
            if any("ended the shell" in line for line in ran.failures):
                break
    return untrue


def _line(name: str, block: Block, seconds: float, wrong: bool) -> str:
    first = block.text.strip().partition("\n")[0]
    return f"{'WRONG' if wrong else 'true '} {seconds:7.1f} s  {name}:{block.line}: {first}"
