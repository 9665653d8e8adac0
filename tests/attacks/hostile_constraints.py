"""Hostile constraints: expensive to compile or to follow, or broken inside the library."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple


class Hostile(NamedTuple):
    """A constraint, and the request field that holds it (``kind``)."""

    kind: str
    text: str


def _schema(schema: Any) -> Hostile:
    return Hostile("json_schema", json.dumps(schema, separators=(",", ":")))


GROWS: Final = _schema({"type": "integer", "multipleOf": 99999989})
"""Compiles to an automaton of a hundred million states."""

SLOW_MASK: Final = Hostile("regex", "((a{100}){100}){100}")
"""Compiles in a millisecond; its first mask takes 100 ms."""

PANICS: Final = Hostile("regex", r"((é|\w)|((b)*|\w))")
"""Panics because of a bug in the library (llguidance 1.9.1)."""


def _wrapped(text: str, times: int) -> str:
    for _ in range(times):
        text = f"({text}){{1,100}}"
    return text


HOSTILE: Final[dict[str, Hostile]] = {
    "grows without end": GROWS,
    "slow mask": SLOW_MASK,
    "panics": PANICS,
    "nested quantifiers": Hostile("regex", _wrapped("a", 5)),
    "a billion repetitions": Hostile("regex", "a{1000000000}"),
    "an enum of 32 KB": _schema({"enum": [f"v{i}" for i in range(3500)]}),
    "a reference to itself": _schema({"$ref": "#"}),
    "references without end": _schema(
        {
            "$defs": {
                "n": {
                    "type": "object",
                    "properties": {"l": {"$ref": "#/$defs/n"}, "r": {"$ref": "#/$defs/n"}},
                    "required": ["l", "r"],
                }
            },
            "$ref": "#/$defs/n",
        }
    ),
    "references that double": _schema(
        {
            "$defs": {
                **{
                    f"d{i}": {
                        "type": "array",
                        "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 4,
                    }
                    for i in range(12)
                },
                "d12": {"type": "integer"},
            },
            "$ref": "#/$defs/d0",
        }
    ),
    "items in items": Hostile("json_schema", '{"items":' * 2000 + "{}" + "}" * 2000),
    "groups in groups": Hostile("regex", "(" * 15000 + "a" + ")" * 15000),
    "pattern properties": _schema(
        {
            "type": "object",
            "patternProperties": {f"^(a|b)*{i}.{{30}}$": {} for i in range(100)},
        }
    ),
    "unicode classes": Hostile("regex", r"((\w{50}\W{50}\p{L}{50}){50}){50}"),
    "look-ahead": Hostile("regex", "(?=a)b"),
    "unevaluated properties": _schema({"type": "object", "unevaluatedProperties": False}),
    "a billion items": _schema(
        {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000_000}
    ),
    "contradictory bounds": _schema({"type": "integer", "minimum": 5, "maximum": 1}),
    "bounds of 300 digits": _schema(
        {"type": "integer", "minimum": 10**300, "maximum": 10**308}
    ),
    "multiples of primes": _schema(
        {"type": "integer", "allOf": [{"multipleOf": p} for p in (7, 11, 13, 17, 19)]}
    ),
    "an intersection": _schema(
        {
            "type": "string",
            "allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}c"} for i in range(10, 20)],
        }
    ),
    "optional ones": Hostile("regex", "a?" * 3000 + "a" * 3000),
    "400 alternatives": _schema(
        {
            "anyOf": [
                {"type": "object", "properties": {f"a{i}": {"type": "string"}, "b": {}}}
                for i in range(400)
            ]
        }
    ),
    "wide alternatives": Hostile(
        "regex", "|".join(f".*{chr(97 + i % 26)}.{{{i}}}" for i in range(400))
    ),
    "no text at all": Hostile("regex", r"[^\x00-\U0010ffff]"),
    "a megabyte": _schema(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(40_000)}}
    ),
}
"""Each must be answered within its limits, or with INVALID_ARGUMENT."""
