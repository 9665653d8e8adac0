"""Read and write result files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from veneer_registry.replacing import replace_file

from veneer_loadtest.errors import BadResult
from veneer_loadtest.results.compare import CompareResult
from veneer_loadtest.results.facts import FORMAT
from veneer_loadtest.results.load import FindMaxResult, RunResult
from veneer_loadtest.results.swap import SwapResult

LoadResult = RunResult | FindMaxResult
"""A result of a load, with figures over all requests."""
Result = LoadResult | SwapResult | CompareResult

_decoder: Final[msgspec.json.Decoder[Result]] = msgspec.json.Decoder(Result)

_KINDS: Final = ("run", "find-max", "swap", "compare")


class _Head(msgspec.Struct):
    kind: str = ""
    format: int = FORMAT


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        BadResult: the file cannot be read, is incomplete, or is something else.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadResult(
            f"cannot read {path}: {error.strerror}",
            metadata={"file": str(path), "cause": "unreadable"},
        ) from error
    try:
        head = msgspec.json.decode(text, type=_Head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadResult(
            f"{path} is not a complete result file ({error}): was it copied while being "
            "written, or truncated? A stopped run writes a complete one, marked as partial",
            metadata={"file": str(path), "cause": "not_whole"},
        ) from error
    if head.kind not in _KINDS:
        raise BadResult(
            f"{path} holds {head.kind or 'something'!r}: `report` reads what "
            f"{', '.join(_KINDS)} write with --json",
            metadata={"file": str(path), "cause": "kind", "kind": head.kind},
        )
    if head.format > FORMAT:
        raise BadResult(
            f"{path} was written by a newer veneer-loadtest: read it with that version",
            metadata={"file": str(path), "cause": "newer", "format": str(head.format)},
        )
    try:
        return _decoder.decode(text)
    except msgspec.MsgspecError as error:
        raise BadResult(
            f"{path} is not a result as this version writes it: {error}",
            metadata={"file": str(path), "cause": "fields"},
        ) from error


def write_result(path: Path, result: Result) -> None:
    """Write a result atomically; its folder must exist."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
