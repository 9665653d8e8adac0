"""Parameters and results of generate calls: frozen records, no protobuf.

Times are seconds, sizes are bytes, digests are 64 hex digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, TypedDict

from veneer_registry.adapter import SHORT_REVISION, Tier
from veneer_registry.errors import InvalidField

from veneer_client.tool_types import Tool, ToolCall, ToolCallDelta, ToolMode

__all__ = [
    "BoundOptions",
    "Chat",
    "ChatMessage",
    "Chunk",
    "FinishReason",
    "Flag",
    "GenerateOptions",
    "Generation",
    "GenerationEnd",
    "MessageLike",
    "Prompt",
    "Provenance",
    "RequestDefaults",
    "Sample",
    "SamplingNumbers",
    "Text",
    "Timings",
    "TokenLogprob",
    "Tokens",
    "TopLogprob",
    "Usage",
]

# ------------------------------------------------------------------------- input


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message; ``role`` is for example ``system``, ``user``, ``assistant`` or ``tool``.

    Attributes:
        tool_calls: the calls in an assistant's message.
        tool_call_id, tool_name: in a tool's message, the call that it has the result of.
        reasoning: an assistant's reasoning before its message, for templates that show it.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tool_name: str = ""
    reasoning: str = ""


MessageLike = ChatMessage | Mapping[str, str]
"""A message, or the usual mapping: ``{"role": ..., "content": ...}``, perhaps with
``reasoning``."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages that the server renders with the adapter's chat template, or the base's."""

    messages: tuple[ChatMessage, ...]

    @classmethod
    def user(cls, content: str, *, system: str | None = None) -> Chat:
        """A chat of one user message, after an optional system message."""
        before = () if system is None else (ChatMessage("system", system),)
        return cls((*before, ChatMessage("user", content)))

    @classmethod
    def of(cls, messages: Iterable[MessageLike]) -> Chat:
        """A chat of these messages. Raises InvalidField for a malformed mapping."""
        return cls(tuple(map(_message, messages)))


def _message(message: MessageLike) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    keys = set(message) - {"reasoning"}
    if keys != {"role", "content"} or not all(map(_is_text, message.values())):
        raise InvalidField(
            f"a chat message has the keys {sorted(message)}: give `role` and `content`, "
            "perhaps `reasoning`, all strings, and nothing else",
            metadata={"field": "messages"},
        )
    reasoning = message.get("reasoning", "")
    return ChatMessage(message["role"], message["content"], reasoning=reasoning)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt that is tokenised verbatim."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt of token ids."""

    ids: tuple[int, ...]


Prompt = Text | Chat | Tokens


@dataclass(frozen=True, slots=True)
class Flag:
    """The flag of ``veneer generate`` for an option: its help, and its minimum, if any."""

    help: str
    least: float | None = None


class SamplingNumbers(TypedDict, total=False):
    """Numeric sampling options. The flags of ``veneer generate`` are derived from them."""

    temperature: Annotated[float, Flag("0 is greedy; default: the server's.", least=0.0)]
    top_p: Annotated[float, Flag("Above 0, at most 1.")]
    top_k: Annotated[int, Flag("0 means all tokens.", least=0)]
    min_p: Annotated[
        float, Flag("Drop tokens less likely than this times the likeliest, 0 to 1.")
    ]
    seed: Annotated[int, Flag("Same seed, same tokens; default: random.", least=0)]
    repetition_penalty: Annotated[float, Flag("1 is off.")]
    """Applies to tokens in prompt and output."""
    presence_penalty: Annotated[float, Flag("-2 to 2; 0 is off.")]
    """Applies to tokens in the output."""
    frequency_penalty: Annotated[float, Flag("-2 to 2; 0 is off.")]
    """Applies to tokens in the output."""


class BoundOptions(SamplingNumbers, total=False):
    """Keyword arguments of every generate method, without the adapter. The server's defaults
    apply to omitted options (`ServerInfo.defaults`)."""

    request_id: str
    """Echoed in the answer and in the server's log."""
    logit_bias: Mapping[int, float]
    """Token id -> value to add to its logit, -100 to 100."""
    max_tokens: int
    """Unset: the server's default; see `ServerInfo.defaults`."""
    stop: Sequence[str]
    """Generation ends before the first of these strings."""
    stop_token_ids: Sequence[int]
    """Generation ends at any of these tokens, which is not part of the text."""
    ignore_eos: bool
    min_tokens: int
    """Stop tokens and stop strings have no effect until the output has this many tokens."""
    logprobs: bool
    """Log-probabilities of the raw distribution, one for each new token."""
    top_logprobs: int
    """How many of the most likely tokens to report at each position, at most 20; implies
    ``logprobs``."""
    echo: bool
    """The text starts with the prompt; with ``logprobs``, also its log-probabilities."""
    prompt_logprobs: int
    """Log-probabilities of the prompt, with this many of the most likely tokens at each
    position."""
    n: int
    """Samples of the same prompt, 1 to 16."""
    json_schema: Mapping[str, object]
    """The output is JSON of this schema; ``{}`` is any JSON value."""
    regex: str
    """The whole output matches this regular expression."""
    choice: Sequence[str]
    """The output is one of these texts."""
    grammar: str
    """The output matches this grammar, in llguidance's form of Lark."""
    truncate_prompt_tokens: int
    """Keep only this many of the prompt's last tokens; -1 keeps as many as leave room for the
    output."""
    template_kwargs: Mapping[str, object]
    """Variables of the chat template, such as ``enable_thinking``."""
    reasoning_effort: str
    """For templates that know it: none, minimal, low, medium, high, xhigh or max."""
    continue_final_message: bool
    """The output continues the chat's last message."""
    tools: Sequence[Tool]
    """Functions that the model may call; needs a `Chat`."""
    tool_choice: ToolMode | str
    """Whether the model calls a function, or the name of the function that it must call."""
    parallel_tool_calls: bool
    """Whether an answer may hold several calls; if unset, it may."""
    use_prefix_cache: bool
    """Unset: the server's default."""
    session_key: str
    """For an alias with several targets: the same key always gets the same one."""
    priority: int
    """-100 to 100: lower starts earlier, among requests of the same tenant."""
    timeout_s: float
    """Deadline of the whole call, retries included; none if unset."""


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """Defaults of unset options; ``max_tokens`` is further limited by the context."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int


class GenerateOptions(BoundOptions, total=False):
    """All options; at most one of ``json_schema``, ``regex``, ``choice`` and ``grammar``."""

    adapter: str
    """``name``, ``name@revision``, ``name/alias``, or nothing for the base model."""


# ------------------------------------------------------------------------ answers


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """End of sequence, a stop string or token, or a completed constraint."""
    LENGTH = "length"
    """``max_tokens`` or the end of the context."""
    CANCELLED = "cancelled"
    TOOL_CALLS = "tool_calls"
    """The model ended by itself after tool calls. A call that was required by name ends with
    `STOP`."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most likely tokens at a position; natural logarithm.

    Attributes:
        token: as in `TokenLogprob`.
    """

    token_id: int
    logprob: float
    token: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability.

    Attributes:
        top: the most likely tokens at its position, likeliest first, if requested.
        token: its unique name: its text, ``bytes:\\xf0\\x9f`` for a fragment of a character,
            or a special token's name. Empty from a server that does not send it.
        rank: how many tokens are at least as likely at its position, 1 for the likeliest. Set
            only for tokens of the prompt, with the option ``prompt_logprobs``; otherwise 0.
    """

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()
    token: str = ""
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, over all its samples. ``cached_prompt_tokens`` is the part of the
    prompt found in the prefix cache, ``reasoning_tokens`` the part of the completions that is
    reasoning, ``accepted_prediction_tokens`` the part that speculation had guessed;
    ``rejected_prediction_tokens`` are guesses that were wrong."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, as measured by the server.

    Attributes:
        queue_s: from arrival to the first step, excluding ``adapter_load_s``.
        adapter_load_s: wait for the adapter to become resident.
        time_to_first_token_s, total_s: from arrival.
    """

    queue_s: float
    adapter_load_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which weights answered.

    Attributes:
        adapter: its name, or "" for the base model.
        revision: what the name resolved to when the call was admitted, or "".
        weights_digest: digest of the adapter's tensors, or "".
        tier: where the adapter was found; None for the base model.
    """

    base_model: str
    adapter: str
    revision: str
    weights_digest: str
    tier: Tier | None
    timings: Timings

    @property
    def short(self) -> str:
        """``name@`` and 12 digits of the revision, or ``base``."""
        return f"{self.adapter}@{self.revision[:SHORT_REVISION]}" if self.adapter else "base"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream.

    Attributes:
        text: new text, never retracted; may lag behind ``token_ids``.
        logprobs: one for each of ``token_ids``, if requested.
        prompt_logprobs: if requested, one for each prompt token after the first. They come in
            the first chunk with tokens; for a long prompt, also in chunks before it.
        index: number of the sample that the chunk belongs to, from 0.
        finish_reason: set in a sample's last chunk, which may have no text.
        reasoning: new text of the model's reasoning; see `Generation`.
        tool_calls: new pieces of calls.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """The end of a stream; with ``n``, the finish reason is that of the last sample to end."""

    request_id: str
    finish_reason: FinishReason
    usage: Usage
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Sample:
    """A further answer to the same prompt."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer; see `Chunk` and `GenerationEnd` for its parts.

    Attributes:
        others: with ``n``, the further samples.
        reasoning: the model's reasoning before ``text``, if its chat template has
            ``<think>``.
        tool_calls: the answer's tool calls; ``text`` is the rest of the answer.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage
    provenance: Provenance
    others: tuple[Sample, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
