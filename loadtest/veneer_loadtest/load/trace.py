"""A trace of requests to replay, as JSON lines or CSV. JSON lines: an object per request,

    {"at_s": 0.25, "adapter": "chat", "prompt_tokens": 40, "tokens": 64}

``at_s``: seconds after the start. ``adapter``: if "" or left out, the base model.
``tokens``: new tokens. ``prompt``: the text to send, instead of ``prompt_tokens``.
Lines may be in any order.

CSV: a header with these names, in any order, then a row per request. The names of the public
Azure LLM inference traces are understood, too: ``TIMESTAMP`` (a date and time; the earliest
is at 0 s), ``ContextTokens`` and ``GeneratedTokens``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from veneer_loadtest.errors import BadTrace

_AZURE: Final = {
    "TIMESTAMP": "at_s",
    "ContextTokens": "prompt_tokens",
    "GeneratedTokens": "tokens",
}
_FORMS: Final = (
    "a trace has one JSON object per line, such as "
    '{"at_s": 0.25, "adapter": "chat", "prompt_tokens": 40, "tokens": 64}, or is CSV with the '
    "header at_s,adapter,prompt_tokens,tokens or TIMESTAMP,ContextTokens,GeneratedTokens"
)


class TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request; see the module's docstring."""

    at_s: float
    tokens: int
    adapter: str = ""
    prompt_tokens: int = 0
    prompt: str = ""

    def fault(self) -> str | None:
        """What is wrong with the request, or None."""
        if not (self.at_s >= 0 and math.isfinite(self.at_s)):
            return "`at_s` must be 0 or more seconds"
        if self.tokens < 1:
            return "`tokens` must be 1 or more: correct the line, or leave it out"
        if (self.prompt_tokens > 0) == bool(self.prompt):
            return "give either `prompt_tokens` (1 or more) or `prompt`"
        return None


class _BadLine(Exception):
    """A line that is not a request."""


def read_trace(path: Path) -> tuple[TraceLine, ...]:
    """Read all requests, in order of time.

    Raises:
        BadTrace: the file cannot be read, holds no request, or has a line that is not one.
    """
    found: list[TraceLine] = []
    read: Callable[[bytes], TraceLine] | None = None
    number, dated = 0, False
    try:
        with path.open("rb") as file:
            for line in file:
                number += 1
                if not line.strip():
                    continue
                if read is None:
                    if not line.lstrip().startswith(b"{"):
                        dated, read = b"TIMESTAMP" in line, _csv(line)
                        continue
                    read = msgspec.json.Decoder(TraceLine).decode
                request = read(line)
                if fault := request.fault():
                    raise _BadLine(fault)
                found.append(request)
    except OSError as error:
        raise BadTrace(
            f"cannot read the trace {path}: {error.strerror}",
            metadata={"file": str(path), "cause": "unreadable"},
        ) from error
    except (_BadLine, csv.Error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, _BadLine) else f"{error}; {_FORMS}"
        for theirs, ours in _AZURE.items() if dated else ():
            why = why.replace(f"`{ours}`", f"`{theirs}`").replace(f"`$.{ours}`", f"`{theirs}`")
        raise BadTrace(
            f"{path}, line {number}: {why}",
            metadata={"file": str(path), "line": str(number)},
        ) from error
    if not found:
        raise BadTrace(
            f"{path} holds no request: {_FORMS}",
            metadata={"file": str(path), "cause": "empty"},
        )
    if dated:
        began = min(request.at_s for request in found)
        found = [msgspec.structs.replace(each, at_s=each.at_s - began) for each in found]
    return tuple(sorted(found, key=lambda request: request.at_s))


def _csv(header: bytes) -> Callable[[bytes], TraceLine]:
    """Return what reads a row of a CSV file with this header; a date becomes seconds since
    1970.

    Raises:
        _BadLine: the header lacks a column, or has one that means nothing here.
    """
    columns = [name.strip() for name in _cells(header)]
    dated = "TIMESTAMP" in columns
    names = [_AZURE.get(name, name) for name in columns]
    lacking = {"at_s", "prompt_tokens", "tokens"}.difference(names)
    unknown = set(names).difference(TraceLine.__struct_fields__)
    if lacking or unknown:
        raise _BadLine(
            f"a header with {_listed(unknown) or 'no column'} that is unknown and "
            f"{_listed(lacking) or 'no column'} lacking: {_FORMS}"
        )

    def read(row: bytes) -> TraceLine:
        cells = _cells(row)
        if len(cells) != len(names):
            raise _BadLine(f"{len(cells)} cells, but the header has {len(names)} columns")
        given: dict[str, object] = dict(zip(names, map(str.strip, cells), strict=True))
        if dated:
            given["at_s"] = _moment(str(given["at_s"]))
        return msgspec.convert(given, TraceLine, strict=False)

    return read


def _cells(line: bytes) -> list[str]:
    return next(csv.reader([line.decode("utf-8-sig")]))


def _moment(text: str) -> float:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise _BadLine(
            f"TIMESTAMP {text!r}: give a date and time such as 2023-11-16 18:17:03.979"
        ) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
