"""What a caller may tell a chat template, beside the messages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from veneer_registry.errors import InvalidField

__all__ = [
    "EFFORTS",
    "MAX_KWARGS",
    "Effort",
    "TemplateOptions",
    "kwargs_of",
    "longer_as_json",
]

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

EFFORTS: Final[tuple[str, ...]] = get_args(Effort)

MAX_KWARGS: Final = 16 << 10
"""Most characters of a template's variables as JSON: a caller's loops over them stay short."""

MAX_DEPTH: Final = 64
"""Most nested lists and objects in them."""

_OWN: Final = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
)
"""Names that are the server's to set."""


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How to render messages.

    Attributes:
        kwargs: variables of the template, JSON values. The base's special tokens and the
            messages cannot be replaced by them.
        add_generation_prompt: begin an answer of the assistant after the messages.
        continue_final: leave the last message open, for the output to continue it.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False

    def __post_init__(self) -> None:
        for name in _OWN:
            if name in self.kwargs:
                raise _invalid("template.kwargs", f"may not set {name}: send it as a field")
        too_long = _invalid(
            "template.kwargs", f"has more than {MAX_KWARGS} characters as JSON: send less"
        )
        if longer_as_json(self.kwargs, MAX_KWARGS):
            raise too_long
        if _nested(self.kwargs) > MAX_DEPTH:
            raise _invalid(
                "template.kwargs", f"is nested more than {MAX_DEPTH} deep: flatten it"
            )
        if self.kwargs and len(json.dumps(self.kwargs)) > MAX_KWARGS:
            raise too_long
        if self.continue_final and self.add_generation_prompt:
            raise _invalid(
                "template.continue_final_message",
                "excludes add_generation_prompt: an answer continues the last message or "
                "follows it; set one of them",
            )

    @classmethod
    def of(
        cls,
        kwargs: Mapping[str, Any],
        effort: str | None,
        add_generation_prompt: bool | None,
        continue_final: bool,
    ) -> TemplateOptions:
        """From what a caller sent; None is unset.

        As in vLLM, an effort is passed on as ``reasoning_effort``, and as ``enable_thinking``
        for templates that only know that.

        Raises:
            InvalidField: a value is outside its range, or two exclude each other.
        """
        if effort is not None:
            if effort not in EFFORTS:
                raise _invalid(
                    "template.reasoning_effort",
                    f"is {effort[:40]!r}: give one of {', '.join(EFFORTS)}",
                )
            kwargs = {
                "enable_thinking": effort != "none",
                **kwargs,
                "reasoning_effort": effort,
            }
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final
        return cls(kwargs, add_generation_prompt, continue_final)


def kwargs_of(text: str) -> dict[str, Any]:
    """Variables of a template from a JSON object as text.

    Raises:
        InvalidField: it is none, or too long.
    """
    found: object = None
    if len(text) <= MAX_KWARGS:
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(text, parse_constant=_no_constant)
            json.dumps(read, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            found = read
    if not isinstance(found, dict):
        raise _invalid(
            "template.kwargs",
            f"is not a JSON object of at most {MAX_KWARGS} characters: send one",
        )
    return found


def longer_as_json(value: object, most: int) -> bool:
    """Whether a value surely takes more than ``most`` characters as JSON.

    Writing it is one call, which keeps the interpreter's lock however long it takes. So it is
    counted first, no further than to ``most``. Numbers with fractions, commas and escapes
    count as less than they are.
    """
    left, todo = most, [value]
    while todo and left >= 0:
        one = todo.pop()
        if isinstance(one, dict):
            left -= 4 * len(one)
            if left >= 0:
                left -= sum(map(len, one))
                todo.extend(one.values())
        elif isinstance(one, list):
            left -= 2 * len(one)
            if left >= 0:
                todo.extend(one)
        elif isinstance(one, str):
            left -= len(one)
        elif isinstance(one, int):
            left -= max(0, one.bit_length() - 1) // 4
    return left < 0


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _nested(value: object) -> int:
    """How deeply a JSON value is nested, as far as `MAX_DEPTH` + 1."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inside = [each for each in level if isinstance(each, list | dict)]
        level = [
            inner
            for each in inside
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        depth += bool(inside)
        if not inside:
            break
    return depth


def _invalid(field: str, problem: str) -> InvalidField:
    return InvalidField(f"{field} {problem}", metadata={"field": field})
