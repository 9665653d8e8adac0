"""Default sampling options and length, for requests that leave them unset."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from veneer_server.wire.sampling import OF_BASE, RANGES, SamplingParams

_OURS: Final = SamplingParams(temperature=0.7, top_p=0.9)
_SHORT: Final = 512
"""New tokens of a gRPC call that sets no number."""


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """A base's defaults for options that a request leaves unset.

    Attributes:
        max_tokens: the operator's default for most new tokens, if set; the context may end
            first.
    """

    sampling: SamplingParams = _OURS
    max_tokens: int | None = None

    def most_tokens(self, *, open_ended: bool = False) -> int | None:
        """Return the most new tokens of a call that sets no number; None: the rest of the
        context.

        Args:
            open_ended: `GenerateCall.open_ended`.
        """
        if self.max_tokens is not None or open_ended:
            return self.max_tokens
        return _SHORT


_BUNDLED: Final = {
    # From its model card; the file that it is imported from has no values.
    "smollm2-135m": SamplingParams(temperature=0.2, top_p=0.9),
}


def read_defaults(
    folder: Path,
    name: str,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
) -> RequestDefaults:
    """Read a base's defaults: the operator's, else its ``generation_config.json``'s, else ours.

    Transformers ignores sampling options unless ``do_sample`` is true, so without it only the
    file's repetition penalty is used. With it, an option that the file leaves out is off.
    Values out of range are ignored.

    Args:
        folder: the base's folder.
        name: the name that the base is served as.
        max_tokens: the operator's value; None if there is none.
        temperature, top_p: the operator's values; None for the base's own.
    """
    found = _from_file(folder, _BUNDLED.get(name, _OURS))
    operators = {"temperature": temperature, "top_p": top_p}
    given = {name: value for name, value in operators.items() if value is not None}
    return RequestDefaults(replace(found, **given), max_tokens)


def _from_file(folder: Path, ours: SamplingParams) -> SamplingParams:
    try:
        raw = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ours
    if not isinstance(raw, dict):
        return ours
    samples = raw.get("do_sample") is True
    off = SamplingParams()
    found: dict[str, float] = {}
    for name in OF_BASE if samples else ("repetition_penalty",):
        value: Any = raw.get(name)
        allowed = RANGES[name]
        if isinstance(value, int | float) and allowed.least <= value <= allowed.most:
            found[name] = type(getattr(off, name))(value)
    return replace(off if samples else ours, **found)
