"""JSON schemas of forced calls: one tool's arguments, or a list of calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["arguments_schema", "calls_schema", "without_words"]

MAX_FORCED_CALLS: Final = 8
"""Most calls of one answer that must call. Small models otherwise go on until `max_tokens`, in
the middle of a call: 4 of 300 requests of `tests.bench.tool_calls` did."""

_MAPS: Final = frozenset(
    {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
)
"""Members whose value maps names to schemas; the names may be anything, ``$ref`` included."""
_VALUES: Final = frozenset({"const", "default", "enum", "example", "examples"})
"""Members that hold values, not schemas."""
_WORDS: Final = frozenset({"$comment", "description", "example", "examples", "title"})
"""Members that only people and models read."""
_SAYS_MORE: Final = frozenset(
    {"$ref", "additionalProperties", "allOf", "anyOf", "oneOf", "patternProperties"}
)


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of a tool's arguments: an object, and without members that the tool does not
    have unless it says that it takes others. A tool without parameters has no arguments."""
    schema = {"type": "object", **(parameters or {})}
    if not schema.keys() & _SAYS_MORE:
        schema["additionalProperties"] = False
    return schema


def calls_schema(
    tools: Sequence[tuple[str, Mapping[str, Any] | None]], *, parallel: bool
) -> str:
    """The schema, as JSON, of a list of at least one call.

    Args:
        tools: names and parameters.
        parallel: allow more than one call.
    """
    calls: list[dict[str, Any]] = []
    parts: dict[str, Any] = {}
    for number, (name, parameters) in enumerate(tools):
        # Schemas may refer to parts of themselves: give each a place of its own.
        part = f"tool{number}"
        parts[part] = _moved(arguments_schema(parameters), f"#/$defs/{part}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    "arguments": {"$ref": f"#/$defs/{part}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_FORCED_CALLS if parallel else 1,
        "items": {"anyOf": calls},
        "$defs": parts,
    }
    return json.dumps(schema)


def _moved(schema: Any, place: str) -> Any:
    """A schema with its references to itself changed to a new place. As deep as the schema is
    nested, which is bounded."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[name] = place + value[1:]
        elif name in _MAPS and isinstance(value, dict):
            moved[name] = {key: _moved(each, place) for key, each in value.items()}
        else:
            moved[name] = value if name in _VALUES else _moved(value, place)
    return moved


def without_words(schema: Any) -> Any:
    """A schema without what has no effect on what fits it. As deep as the schema is nested,
    which is bounded."""
    if isinstance(schema, list):
        return [without_words(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _MAPS and isinstance(value, dict):
            kept[name] = {key: without_words(each) for key, each in value.items()}
        elif name not in _WORDS:
            kept[name] = value if name in _VALUES else without_words(value)
    return kept
