"""Made-up answers of models that call tools, 200 for each family of templates.

The same seed gives the same answers. `vllm_tool_calls.json` holds them together with what
vLLM's own parsers make of them (`tests/bench/vllm_parsers.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Final

SEED: Final = 25
COUNT: Final = 200

_NAMES: Final = ("weather", "get_time", "search-web", "fs.read", "Rechnung_prüfen", "a")
_WORDS: Final = (
    "Paris",
    "naïve café",
    "日本語",
    "🙂👍🏽",
    'say "hi"',
    "back\\slash",
    "a{b}c",
    "x</x>",
    "line\nbreak",
    "tab\there",
    "",
    "[1, 2]",
    "50 % & more",
    "semi; colon",
    "<b>",
)
_BEFORE: Final = (
    "I will look that up.\n",
    "Sure! ",
    "Let me think: 2 < 3.\n\n",
    "好的。",
    "A: ",
)


def _value(random_: random.Random, depth: int) -> Any:
    kind = random_.randrange(7 if depth else 5)
    match kind:
        case 0:
            return random_.choice(_WORDS)
        case 1:
            return random_.randrange(-1000, 100_000)
        case 2:
            return random_.choice([0.5, -2.25, 1e-7, 3.0])
        case 3:
            return random_.choice([True, False, None])
        case 4:
            return random_.choice(_WORDS) * random_.randrange(1, 4)
        case 5:
            return [_value(random_, depth - 1) for _ in range(random_.randrange(4))]
    return _object(random_, depth - 1)


def _object(random_: random.Random, depth: int) -> dict[str, Any]:
    keys = random_.sample(["city", "q", "n", "opts", "größe", "a b"], random_.randrange(4))
    return {key: _value(random_, depth) for key in keys}


def _dumped(random_: random.Random, value: Any) -> str:
    """JSON as models write it: with or without spaces, escapes and line breaks."""
    return json.dumps(
        value,
        ensure_ascii=random_.random() < 0.3,
        indent=random_.choice([None, None, None, 2]),
        separators=random_.choice([(", ", ": "), (",", ":")]),
    )


def _call(random_: random.Random, key: str, depth: int) -> str:
    call = {"name": random_.choice(_NAMES), key: _object(random_, depth)}
    if random_.random() < 0.1:
        call = dict(reversed(call.items()))
    return _dumped(random_, call)


def _hermes(random_: random.Random, count: int, depth: int) -> str:
    space = random_.choice(["\n", ""])
    calls = [
        f"<tool_call>{space}{_call(random_, 'arguments', depth)}{space}</tool_call>"
        for _ in range(count)
    ]
    return random_.choice(["\n", ""]).join(calls)


def _llama3(random_: random.Random, count: int, depth: int) -> str:
    calls = [
        _call(random_, random_.choice(["parameters", "parameters", "arguments"]), depth)
        for _ in range(count)
    ]
    return random_.choice(["", "", "<|python_tag|>"]) + "; ".join(calls)


def _mistral_list(random_: random.Random, count: int, depth: int) -> str:
    calls = [_call(random_, "arguments", depth) for _ in range(count)]
    return f"[TOOL_CALLS]{random_.choice(['', ' '])}[{', '.join(calls)}]"


def _mistral_names(random_: random.Random, count: int, depth: int) -> str:
    return "".join(
        f"[TOOL_CALLS]{random_.choice(_NAMES)}{_dumped(random_, _object(random_, depth))}"
        for _ in range(count)
    )


_WRITERS: Final[dict[str, Callable[[random.Random, int, int], str]]] = {
    "hermes": _hermes,
    "llama3_json": _llama3,
    "mistral": _mistral_list,
    "mistral v11": _mistral_names,
}
FAMILIES: Final = tuple(_WRITERS)

KINDS: Final = (
    "one",
    "one",
    "several",
    "several",
    "before",
    "nested",
    "truncated",
    "malformed",
    "broken",
    "text",
)


def _malformed(random_: random.Random, family: str) -> str:
    """What looks like a call and is none, from its beginning."""
    wrong = random_.choice(
        [
            '{"name": weather, "arguments": {}}',
            "{'name': 'weather', 'arguments': {}}",
            '{"nam": "weather", "arguments": {}}',
            '{"name": "weather"}',
            '{"name": 5, "argument": {}}',
            "weather(city='Paris')",
            '["weather"]',
            '{"name" "weather"}',
        ]
    )
    match family:
        case "hermes":
            return f"<tool_call>\n{wrong}\n</tool_call>"
        case "llama3_json":
            return wrong
        case "mistral v11":  # the name says that it is a call, whatever follows
            return "[TOOL_CALLS]weather" + random_.choice(["{city: Paris}", "{'a': 1}", "{]"])
    return f"[TOOL_CALLS] [{wrong}]"


def _broken(random_: random.Random, family: str) -> str:
    """A call whose arguments are not valid JSON."""
    wrong = random_.choice(
        ['{"a": b}', "{'a': 1}", '{"a": 1,}', '{"a" 1}', '{"a": [1}', '{"a": "']
    )
    match family:
        case "hermes":
            return f'<tool_call>\n{{"name": "weather", "arguments": {wrong}}}\n</tool_call>'
        case "llama3_json":
            return f'{{"name": "weather", "parameters": {wrong}}}'
        case "mistral v11":
            return f"[TOOL_CALLS]weather{wrong}"
    return f'[TOOL_CALLS] [{{"name": "weather", "arguments": {wrong}}}]'


def _text(random_: random.Random) -> str:
    pieces = ["It is ", "warm. ", "2 < 3 ", "日本 ", "<tool", "[TOOL", "\n"]
    return "".join(random_.choice(pieces) for _ in range(9))


def _answer(random_: random.Random, family: str, kind: str) -> str:
    write = _WRITERS[family]
    match kind:
        case "several":
            return write(random_, random_.randrange(2, 5), 1)
        case "before":
            return random_.choice(_BEFORE) + write(random_, random_.randrange(1, 3), 1)
        case "nested":
            return write(random_, 1, 5)
        case "truncated":
            whole = write(random_, random_.randrange(1, 3), 2)
            return whole[: random_.randrange(1, len(whole))]
        case "malformed":
            return _malformed(random_, family)
        case "broken":
            return _broken(random_, family)
        case "text":
            return _text(random_)
    return write(random_, 1, 1)


def answers(family: str) -> list[tuple[str, str]]:
    """(kind, text) of each answer."""
    random_ = random.Random(f"{SEED}/{family}")
    kinds = [KINDS[at % len(KINDS)] for at in range(COUNT)]
    return [(kind, _answer(random_, family, kind)) for kind in kinds]
