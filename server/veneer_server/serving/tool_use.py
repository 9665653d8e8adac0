"""The tools of a request: schemas and grammars of tool calls, and how answers are parsed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import msgspec
from veneer_registry.errors import InvalidField, VeneerError

from veneer_server.serving.checks import check_json_size, refuse
from veneer_server.text.detokenizer import TokenBytes
from veneer_server.text.prompts import Prompt
from veneer_server.text.replies import THINK, ReplyParser, Tags, Thinking, reply_parser
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.text.tool_calls import (
    HERMES_CLOSE,
    HERMES_OPEN,
    CallFormat,
    NamedParser,
    RequiredParser,
    markers,
    parser_of,
)
from veneer_server.wire.messages import Constraint

# -------------------- schema
# JSON schemas for forced calls: one tool's arguments, or a list of calls.

MAX_FORCED_CALLS: Final = 8
"""Most calls in one answer that is forced to call tools. Without a limit, small models may add
calls until `max_tokens` ends the answer within a call: 4 of 300 requests of
`tests.bench.tool_calls` did."""

_MAPS: Final = frozenset(
    {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
)
"""Members whose value maps names to schemas; the names may be anything, ``$ref`` included."""
_VALUES: Final = frozenset({"const", "default", "enum", "example", "examples"})
"""Members that hold values, not schemas."""
_WORDS: Final = frozenset({"$comment", "description", "example", "examples", "title"})
"""Members that only inform people and models, and do not affect what matches."""
_SAYS_MORE: Final = frozenset(
    {"$ref", "additionalProperties", "allOf", "anyOf", "oneOf", "patternProperties"}
)


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the schema of a tool's arguments: an object, without additional members unless the
    tool's own schema says more about them. A tool without parameters has no arguments."""
    schema = {"type": "object", **(parameters or {})}
    if not schema.keys() & _SAYS_MORE:
        schema["additionalProperties"] = False
    return schema


def calls_schema(
    tools: Sequence[tuple[str, Mapping[str, Any] | None]], *, parallel: bool
) -> str:
    """Return the schema of a list of at least one call, as JSON.

    Args:
        tools: the tools' names and parameters.
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
    """Rewrite a schema's references to itself for its new place. Recurses as deep as the schema
    is nested, which is bounded."""
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
    """Remove the members of a schema that do not affect what matches it. Recurses as deep as
    the schema is nested, which is bounded."""
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


MAX_TOOLS: Final = 128
MAX_TOOL_BYTES: Final = 128 << 10
MAX_TOOL_NAME: Final = 256


class CallChoice(Enum):
    """Whether the model must call a tool. A request that may not call tools has no
    `ToolUse`."""

    AUTO = "auto"
    """The model decides."""
    REQUIRED = "required"
    """The model must call at least one tool."""
    NAMED = "named"
    """The model must call the tool that the request names."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool, in the form that chat templates get.

    Attributes:
        function: its ``name``, and optionally ``description``, ``parameters`` (a JSON schema)
            and any other members that the caller sent.
    """

    function: Mapping[str, Any]

    @property
    def name(self) -> str:
        name: str = self.function["name"]
        return name

    @property
    def parameters(self) -> Mapping[str, Any] | None:
        return self.function.get("parameters")

    @property
    def strict(self) -> bool:
        """Whether the arguments must fit the schema of `parameters`, forced or not."""
        return self.function.get("strict") is True

    def for_template(self) -> dict[str, Any]:
        """Return the tool in OpenAI's form, which templates expect."""
        return {"type": "function", "function": self.function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request.

    Attributes:
        named: name of the tool that must be called, if ``choice`` is NAMED.
        parallel: whether an answer may contain several calls.
    """

    tools: tuple[Tool, ...]
    choice: CallChoice = CallChoice.AUTO
    named: str = ""
    parallel: bool = True

    def __post_init__(self) -> None:
        check_tools(self.tools)
        if self.choice is CallChoice.NAMED and self._named_tool is None:
            refuse("tool_choice", f"names {self.named[:60]!r}, which is not one of the tools")

    @property
    def forced(self) -> bool:
        """Whether the model must call a tool; the call then does not use the template's
        format."""
        return self.choice is not CallChoice.AUTO

    @property
    def ends_with_calls(self) -> bool:
        """Whether an answer that ends by itself after a call has tool calls as its finish
        reason. After a call that the request named, the reason is a stop, as with OpenAI and
        vLLM."""
        return self.choice is not CallChoice.NAMED

    def constraint(self) -> Constraint | None:
        """The constraint that forces the model to call; None if it need not call."""
        match self.choice:
            case CallChoice.AUTO:
                return None
            case CallChoice.REQUIRED:
                tools = [(tool.name, tool.parameters) for tool in self.tools]
                return Constraint("json_schema", calls_schema(tools, parallel=self.parallel))
            case CallChoice.NAMED:
                tool = self._named_tool
                assert tool is not None, "checked at the beginning"
                return Constraint("json_schema", json.dumps(arguments_schema(tool.parameters)))

    def parser(self, family: CallFormat | None) -> ReplyParser:
        """Make a parser for one answer.

        Args:
            family: the chat template's format of tool calls.

        Raises:
            InvalidField: the model may call, but the server could not parse its calls.
        """
        match self.choice:
            case CallChoice.REQUIRED:
                return RequiredParser()
            case CallChoice.NAMED:
                return NamedParser(self.named)
            case CallChoice.AUTO if family is not None:
                return parser_of(family, parallel=self.parallel)
        raise InvalidField(
            "the model cannot choose whether to call tools, because the server does not "
            "recognize the tool-call format of this chat template: force a call with "
            "`tool_choice`, or start the server with --tool-parser",
            metadata={"field": "tool_choice"},
        )

    @property
    def _named_tool(self) -> Tool | None:
        return next((tool for tool in self.tools if tool.name == self.named), None)


def about_constraint(error: VeneerError, field: str) -> VeneerError:
    """Rename the field in an error about a constraint; any other error is returned unchanged.

    Args:
        field: the request's name for the constraint; ``tools`` if the tools made it; empty
            keeps the gRPC contract's name.
    """
    given = error.metadata.get("field", "")
    if not field or not isinstance(error, InvalidField) or given.split(".")[0] != "constraint":
        return error
    shown = "the combined schema of the tools" if field == "tools" else field
    # Only the first occurrence is the field's name: later, "constraint" is an ordinary word.
    message = error.message.replace(given, shown, 1)
    return InvalidField(message, metadata={**error.metadata, "field": field})


def check_tool(tool: Tool, field: str, schema: str = "parameters") -> None:
    """Raises InvalidField for a name or parameters that cannot be used.

    Args:
        field: the function's name in errors.
        schema: the name of the member with its parameters.
    """
    if not 1 <= len(tool.name) <= MAX_TOOL_NAME:
        refuse(f"{field}.name", f"has {len(tool.name)} characters: give 1 to {MAX_TOOL_NAME}")
    if not isinstance(tool.parameters, dict | None):
        refuse(f"{field}.{schema}", "is not an object: give a JSON schema")


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises InvalidField for no tools, too many tools, or tools that are too long."""
    if not tools:
        refuse("tools", "is empty: send at least one, or leave it out")
    if len(tools) > MAX_TOOLS:
        refuse("tools", f"has {len(tools)} entries: send at most {MAX_TOOLS}")
    size = 0
    for tool in tools:
        check_json_size("tools", tool.function, MAX_TOOL_BYTES)
        size += len(msgspec.json.encode(tool.function))
        if size > MAX_TOOL_BYTES:
            refuse("tools", f"has more than {MAX_TOOL_BYTES} bytes: shorten descriptions")


# -------------------- auto
# Grammars of answers in which the model may choose to call tools.
#
# Only for Hermes' format, whose opening tag cannot be anything else. In other formats, a call
# begins with something that may also be text, or the format differs between versions.

_SPACES = {"x-guidance": {"whitespace_pattern": " ?"}}
"""The same whitespace as `veneer_server.constraints.grammar` sets for schemas."""

_FREE = r"""start: (head call)* TEXT
TEXT: /(.|\n)*/
"""
_ANSWER = r"""start: {calls} | answer
call: {tag} body
answer: %json {schema}
"""


def auto_grammar(
    use: ToolUse, answer: Constraint | None = None, *, special: bool = False
) -> Constraint:
    """Return the grammar of an answer that mixes text and calls, or, with ``answer``, of one
    that is either calls or such an answer.

    Arguments must match the tool's schema; for a tool that is not strict, any object matches.

    Args:
        answer: a JSON schema that an answer without calls must match; None: any text.
        special: the opening tag is a special token.
    """
    tag = HERMES_OPEN if special else json.dumps(HERMES_OPEN)
    if answer is not None:
        more = MAX_FORCED_CALLS - 1 if use.parallel else 0
        calls = rf'call ("\n" call){{0,{more}}}' if more else "call"
        lark = _ANSWER.format(calls=calls, tag=tag, schema=_spaced(json.loads(answer.text)))
    elif special:
        lark = _FREE + f"head: TEXT {tag}\ncall: body\n"
    else:
        # The first tag ends the text before it.
        lark = _FREE + f"head[lazy]: TEXT {tag}\ncall: body\n"
    bodies = [_body(tool) for tool in use.tools]
    names = [f"body{number}" for number in range(len(bodies))]
    lark += f"body: {' | '.join(names)}\n"
    lark += "".join(f"{name}: {body}\n" for name, body in zip(names, bodies, strict=True))
    return Constraint("grammar", lark)


def _body(tool: Tool) -> str:
    """The grammar of a call to this tool, after the opening tag."""
    name = json.dumps(tool.name, ensure_ascii=False)
    before = json.dumps(f'\n{{"name": {name}, "arguments": ')
    after = json.dumps(f"}}\n{HERMES_CLOSE}")
    schema: Any = {"type": "object"}
    if tool.strict:
        # Descriptions would count towards the size of a constraint.
        schema = without_words(arguments_schema(tool.parameters))
    return f"{before} %json {_spaced(schema)} {after}"


def _spaced(schema: Mapping[str, Any] | bool) -> str:
    """Return a schema as JSON on one line, with an option that limits whitespace in matching
    texts."""
    return json.dumps({**_SPACES, **schema} if isinstance(schema, Mapping) else schema)


# -------------------- reading
# Finds reasoning and tool calls in the text of an answer.


class ShownTokens:
    """A tokenizer's bytes, with some special tokens shown as text."""

    def __init__(self, tokens: TokenBytes, special: Mapping[int, bytes]) -> None:
        self._tokens = tokens
        self._special = special
        self.strip_first_space = tokens.strip_first_space

    def token_bytes(self, token: int) -> bytes:
        """See `TokenBytes`."""
        return self._special.get(token) or self._tokens.token_bytes(token)


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """The form that one request's answers may have.

    Attributes:
        use: the tools that may be called, if any.
        family: the template's format of calls.
        constraint: the constraint that the output must match, if any.
        free: whether the output may begin with any text, including reasoning.
    """

    use: ToolUse | None
    family: CallFormat | None
    constraint: Constraint | None
    free: bool

    @property
    def by_tools(self) -> bool:
        """Whether the constraint was made from tools."""
        return self.use is not None and self.constraint is not None

    @classmethod
    def of(
        cls,
        use: ToolUse | None,
        family: CallFormat | None,
        wanted: Constraint | None,
        tokenizer: TextTokenizer,
    ) -> AnswerPlan:
        """Args:
        family: the format of calls of the request's template.
        wanted: the constraint that the request asks for, or that forces a call.

        Raises:
            InvalidField: see `ToolUse.parser`.
        """
        if use is None:
            return cls(None, None, wanted, free=wanted is None)
        use.parser(family)
        if use.forced or (wanted is None and not any(tool.strict for tool in use.tools)):
            return cls(use, family, wanted, free=wanted is None)
        if family is not CallFormat.HERMES:
            # A call cannot be told from other output, so a constrained answer has no calls.
            return cls(use if wanted is None else None, family, wanted, free=wanted is None)
        special = bool(tokenizer.special_ids(markers(family)[:1]))
        grammar = auto_grammar(use, wanted, special=special)
        return cls(use, family, grammar, free=wanted is None)


@dataclass(frozen=True, slots=True)
class ReplyReader:
    """Reads the samples of one request.

    Attributes:
        tokens: the bytes of tokens, as the parsers see them.
        thinking: whether the answer may contain reasoning.
        tags: the tags around the reasoning.
        use: the tools that may be called, if any.
        family: the template's format of calls.
    """

    tokens: TokenBytes
    thinking: Thinking = Thinking.NONE
    use: ToolUse | None = None
    family: CallFormat | None = None
    tags: Tags = THINK

    @classmethod
    def of(cls, tokenizer: TextTokenizer, prompt: Prompt, plan: AnswerPlan) -> ReplyReader:
        """Make the reader of answers to a prompt. Tags that are special tokens of the tokenizer
        are shown to its parsers."""
        use, family = plan.use, plan.family
        thinking, tags = prompt.thinking, prompt.tags
        if not plan.free:  # constrained output has no reasoning in it
            thinking = Thinking.NONE
        read: tuple[str, ...] = ()
        if thinking is not Thinking.NONE:
            read = tags.open, tags.close
        if use is not None and family is not None and not use.forced:
            read += markers(family)
        special = tokenizer.special_ids(read) if read else {}
        tokens = ShownTokens(tokenizer, special) if special else tokenizer
        return cls(tokens, thinking, use, family, tags)

    @property
    def ends_with_calls(self) -> bool:
        """See `ToolUse.ends_with_calls`."""
        return self.use is not None and self.use.ends_with_calls

    def parser(self) -> ReplyParser | None:
        """Make the parser of one sample; None if its text is passed on unchanged.

        Raises:
            InvalidField: see `ToolUse.parser`.
        """
        calls = None if self.use is None else self.use.parser(self.family)
        return reply_parser(self.thinking, calls, tags=self.tags)
