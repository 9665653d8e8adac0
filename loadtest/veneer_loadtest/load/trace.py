"""A trace of requests to replay. A trace file has one JSON object per request and line:

    {"at_s": 0.25, "adapter": "chat", "prompt_tokens": 40, "tokens": 64}

``at_s``: seconds after the start. ``adapter``: if "" or left out, the base model.
``tokens``: new tokens. ``prompt``: the text to send, instead of ``prompt_tokens``.
Lines may be in any order.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from veneer_loadtest.errors import BadTrace


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
            return "`tokens` must be 1 or more"
        if (self.prompt_tokens > 0) == bool(self.prompt):
            return "give either `prompt_tokens` (1 or more) or `prompt`"
        return None


def read_trace(path: Path) -> tuple[TraceLine, ...]:
    """Read all requests, in order of time.

    Raises:
        BadTrace: the file cannot be read, holds no request, or has a line that is not one.
    """
    decoder = msgspec.json.Decoder(TraceLine)
    found: list[TraceLine] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    request = decoder.decode(line)
                    fault = request.fault()
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    fault = str(error)
                if fault:
                    raise BadTrace(
                        f"{path}, line {number}: {fault}",
                        metadata={"file": str(path), "line": str(number)},
                    )
                found.append(request)
    except OSError as error:
        raise BadTrace(
            f"cannot read the trace {path}: {error.strerror}",
            metadata={"file": str(path), "cause": "unreadable"},
        ) from error
    if not found:
        raise BadTrace(
            f"{path} holds no request: a trace has one JSON object per line, such as "
            '{"at_s": 0.25, "adapter": "chat", "prompt_tokens": 40, "tokens": 64}',
            metadata={"file": str(path), "cause": "empty"},
        )
    return tuple(sorted(found, key=lambda request: request.at_s))
