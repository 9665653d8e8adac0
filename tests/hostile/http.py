"""Hostile JSON: for every field of the two generate endpoints, values that no SDK sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from veneer_server.openai.fields import IGNORED, REFUSED, ChatFields, CompletionFields

_MARK: Final = "\N{SNOWMAN}"
"""Placeholder for the hostile value in a valid request."""

MANY: Final = 10_000

FRAGMENTS: Final[tuple[bytes, ...]] = (
    b"null",
    b"true",
    b"0",
    b"-1",
    b"-0.0",
    b"1.5",
    b"1e400",
    b"NaN",
    b"-Infinity",
    b"18446744073709551616",
    b"9" * 5000,
    b'""',
    b'"x"',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'"a\nb"',
    b'"' + b"x" * 100_000 + b'"',
    b"[]",
    b"[null]",
    b"[[]]",
    b"[{}]",
    b"[1,true]",
    b'["a",1]',
    b"[" + b",".join([b"0"] * MANY) + b"]",
    b"[" + b",".join([b'""'] * MANY) + b"]",
    b"[" + b",".join([b"{}"] * MANY) + b"]",
    b"[" * 50_000 + b"]" * 50_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b"{}",
    b'{"":""}',
    b'{"a":"\\ud800"}',
    b'{"\\ud800":1}',
    b"{" + b",".join(b'"%d":0' % n for n in range(MANY)) + b"}",
    b"{" + b",".join(b'"k%d":0' % n for n in range(MANY)) + b"}",
    b"",
    b"{",
)


@dataclass(frozen=True, slots=True)
class JsonCase:
    """A request: what is hostile about it, its path, and its body."""

    name: str
    path: str
    body: bytes


def json_cases(model: str) -> Iterator[JsonCase]:
    """Every field of both endpoints, including nested ones, with every fragment."""
    chat: dict[str, Any] = {
        "model": model,
        "max_tokens": 2,
        "messages": [{"role": "user", "content": "Hi"}],
    }
    text: dict[str, Any] = {"model": model, "max_tokens": 2, "prompt": "Hi"}
    # Some of each: they are all treated alike.
    others = [*sorted(IGNORED)[::4], *sorted(REFUSED)[::4], "no_such_field"]
    inner = [
        {"messages": [{"role": _MARK, "content": "Hi"}]},
        {"messages": [{"role": "user", "content": _MARK}]},
        {"messages": [{"role": "user", "content": "Hi", "name": _MARK}]},
        {"messages": [{"role": "user", "content": "Hi", "no_such": _MARK}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": _MARK}]}]},
        {"messages": [{"role": "user", "content": [{"type": _MARK, "text": "Hi"}]}]},
        {"messages": [{"role": "user", "content": [_MARK]}]},
        {"messages": [_MARK]},
        {"stream": True, "stream_options": {"include_usage": _MARK}},
        {"response_format": {"type": _MARK}},
        {"response_format": {"type": "json_schema", "json_schema": _MARK}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": _MARK}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": _MARK}}},
        {"response_format": {"type": "json", "value": _MARK}},
        {"response_format": {"type": "regex", "value": _MARK}},
        {"response_format": {"type": "json_object", "schema": _MARK}},
        {"tools": [{"type": _MARK, "function": {"name": "f"}}]},
        {"structured_outputs": {"json": _MARK}},
        {"structured_outputs": {"regex": _MARK}},
        {"structured_outputs": {"choice": _MARK}},
        {"logit_bias": {"5": _MARK}},
        {"stop": [_MARK]},
        {"stop_token_ids": [_MARK]},
    ]
    for path, good, fields in (
        ("/v1/chat/completions", chat, ChatFields.model_fields),
        ("/v1/completions", text, CompletionFields.model_fields),
    ):
        for name in (*fields, *others):
            yield from _filled(path, f"{name}", {**good, name: _MARK})
        for given in inner:
            if "messages" in given and good is text:
                continue
            yield from _filled(path, json.dumps(given)[:80], {**good, **given})
        for at, fragment in enumerate(FRAGMENTS):
            yield JsonCase(f"body #{at}", path, fragment)
        yield JsonCase("two models", path, b'{"model":"a","model":"' + model.encode() + b'"}')
        yield JsonCase("byte order mark", path, b"\xef\xbb\xbf" + json.dumps(good).encode())
        yield JsonCase("UTF-16", path, json.dumps(good).encode("utf-16"))
    yield from _filled("/v1/completions", "prompt: [x]", {**text, "prompt": [_MARK]})
    yield from _filled("/v1/completions", "prompt: [[x]]", {**text, "prompt": [[_MARK]]})


def _filled(path: str, name: str, given: dict[str, Any]) -> Iterator[JsonCase]:
    shape = json.dumps(given, ensure_ascii=False).encode()
    before, after = shape.split(json.dumps(_MARK, ensure_ascii=False).encode())
    for at, fragment in enumerate(FRAGMENTS):
        yield JsonCase(f"{name} #{at}", path, before + fragment + after)
