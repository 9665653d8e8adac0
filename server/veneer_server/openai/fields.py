"""The fields of a JSON request, and which of them are served, refused or ignored.

A field that is known to change the answer is served or refused, never dropped.
``--unknown-fields`` decides about unknown fields. Extensions to OpenAI's fields have vLLM's
names, if vLLM has them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import Field, ValidationError, create_model, field_validator
from veneer_registry.errors import InvalidField

from veneer_server.openai.extensions import (
    ChatExtensions,
    Fields,
    Ignored,
    SharedExtensions,
    is_neutral,
)
from veneer_server.serving.checks import (
    MAX_BIAS,
    MAX_BIASES,
    MAX_MESSAGES,
    MAX_STOP_TOKENS,
)
from veneer_server.wire.sampling import FRACTIONS

MAX_PROMPTS: Final = 128
"""Most prompts in one request; each becomes a separate generate call."""

IGNORED: Final = frozenset(
    {
        # OpenAI's
        "access_programs",
        "background_options",
        "client_metadata",
        "context_management",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        # Anthropic's
        "betas",
        "billing_policy",
        "cache_control",
        "diagnostics",
        "fallback_credit_token",
        "fallbacks",
        "inference_geo",
        "speed",
        "user_profile_id",
        "workspace_id",
        # vLLM's
        "ec_transfer_params",
        "guided_decoding_backend",
        "guided_whitespace_pattern",
        "kv_transfer_params",
        "media_io_kwargs",
        "mm_payload",
        "mm_processor_kwargs",
        "request_id",
        "return_mm_kwargs",
        "return_token_offsets",
        "routed_experts_prompt_start",
        "session_id",
        "stream_interval",
    }
)
"""Fields that are accepted and have no effect here."""

_SAME_TEXT: Final = "the text of an answer never holds special tokens or stop strings"
_LARK: Final = "use structured_outputs.grammar, with a grammar in Lark's form"
_CUTS: Final = "use temperature, top_p and min_p"
_PENALTIES: Final = "use repetition_penalty, presence_penalty or frequency_penalty"

REFUSED: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "allowed_token_ids": (([],), "use structured_outputs or logit_bias"),
    "audio": ((), "only text is supported"),
    "bad_words": (([],), "use logit_bias"),
    "chat_template": (("",), "publish the template with the adapter"),
    "compaction": ((), "ask for a summary in a message"),
    "container": ((), "this server runs no tools: leave it out"),
    "custom_logit_processor": ((), "use logit_bias"),
    "documents": (([],), "put them into a message"),
    "dry_multiplier": ((0,), _PENALTIES),
    "ebnf": ((), _LARK),
    "enable_response_messages": ((False,), "read output"),
    "grammar": (("",), _LARK),
    "guardrails": (([],), "moderate the texts with a model of your choice"),
    "include_stop_str_in_output": ((False,), _SAME_TEXT),
    "input_ids": (([],), "send token ids to /v1/completions"),
    "length_penalty": ((1.0,), "beam search is not supported"),
    "logits_processors": (([],), "use logit_bias"),
    "logprob_token_ids": (([],), "use top_logprobs"),
    "lora_path": ((), "name the adapter as model"),
    "max_new_tokens": ((), "use max_tokens"),
    "mcp_servers": (
        ([],),
        "send their functions as tools, and call them yourself",
    ),
    "mirostat": ((0,), _CUTS),
    "modalities": ((["text"],), "only text is supported"),
    "moderation": ((), "moderate the texts with a model of your choice"),
    "n_predict": ((-1,), "use max_tokens"),
    "n_probs": ((0,), "use top_logprobs"),
    "no_stop_trim": ((False,), _SAME_TEXT),
    "previous_input_messages": (([],), "send the whole conversation as input"),
    "prompt_embeds": (([],), "send text or token ids"),
    "prompt_mode": ((), "use reasoning_effort"),
    "repeat_penalty": ((1.0,), "use repetition_penalty"),
    "repetition_detection": (({},), "use repetition_penalty, or a smaller max_tokens"),
    "return_hidden_states": ((False,), "leave it out"),
    "return_prompt_text": ((False,), "use echo of /v1/completions"),
    "return_routed_experts": ((False,), "leave it out"),
    "return_weight_versions": ((False,), "read the header veneer-revision"),
    "safe_prompt": ((False,), "put it into a message"),
    "samplers": (([],), _CUTS),
    "separate_reasoning": ((True,), "join reasoning_content and content"),
    "skip_special_tokens": ((True,), _SAME_TEXT),
    "spaces_between_special_tokens": ((True, False), _SAME_TEXT),
    "stop_regex": (("", []), "use stop"),
    "suffix": (("",), "put it into the prompt"),
    "thinking_token_budget": ((-1,), "use reasoning_effort"),
    "tool_prompt": (("",), "put it into a message"),
    "top_prompt_logprobs": ((0,), "use prompt_logprobs"),
    "truncation_side": (("left",), "only a prompt's last tokens can be kept"),
    "typical_p": ((1.0,), _CUTS),
    "use_beam_search": ((False,), "use n to get several answers"),
    "vllm_xargs": (({},), "this server has no such extensions: leave it out"),
    "watermarking": ((False,), "leave it out"),
    "web_search_options": ((), "put the search results into a message"),
    "xtc_probability": ((0,), _CUTS),
}
"""Fields that would change the answer: the values that have no effect, and the alternative."""

_INT32: Final = (1 << 31) - 1
_INT64: Final = (1 << 63) - 1
_UINT32: Final = (1 << 32) - 1
_UINT64: Final = (1 << 64) - 1
_Count = Annotated[int, Field(ge=0, le=_UINT32)]

_Seed = Annotated[int, Field(ge=-_INT64 - 1, le=_UINT64)]
"""A negative seed means the unsigned number with the same 64 bits."""

# Validation of a list stops at its first bad element. Otherwise pydantic collects an error
# for each, which takes seconds and gigabytes for a body of a few megabytes.
_StopIds = Annotated[list[_Count], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True)]
_Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


_SLICE: Final = 4096


def parse_ids(given: list[Any], most: int = _UINT32) -> list[Any]:
    """Check token ids and return them. There may be half a million: pydantic would check them
    in one call, which holds the GIL. Raises ValueError."""
    for at in range(0, len(given), _SLICE):
        part = given[at : at + _SLICE]
        if set(map(type, part)) != {int} or min(part) < 0 or max(part) > most:
            raise ValueError(f"contains a value that is not a token id: give 0 to {most}")
    return given


class StreamOptions(Fields):
    """What a stream contains besides the text.

    Attributes:
        include_usage: add a last chunk with the total usage.
        continuous_usage_stats: add the usage so far to each chunk.
    """

    where = "stream_options"

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchema(Fields):
    """``response_format.json_schema``."""

    refused = None

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """The format that the answer must have.

    Attributes:
        value: the schema or regular expression, in the form of Hugging Face's TGI.
        schema_: the schema, in llama.cpp's form.
    """

    refused = None

    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    json_schema: JsonSchema | None = None
    value: dict[str, Any] | bool | str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class StructuredOutputs(Fields):
    """vLLM's counterpart of `ResponseFormat`, with more kinds of constraints."""

    refused = None

    json_: dict[str, Any] | bool | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: _Texts | None = None
    json_object: bool = False
    grammar: str | None = None
    disable_any_whitespace: Literal[False] = False
    disable_additional_properties: Literal[False] = False


class Prediction(Fields):
    """OpenAI's ``prediction``: the answer that the caller expects.

    Attributes:
        content: a text, or parts of type text.
    """

    refused = None

    type: Literal["content"] = "content"
    content: str | _Objects = ""

    @property
    def text(self) -> str:
        """The whole text. Raises InvalidField for a part of another type."""
        if isinstance(self.content, str):
            return self.content
        texts = [part.get("text") for part in self.content if part.get("type") == "text"]
        found = [text for text in texts if isinstance(text, str)]
        if len(found) < len(self.content):
            raise InvalidField(
                "prediction.content holds a part that is no text: send parts of type text",
                metadata={"field": "prediction.content"},
            )
        return "".join(found)


class RequestFields(Fields):
    """Fields of a request, or of a part of one."""


class CommonFields(SharedExtensions, RequestFields):
    """Fields of both chats and completions, except those that `with_fractions` adds. Ranges
    that gRPC has too are checked in code shared with it."""

    model: str = Field(min_length=1, max_length=512)
    max_tokens: _Count | None = None
    n: Annotated[int, Field(ge=1, le=_UINT32)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: str | _Texts = Field(default_factory=list)
    user: str | None = None
    seed: _Seed | None = None
    logit_bias: dict[str, float] = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None

    top_k: Annotated[int, Field(ge=-1, le=_UINT32)] | None = None
    stop_token_ids: _StopIds = Field(default_factory=list)
    ignore_eos: bool = False
    priority: Annotated[int, Field(ge=-_INT32, le=_INT32)] = 0
    use_prefix_cache: bool | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: _Texts | None = None
    structured_outputs: StructuredOutputs | None = None
    # Other programs' names for the same settings.
    random_seed: _Seed | None = None
    cache_prompt: bool | None = None
    regex: str | None = None
    json_schema: dict[str, Any] | bool | str | None = None

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _few_ids(cls, given: object) -> object:
        if isinstance(given, list) and len(given) > MAX_STOP_TOKENS:
            raise ValueError(f"has {len(given)} ids: give at most {MAX_STOP_TOKENS}")
        return given

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases(cls, given: object) -> object:
        """Stop at the first bad entry, as for lists."""
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_BIASES:
            raise ValueError(f"has {len(given)} entries: give at most {MAX_BIASES}")
        for key, bias in given.items():
            number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not number or not -MAX_BIAS <= bias <= MAX_BIAS:
                raise ValueError(
                    f"for token {key[:40]!r}: give a number from {-MAX_BIAS:g} to {MAX_BIAS:g}"
                )
        return given

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, given: dict[str, float]) -> dict[str, float]:
        for key in given:
            # Check the length first: a key may have any number of digits.
            short = len(key) <= len(str(_UINT32))
            if not (short and key.isascii() and key.isdigit() and int(key) <= _UINT32):
                raise ValueError(f"key {key[:40]!r} is not a valid token id: use ids as keys")
        return given


_TEXTS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
"""Types of parts that are text, and the member that holds it."""


class MessageItem(Fields):
    """One chat message; parts of type text are joined.

    Attributes:
        name: accepted, but passed to chat templates only with a tool's result.
        content: may be missing only in a message with calls.
        reasoning: the assistant's earlier reasoning; ``reasoning_content`` is the older name.
        prefix: in the last message: the answer continues it, as with Mistral and DeepSeek.
    """

    where = "messages[]"
    refused: ClassVar[frozenset[str] | None] = frozenset({"audio"})

    role: str
    content: str | None = None
    name: str = ""
    refusal: str = ""
    reasoning: str = ""
    reasoning_content: str = ""
    tool_calls: _Objects = Field(default_factory=list)
    function_call: dict[str, Any] | None = None
    tool_call_id: str = Field(default="", max_length=256)
    prefix: bool = False

    @field_validator("content", mode="before")
    @classmethod
    def _join(cls, given: object) -> object:
        if not isinstance(given, list):
            return given
        texts = []
        for at, part in enumerate(given):
            kind = part.get("type") if isinstance(part, dict) else None
            kind = kind[:40] if isinstance(kind, str) else None
            where = _TEXTS.get(kind or "")
            text = part.get(where) if where else None
            if not isinstance(text, str):
                raise ValueError(f"part {at} is of type {kind!r}: only text is supported")
            texts.append(text)
        return "".join(texts)


FieldsT = TypeVar("FieldsT", bound=RequestFields)


def with_fractions(kind: type[FieldsT]) -> type[FieldsT]:
    """Add the sampling options that are fractions to a class of fields. OpenAI and vLLM use the
    same names for them as our table."""
    fractions: Any = dict.fromkeys(FRACTIONS, (float | None, None))
    return create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **fractions)


@with_fractions
class ChatFields(CommonFields, ChatExtensions):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[MessageItem], Field(fail_fast=True, max_length=MAX_MESSAGES)]
    add_special_tokens: Literal[False] = False
    max_completion_tokens: Annotated[int, Field(ge=1, le=_UINT32)] | None = None
    logprobs: bool = False
    top_logprobs: _Count = 0
    # Read by `veneer_server.openai.tools`.
    tools: _Objects = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    functions: _Objects = Field(default_factory=list)
    function_call: str | dict[str, Any] | None = None


@with_fractions
class CompletionFields(CommonFields):
    """``POST /v1/completions``.

    Attributes:
        prompt: text, token ids, or a list of either.
        logprobs: number of top tokens per position; 0 gives only the chosen token's.
    """

    prompt: str | list[Any]
    add_special_tokens: Literal[True] = True
    echo: bool = False
    # Checked here, since the core uses another name for it.
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _few(cls, given: object) -> object:
        if not isinstance(given, list) or not given:
            return given
        if isinstance(given[0], int):  # those are one prompt's tokens
            return parse_ids(given)
        if len(given) > MAX_PROMPTS:
            raise ValueError(f"holds {len(given)} prompts: send at most {MAX_PROMPTS}")
        kind = type(given[0])
        for prompt in given:
            if kind not in (str, list) or type(prompt) is not kind:
                raise ValueError(
                    "is neither a string, a list of token ids, nor a list of strings or of "
                    "such lists"
                )
            if isinstance(prompt, list):
                parse_ids(prompt)
        return given


_KINDS: Final[Mapping[str, type[CommonFields]]] = {
    "/v1/chat/completions": ChatFields,
    "/v1/completions": CompletionFields,
}

ELSEWHERE: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("output_config", "stop_sequences", "system", "thinking", "thread"), "/v1/messages"
    ),
    "output_format": "/v1/messages",
    **dict.fromkeys(
        (
            "background",
            "conversation",
            "image",
            "include",
            "input",
            "instructions",
            "max_output_tokens",
            "max_tool_calls",
            "previous_response_id",
            "reasoning",
            "text",
            "truncation",
        ),
        "/v1/responses",
    ),
}
"""Fields of other endpoints, with the path of each."""


_SLIP: Final = 0.9
"""From this similarity to a served field on, an unknown name counts as a typo, not as an
extension."""


def parse_fields(kind: type[FieldsT], given: object, ignored: Ignored | None = None) -> FieldsT:
    """Check a parsed JSON body; null is the same as leaving a field out.

    Args:
        ignored: collects fields without effect, and says whether unknown fields are refused.
            None: they are.

    Raises:
        InvalidField: names the first invalid field and the fix.
    """
    if not isinstance(given, dict):
        raise InvalidField(
            "the body must be a JSON object: send the request's fields",
            metadata={"cause": "not_object"},
        )
    ignored = ignored or Ignored()
    kept = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in kind.model_fields:
            kept[name] = value
        elif name in IGNORED:
            ignored.known(name)
        else:
            _check_unserved(kind, name, value, ignored)
    try:
        return kind.model_validate(kept, context=ignored)
    except ValidationError as error:
        raise _refusal(kind, error) from error


def _check_unserved(
    kind: type[RequestFields], name: str, value: object, ignored: Ignored
) -> None:
    known = REFUSED.get(name)
    if (path := ELSEWHERE.get(name)) is not None:
        known = (), f"it is a field of {path}"
    for path, other in _KINDS.items():
        if (there := other.model_fields.get(name)) is not None:
            if is_neutral(value) or value == there.get_default(call_default_factory=True):
                return
            known = (), f"it is a field of {path}"
    if known is not None:
        neutral, instead = known
        if value in neutral or (name in ELSEWHERE and is_neutral(value)):
            return
        raise InvalidField(f"{name} is not supported: {instead}", metadata={"field": name})
    if is_neutral(value):
        return
    near, likeness = "", 0.0
    if ignored.unknown != "ignore":
        near, likeness = _nearest(kind, name, ignored)
    if not ignored.strict and likeness < _SLIP:
        ignored.field(name)
        return
    hint, shown = f"did you mean {near!r}?" if near else "leave it out", name[:60]
    raise InvalidField(
        f"unrecognized request argument {shown!r}: {hint}", metadata={"field": shown}
    )


def _nearest(kind: type[RequestFields], name: str, ignored: Ignored) -> tuple[str, float]:
    """The most similar known name and its similarity; empty if none is similar."""
    # Comparing takes a millisecond, and for a name of several megabytes half a second.
    if len(name) > 60 or ignored.crowded:
        return "", 0.0
    names = (*kind.model_fields, *REFUSED, *ELSEWHERE)
    for near in difflib.get_close_matches(name, names, n=1):
        return near, difflib.SequenceMatcher(None, near, name).ratio()
    return "", 0.0


def _refusal(kind: type[RequestFields], error: ValidationError) -> InvalidField:
    """The first problem as a sentence; for a union, the first member's problem."""
    first = error.errors(include_url=False, include_input=False)[0]
    path, unknown = "", first["type"] == "extra_forbidden"
    for step in first["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not path:
            path = step
        elif (step.isidentifier() or unknown) and step not in ("str", "int", "bool"):
            path += f".{step}"
    path = path[:100]  # it may contain a name that the caller chose
    if first["type"] == "missing":
        return InvalidField(f"{path} is missing: send it", metadata={"field": path})
    if unknown:
        return InvalidField(f"{path} is not supported: leave it out", metadata={"field": path})
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    return InvalidField(f"{path}: {problem}", metadata={"field": path})
