"""Results as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer_registry.replacing import replace_file

from veneer_loadtest.errors import BadResult
from veneer_loadtest.html.compare_page import compare_page
from veneer_loadtest.html.load_page import load_page
from veneer_loadtest.html.swap_page import swap_page
from veneer_loadtest.results import (
    CompareResult,
    FindMaxResult,
    Result,
    RunResult,
    SwapResult,
)


def write_page(path: Path, results: Sequence[Result], names: Sequence[str] = ()) -> None:
    """Write the page atomically; its folder must exist.

    ``names``, such as the files', are used for results without a label.

    Raises:
        BadResult: see `page`.
    """
    replace_file(path, page(results, names))


def page(results: Sequence[Result], names: Sequence[str] = ()) -> str:
    """The whole document.

    Raises:
        BadResult: results of different commands, which have nothing to compare.
    """
    loads = [result for result in results if isinstance(result, RunResult | FindMaxResult)]
    if len(loads) == len(results):
        return load_page(loads, names)
    swaps = [result for result in results if isinstance(result, SwapResult)]
    if len(swaps) == len(results):
        return swap_page(swaps, names)
    compared = [result for result in results if isinstance(result, CompareResult)]
    if len(compared) == len(results):
        return compare_page(compared, names)
    raise BadResult(
        "only results of one kind can be shown side by side: of run and find-max, of swap, or "
        "of compare",
        metadata={"cause": "kinds"},
    )
