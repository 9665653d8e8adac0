"""Chat templates: sandboxed Jinja with bounds. A template is an untrusted program.

Rendering is synchronous, in the processes of `veneer_server.text.template_renderer`.
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from veneer_registry.errors import TemplateFailed

from veneer_server.text.turns import TemplateOptions

Cause = Literal["template_size", "syntax", "output_size", "rendering"]
"""Metadata ``cause`` of the errors that `ChatTemplate` raises."""

MAX_TEMPLATE: Final = 64 << 10
"""Most bytes of a template."""

MAX_OUTPUT: Final = 4 << 20
"""Most characters that a template may produce."""

MAX_ERROR: Final = 500
"""Most characters of a template's error message that are passed on."""

_PLAIN: Final = TemplateOptions()

_OPEN_END: Final = f"{secrets.token_hex(8)}:end"
"""Appended to a last message that is to be continued: the prompt ends where this stands,
however the template treats the white space and what follows. Nobody else can know it."""

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's text for training; no effect here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """With transformers' arguments, which templates rely on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


_ENVIRONMENT: Final = _environment()


class ChatTemplate:
    """A compiled template with the base's special tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Args: special_tokens: for example ``{"bos_token": "<s>"}``.

        Raises:
            TemplateFailed: the template is too long, or not valid Jinja.
            MemoryError: there is not enough to compile it.
        """
        if len(source.encode()) > MAX_TEMPLATE:
            raise _failed(
                "template_size",
                f"the chat template has more than {MAX_TEMPLATE} bytes: shorten it",
            )
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except MemoryError:
            raise
        except Exception as error:  # deep nesting also overflows the parser's stack
            raise _failed(
                "syntax", f"the chat template is not valid Jinja: {_words(error)}"
            ) from error
        self._special = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        options: TemplateOptions = _PLAIN,
    ) -> str:
        """The prompt for an assistant's answer to ``messages`` (role, content, perhaps
        reasoning and calls), or for more of the last one.

        Args:
            tools: in OpenAI's form; without any, the template's ``tools`` is undefined.

        Raises:
            TemplateFailed: the template rejects these messages, or exceeds a bound.
            MemoryError: there is not enough to render it.
        """
        if not options.continue_final:
            return self._render(messages, tools, options)
        *before, last = messages
        open_end = {**last, "content": last["content"] + _OPEN_END}
        text = self._render([*before, open_end], tools, options)
        end = text.rfind(_OPEN_END)
        if end < 0:
            raise _failed(
                "rendering",
                "the chat template cuts off the end of the last message, so it cannot be "
                "continued: leave continue_final_message out",
            )
        return text[:end]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        options: TemplateOptions,
    ) -> str:
        pieces: list[str] = []
        size = 0
        offered = {"tools": tools} if tools else {}
        try:
            for piece in self._template.generate(
                {
                    **options.kwargs,
                    **self._special,
                    **offered,
                    "messages": messages,
                    "add_generation_prompt": options.add_generation_prompt,
                }
            ):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise _failed(
                        "output_size",
                        f"the chat template produced more than {MAX_OUTPUT} characters: send "
                        "fewer messages or fix the template",
                    )
                pieces.append(piece)
        except (TemplateFailed, MemoryError):
            raise
        except Exception as error:  # a template may raise anything Python can
            raise _failed(
                "rendering", f"the chat template cannot render these messages: {_words(error)}"
            ) from error
        return "".join(pieces)


def _failed(cause: Cause, message: str) -> TemplateFailed:
    return TemplateFailed(message, metadata={"cause": cause})


def _words(error: Exception) -> str:
    """The error's message, truncated: a template may raise a text of any length."""
    text = str(error)
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 1] + "…"


def read_base_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """(template source or None, special tokens) of a base model's folder.

    ``chat_template.jinja`` takes precedence over ``tokenizer_config.json``.
    """
    config: dict[str, Any] = {}
    if (path := folder / "tokenizer_config.json").is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
    special = {}
    for key in _SPECIAL:
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8"), special
    source = config.get("chat_template")
    if isinstance(source, list):  # named templates; "default" is the chat one
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
    return (source if isinstance(source, str) else None), special


# -------------------- tool words
# Tools for chat templates that do not know them.
#
# The model gets them in its system message, in the words of the Hermes and Qwen templates, and
# calls in their format; calls and results of earlier turns are written into messages likewise.

_BEFORE: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER: Final = (
    "\n</tools>\n\nFor each function call, return a json object with function name and "
    "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def needs_words(
    messages: Iterable[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether there is anything that a template without tools would leave out."""
    return bool(tools) or any(
        "tool_calls" in message or message["role"] == "tool" for message in messages
    )


def in_words(
    messages: Iterable[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The chat with its tools, calls and results as text: messages of role and content."""
    said: list[dict[str, Any]] = []
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(message["content"])
            continue
        _say_results(said, results)
        said.append({"role": message["role"], "content": _with_calls(message)})
    _say_results(said, results)
    if tools:
        words = "".join([_BEFORE, *(f"\n{_json(tool)}" for tool in tools), _AFTER])
        if said and said[0]["role"] == "system":
            words = f"{said.pop(0)['content']}\n\n{words}"
        said.insert(0, {"role": "system", "content": words})
    return said


def _say_results(said: list[dict[str, Any]], results: list[str]) -> None:
    """As a user's message, as in Qwen's template: many templates know no other role."""
    if results:
        texts = [f"<tool_response>\n{each}\n</tool_response>" for each in results]
        said.append({"role": "user", "content": "\n".join(texts)})
        results.clear()


def _with_calls(message: Mapping[str, Any]) -> str:
    parts = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        written = {"name": function["name"], "arguments": function["arguments"]}
        parts.append(f"<tool_call>\n{_json(written)}\n</tool_call>")
    return "\n".join(parts)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
