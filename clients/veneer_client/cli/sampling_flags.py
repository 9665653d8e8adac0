"""The flags of `SamplingNumbers`, one for each of its fields."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Final, get_args, get_type_hints

import typer

from veneer_client.types import Flag, SamplingNumbers

__all__ = ["flag", "flag_parameters"]

_FIELDS: Final[dict[str, tuple[type, Flag]]] = {
    name: get_args(annotated)
    for name, annotated in get_type_hints(SamplingNumbers, include_extras=True).items()
}


def flag(name: str) -> Any:
    """The Typer option of one field."""
    _, words = _FIELDS[name]
    return typer.Option(help=words.help, min=words.least)


def flag_parameters() -> list[inspect.Parameter]:
    """Parameters for a command that takes all the flags, each None unless given."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, flag(name)],
        )
        for name, (kind, _) in _FIELDS.items()
    ]
