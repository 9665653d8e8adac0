"""Random requests, each as a response and as a chat, and what the model writes for it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

_MESSAGES: Final = (
    "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}{{ m.tool_call_id }}{% endfor %}"
)
_TOOLS: Final = "{{ tools | tojson if tools }}"
MODELS: Final = {
    "hermes": _TOOLS + "{# <tool_call><think> #}" + _MESSAGES,
    "opened": _TOOLS + "{# <tool_call> #}" + _MESSAGES + "<think>\n",
    "llama": _TOOLS + "{# <|python_tag|> #}" + _MESSAGES,
    "mistral": _TOOLS + "{# [TOOL_CALLS]<think> #}" + _MESSAGES,
    "smollm2-135m": "",
}
"""Names of adapters and their templates; the base's own is the last."""

_PARAMETERS: Final = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
_FUNCTIONS: Final[tuple[dict[str, Any], ...]] = (
    {"name": "weather", "parameters": _PARAMETERS},
    {"name": "clock", "description": "The time 🕰"},
    {"name": "météo", "parameters": _PARAMETERS, "strict": True},
)
_WORDS: Final = (
    " the",
    " sea",
    "ab",
    "\n",
    " ",
    "\n\n",
    '"',
    "\\",
    "{",
    "}",
    "<",
    "</",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<tool",
    "😀",
    "🏴‍☠️",
    "é",
    "漢",
)
_STOPS: Final = ("sea", "\n\n\n", "😀é", "</tool_call>", "🏴")
_FORMAT: Final = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}


@dataclass(frozen=True, slots=True)
class Written:
    """What the model writes.

    Attributes:
        finish: why it ends, unless a stop string does.
    """

    tokens: tuple[int, ...]
    finish: str

    def outputs(self, rng: random.Random) -> list[SequenceOutput]:
        """As an engine sends it: how many tokens an output has differs from call to call."""
        made, at = [], 0
        while at < len(self.tokens):
            count = rng.choice((1, 1, 1, 2, 3, 8, 40))
            part = list(self.tokens[at : at + count])
            at += count
            finish: Any = self.finish if at >= len(self.tokens) else None
            made.append(
                SequenceOutput(
                    1,
                    part,
                    logprobs=[_score(token) for token in part],
                    top_logprobs=[
                        [(token, _score(token)), (token * 7 % 1000 + 6, -9.5)] for token in part
                    ],
                    finish=finish,
                )
            )
        return made


@dataclass(frozen=True, slots=True)
class Case:
    """One request in both forms."""

    response: dict[str, Any]
    chat: dict[str, Any]
    written: Written


def cases(rng: random.Random, tokenizer: TextTokenizer) -> Iterator[Case]:
    """Random cases without an end."""
    while True:
        model = rng.choice(list(MODELS))
        functions = rng.sample(_FUNCTIONS, rng.randrange(1, 4)) if rng.random() < 0.8 else []
        items, messages = _history(rng)
        response: dict[str, Any] = {"model": model, "input": items, "max_output_tokens": None}
        chat: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": None}
        forced = _tools(rng, functions, response, chat) if functions else ""
        _options(rng, response, chat, forced=bool(forced))
        text = _text(rng, model, functions, forced)
        ids = tokenizer.encode(text, add_special_tokens=False) or [
            tokenizer.encode("a", add_special_tokens=False)[0]
        ]
        finish = "stop"
        if rng.random() < 0.4:
            ids, finish = ids[: rng.randrange(1, len(ids) + 1)], "length"
        yield Case(response, chat, Written(tuple(ids), finish))


def _score(token: int) -> float:
    return -(token % 97) / 10


def _words(rng: random.Random, most: int) -> str:
    return "".join(rng.choices(_WORDS, k=rng.randrange(most)))


def _history(rng: random.Random) -> tuple[list[Any], list[Any]]:
    """Items, and the messages that they are."""
    items: list[Any] = [{"role": "user", "content": "Hi"}]
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    if rng.random() < 0.5:
        arguments = json.dumps({"city": rng.choice(("Paris", "Łódź 😀"))})
        turn: dict[str, Any] = {"role": "assistant", "content": ""}
        if rng.random() < 0.5:
            items.append(
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "Hm."}],
                }
            )
            turn["reasoning_content"] = "Hm."
        if rng.random() < 0.5:
            items.append({"role": "assistant", "content": "Look."})
            turn["content"] = "Look."
        turn["tool_calls"] = []
        for name in ("weather", "clock")[: rng.randrange(1, 3)]:
            call = {"call_id": f"call{name}", "name": name, "arguments": arguments}
            items.append({"type": "function_call", **call})
            turn["tool_calls"].append(
                {
                    "id": call["call_id"],
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
            )
        messages.append(turn)
        for made in turn["tool_calls"]:
            output = {"call_id": made["id"], "output": "sunny"}
            items.append({"type": "function_call_output", **output})
            messages.append({"role": "tool", "tool_call_id": made["id"], "content": "sunny"})
    return items, messages


def _tools(
    rng: random.Random,
    functions: Sequence[dict[str, Any]],
    response: dict[str, Any],
    chat: dict[str, Any],
) -> str:
    """Offers tools. Returns how a call is forced, if it is."""
    response["tools"] = [{"type": "function", **one} for one in functions]
    chat["tools"] = [{"type": "function", "function": one} for one in functions]
    parallel = rng.random() < 0.7
    response["parallel_tool_calls"] = chat["parallel_tool_calls"] = parallel
    name = functions[0]["name"]
    kind = rng.choice(("auto", "auto", "auto", "none", "required", "named", "allowed"))
    if kind == "named":
        response["tool_choice"] = {"type": "function", "name": name}
        chat["tool_choice"] = {"type": "function", "function": {"name": name}}
        return kind
    if kind == "allowed":
        mode = rng.choice(("auto", "required"))
        tools = [{"type": "function", "name": name}]
        response["tool_choice"] = {"type": "allowed_tools", "mode": mode, "tools": tools}
        tools = [{"type": "function", "function": {"name": name}}]  # type: ignore[dict-item]
        allowed = {"mode": mode, "tools": tools}
        chat["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
        return "required" if mode == "required" else ""
    response["tool_choice"] = chat["tool_choice"] = kind
    return kind if kind == "required" else ""


def _options(
    rng: random.Random, response: dict[str, Any], chat: dict[str, Any], *, forced: bool
) -> None:
    if rng.random() < 0.5:
        tops = rng.choice((0, 0, 1, 2))
        response |= {"include": ["message.output_text.logprobs"], "top_logprobs": tops}
        chat |= {"logprobs": True, "top_logprobs": tops}
    if rng.random() < 0.3:
        response["stop"] = chat["stop"] = rng.sample(_STOPS, 2)
    if rng.random() < 0.2:
        response["include_reasoning"] = chat["include_reasoning"] = False
    if not forced and rng.random() < 0.15:
        response["text"] = {"format": _FORMAT}
        schema = {"name": "a", "schema": _FORMAT["schema"]}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    if rng.random() < 0.3:
        response["instructions"] = "Be brief."
        chat["messages"] = [{"role": "system", "content": "Be brief."}, *chat["messages"]]


def _text(
    rng: random.Random, model: str, functions: Sequence[dict[str, Any]], forced: str
) -> str:
    calls = [
        (rng.choice(functions)["name"], {"city": rng.choice(("Paris", "Łódź 😀", '"\\'))})
        for _ in range(rng.randrange(4) if functions else 0)
    ]
    if forced == "named":
        return json.dumps({"city": "Łódź 😀"}, ensure_ascii=False)
    if forced:
        made = [{"name": name, "arguments": arguments} for name, arguments in calls]
        return json.dumps(made, ensure_ascii=False)
    thought = f"<think>{_words(rng, 12)}</think>" if rng.random() < 0.5 else ""
    if model == "opened":
        thought = thought.removeprefix("<think>")
    before = rng.choice(("", "\n\n", " ", _words(rng, 8)))
    return thought + before + _calls(model, calls) + _words(rng, 4)


def _calls(model: str, calls: Sequence[tuple[str, dict[str, str]]]) -> str:
    if not calls:
        return ""
    key = "parameters" if model == "llama" else "arguments"
    made = [json.dumps({"name": name, key: given}, ensure_ascii=False) for name, given in calls]
    if model == "llama":
        return "; ".join(made)
    if model == "mistral":
        return f"[TOOL_CALLS] [{', '.join(made)}]"
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in made)
