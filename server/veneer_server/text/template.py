"""Chat templates: sandboxed Jinja with limits, since a template is an untrusted program.

Rendering is synchronous, and runs in the processes of `veneer_server.text.template_renderer`.
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
"""Marker appended to a last message that the output continues. The prompt is cut there, however
the template treats white space and adds text. It is random, so callers cannot know it."""

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
    """The ``tojson`` filter, with transformers' arguments, which templates rely on."""
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
            MemoryError: there is not enough memory to compile it.
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
        """Render the prompt for an assistant's answer to ``messages`` (role, content, and
        optionally reasoning and calls), or for a continuation of the last message.

        Args:
            tools: tools in OpenAI's form; without any, the template's ``tools`` is undefined.

        Raises:
            TemplateFailed: the template rejects these messages, or exceeds a limit.
            MemoryError: there is not enough memory to render it.
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
        except Exception as error:  # a template may raise any exception
            raise _failed(
                "rendering", f"the chat template cannot render these messages: {_words(error)}"
            ) from error
        return "".join(pieces)


def _failed(cause: Cause, message: str) -> TemplateFailed:
    return TemplateFailed(message, metadata={"cause": cause})


def _words(error: Exception) -> str:
    """The error's message, truncated: a template may raise a message of any length."""
    text = str(error)
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 1] + "…"


def read_base_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Read (template source or None, special tokens) from a base model's folder.

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
# Tools for chat templates that do not support them.
#
# The tools are described in the system message, in the words of the Hermes and Qwen templates,
# so that the model calls them in their format. Calls and results of earlier turns are written
# into messages in the same way.

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
    """Whether a template without support for tools would leave anything out."""
    return bool(tools) or any(
        "tool_calls" in message or message["role"] == "tool" for message in messages
    )


def in_words(
    messages: Iterable[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Write the tools, calls and results of a chat as text, in messages of role and content."""
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
    """Add results as a user message, as in Qwen's template: many templates have no other role
    for them."""
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
